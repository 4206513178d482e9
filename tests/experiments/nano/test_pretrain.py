"""The command that makes the pair: every stage leaves its file, once, whole, and in the stock models' own layout."""

import json
import sys
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from transformers import Qwen3VLForConditionalGeneration

from experiments.pretrain import __main__ as main
from experiments.pretrain import cards, learning
from experiments.pretrain.subjects import Subjects
from kshot.errors import InputError

STAGES = ("vit", "tower", "answers")


def drawings() -> Subjects:
    masks = (np.random.default_rng(0).random((6, 64, 64)) > 0.5).astype(np.uint8) * 255
    return Subjects(masks, ("arrow", "arrow", "letter a", "wheel", "wheel", "ladder"))


def described(masks: torch.Tensor, device: str = "cpu") -> torch.Tensor:
    return torch.nn.functional.normalize(
        torch.randn(2 * len(masks), 8, generator=torch.Generator().manual_seed(0)), dim=1
    )


def pretrain(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(main, "subjects", drawings)
    monkeypatch.setattr(learning, "describe", described)
    monkeypatch.setattr(main, "accuracies", lambda *_: dict.fromkeys(METHODS, MappingProxyType(HALF)))
    monkeypatch.setattr(sys, "argv", ["pretrain", *map(str, arguments), "--steps", "2", "--threads", "1"])
    main.main()


HALF = {1: 0.5, 4: 0.5, 16: 0.5}
METHODS = (cards.FLOOR, "dinov2-logreg", "vlm-zero-shot", "vlm-lora")


def test_one_command_makes_the_pair_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work, root = tmp_path / "work", tmp_path / "root"
    pretrain(monkeypatch, "--work", work, "--stages", "vit")
    first = (work / "vit.safetensors").stat().st_mtime_ns
    pretrain(monkeypatch, "--work", work, "--ship-to", root)
    assert (work / "vit.safetensors").stat().st_mtime_ns == first
    assert "vit.safetensors is there" in capsys.readouterr().out
    files = ["described.safetensors", "subjects.json", "subjects.safetensors", *(f"{s}.safetensors" for s in STAGES)]
    assert sorted(path.name for path in work.iterdir()) == sorted(files)
    vit = timm.create_model(f"local-dir:{root / 'baselines/nano'}", pretrained=True)
    assert all(torch.equal(vit.state_dict()[name], t) for name, t in load_file(work / "vit.safetensors").items())
    model, info = Qwen3VLForConditionalGeneration.from_pretrained(root / "vlm/nano", output_loading_info=True)
    assert not any(info.values()), info
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert "2 steps of 128 pictures" in (root / "vlm/nano/README.md").read_text()
    assert json.loads((root / "baselines/nano/config.json").read_text())["model_args"]["patch_size"] == 8


def test_a_stage_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise InterruptedError

    monkeypatch.setitem(main.TRAIN, "vit", fail)
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
