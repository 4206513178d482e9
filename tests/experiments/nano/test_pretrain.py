"""The command that makes the pair: a stage leaves its file, once, whole, in the stock layout; and what it ships."""

import json
import re
import sys
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import Qwen3VLForConditionalGeneration

from baselines import nano as dinov2
from experiments.pretrain import __main__ as main
from experiments.pretrain import learning
from experiments.pretrain.__main__ import SHOTS, StageRecord, card
from experiments.pretrain.subjects import Subjects
from kshot.errors import InputError
from vlm import nano as qwen


def drawings() -> Subjects:
    masks = (np.random.default_rng(0).random((6, 64, 64)) > 0.5).astype(np.uint8) * 255
    small = masks[:, :24, :24].reshape(6, -1)
    return Subjects(masks, ("arrow", "arrow", "letter a", "wheel", "wheel", "ladder"), tuple("abcdef"), small)


def photographs(root: Path) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 3, 96, 96), dtype=np.uint8)


def described(masks: torch.Tensor, device: str = "cpu") -> torch.Tensor:
    count = len(masks) * (2 if masks.ndim == 3 else 1)  # a drawing is described with its mirror image
    return torch.nn.functional.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(0)), dim=1)


def pretrain(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(main, "subjects", drawings)
    monkeypatch.setattr(main, "photographs", photographs)
    monkeypatch.setattr(main.students, "COMMON", 1)
    monkeypatch.setattr(learning, "describe", described)
    monkeypatch.setattr(learning, "describe_photographs", described)
    monkeypatch.setattr(main, "accuracies", lambda *_: dict.fromkeys(METHODS, MappingProxyType(HALF)))
    monkeypatch.setattr(sys, "argv", ["pretrain", *map(str, arguments), "--steps", "2", "--threads", "1"])
    main.main()


HALF = {1: 0.5, 4: 0.5, 16: 0.5}
METHODS = (main.FLOOR, "dinov2-logreg", "vlm-zero-shot", "vlm-lora")


def test_one_command_makes_the_pair_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work, root = tmp_path / "work", tmp_path / "root"
    pretrain(monkeypatch, "--work", work, "--stages", "vit")
    first = (work / "vit.safetensors").stat().st_mtime_ns
    pretrain(monkeypatch, "--work", work, "--ship-to", root)
    assert (work / "vit.safetensors").stat().st_mtime_ns == first
    assert "vit.safetensors is there" in capsys.readouterr().out
    files = {f"{name}.safetensors" for name in ("described", "photographs", "subjects", *main.STAGES)}
    assert {path.name for path in work.iterdir()} == {"subjects.json", "prepare.lock", *files}
    vit = timm.create_model(f"local-dir:{root / 'baselines/nano'}", pretrained=True)
    assert all(torch.equal(vit.state_dict()[name], t) for name, t in load_file(work / "vit.safetensors").items())
    model, info = Qwen3VLForConditionalGeneration.from_pretrained(root / "vlm/nano", output_loading_info=True)
    assert not any(info.values()), info
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert "2 steps of 128 pictures" in (root / "vlm/nano/README.md").read_text()
    rows = (root / main.NEAREST).read_text().splitlines()[1:]
    assert len(rows) > 700
    assert {row.split(",")[1] for row in rows} <= set("abcdef")
    assert json.loads((root / "baselines/nano/config.json").read_text())["model_args"]["patch_size"] == 8


def test_a_stage_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise InterruptedError

    monkeypatch.setitem(main.STAGES, "vit", (fail, 2))
    with pytest.raises(InterruptedError):
        pretrain(monkeypatch, "--work", tmp_path, "--stages", "vit")
    assert not list(tmp_path.glob("vit*"))


@pytest.mark.parametrize(
    ("stage", "message"), [("answers", "run the stage tower first"), ("vlm", "vit, tower, answers, ship")]
)
def test_a_stage_that_cannot_run_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        pretrain(monkeypatch, "--work", tmp_path, "--stages", stage)


FACTS = {
    "drawings": 17_000,
    "names": 3_000,
    "stages": {stage: StageRecord(n, 128, 60 * n, "a slide rule") for n, stage in enumerate(main.STAGES, 11)},
    "accuracies": {
        "dinov2-logreg": {1: 0.111, 4: 0.222, 16: 0.333},
        "vlm-lora": {1: 0.444, 4: 0.555, 16: 0.666},
        "vlm-zero-shot": {0: 0.077},
        "pixel-knn": {1: 0.061, 4: 0.062, 16: 0.063},
    },
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dinov2", ["| dinov2-logreg | 11.1% | 22.2% | 33.3% |", "11 steps of 128 pictures, 11 minutes on a slide"]),
        (
            "qwen3_vl",
            ["| vlm-lora | 44.4% | 55.5% | 66.6% |", "| vlm-zero-shot | 7.7% | 7.7% | 7.7% |", "12 steps", "13 steps"],
        ),
    ],
)
def test_a_card_has_its_facts(name: str, expected: list[str]) -> None:
    read = ModelCard(card(name, FACTS))
    assert read.data.license == "apache-2.0"
    for text in [
        *(*expected, "| pixel-knn | 6.1% | 6.2% | 6.3% |", "17,000 distinct", "must not be used"),
        *(
            "Material Design Icons (Apache-2.0)",
            "Codicons (CC-BY-4.0)",
            "No icon of Elusive Icons, Font Awesome, Phosphor, Remix Icon is among",
            "star, camera",
        ),
        *("tuxpaint-stamps-default 2022.06.04-1 (GPL-2)", "25% of the pictures", "No picture is in the weights"),
    ]:
        assert text in read.text
    assert f"| method | {' | '.join(f'k = {k}' for k in SHOTS)} |" in read.text


@pytest.mark.parametrize(("module", "folder"), [(dinov2, "baselines/nano"), (qwen, "vlm/nano")])
def test_the_code_on_a_shipped_card_runs(
    module, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], make_image
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (module.HERE / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert folder in code
    (tmp_path / "icon.png").write_bytes(make_image(0))
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(compile(code.replace(folder, str(module.HERE)), "README.md", "exec"), scope)  # noqa: S102 - the point of the test
    assert {"vit", "model"} & scope.keys()
    assert ("answer" in scope) == bool(capsys.readouterr().out.strip())


@pytest.mark.parametrize(("module", "method"), [(dinov2, "dinov2-logreg"), (qwen, "vlm-lora")])
def test_the_shipped_card_belongs_to_the_model(module, method: str) -> None:
    shipped = ModelCard.load(module.HERE / "README.md")
    assert f"# {module.NAME}" in shipped.text
    row = re.search(rf"\| {method} \| ([\d.]+)% \| ([\d.]+)% \| ([\d.]+)% \|", shipped.text)
    assert row
    one, four, sixteen = map(float, row.groups())
    assert 5 < one < four < sixteen
