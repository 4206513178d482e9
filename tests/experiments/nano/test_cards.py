"""The model cards: in the hub's format, with the figures they were given, and shipped as they were written."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from baselines import nano as dinov2
from experiments.pretrain.cards import SHOTS, CardFacts, StageRecord, dinov2_card, qwen_card
from vlm import nano as qwen

STAGES = ("vit", "tower", "answers")
FACTS = CardFacts(
    drawings=17_000,
    names=3_000,
    stages={stage: StageRecord(n, 128, 60 * n, "a slide rule") for n, stage in enumerate(STAGES, 11)},
    accuracies={
        "dinov2-logreg": {1: 0.111, 4: 0.222, 16: 0.333},
        "vlm-lora": {1: 0.444, 4: 0.555, 16: 0.666},
        "vlm-zero-shot": {0: 0.077},
        "pixel-knn": {1: 0.061, 4: 0.062, 16: 0.063},
    },
)


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (dinov2_card, ["| dinov2-logreg | 11.1% | 22.2% | 33.3% |", "11 steps of 128 pictures, 11 minutes on a slide"]),
        (
            qwen_card,
            ["| vlm-lora | 44.4% | 55.5% | 66.6% |", "| vlm-zero-shot | 7.7% | 7.7% | 7.7% |", "12 steps", "13 steps"],
        ),
    ],
)
def test_a_card_has_its_facts(card, expected: list[str]) -> None:
    read = ModelCard(card(FACTS))
    assert read.data.license == "apache-2.0"
    for text in [*expected, "| pixel-knn | 6.1% | 6.2% | 6.3% |", "17,000 distinct", "must not be used"]:
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
    card = ModelCard.load(module.HERE / "README.md")
    assert f"# {module.NAME}" in card.text
    row = re.search(rf"\| {method} \| ([\d.]+)% \| ([\d.]+)% \| ([\d.]+)% \|", card.text)
    assert row
    one, four, sixteen = map(float, row.groups())
    assert 5 < one < four < sixteen
