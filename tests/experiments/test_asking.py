"""How the model is asked, what it learns and how scores are corrected: options of a sweep, kept apart in results."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import catalog
from experiments.sweep.cells import Job
from experiments.sweep.config import Settings
from experiments.sweep.run import few_shot, validation
from experiments.sweep.store import Results
from kshot.errors import TooFewImagesError

OWN = "{image}What is drawn here? => It is a {label}."
TINY = ("--set", "views_per_class=4", "--set", "batch_size=4", "--set", "rank=4")


@pytest.fixture
def sweep(photos: Path, tmp_path: Path, kshot: Any, ran: list[Job]) -> Any:
    """A sweep of vlm-lora and vlm-zero-shot at one shot and seed; gives what it said and its records."""

    def run(*options: str) -> tuple[Any, list[dict[str, Any]]]:
        methods = ("--method", "vlm-zero-shot", "--method", "vlm-lora", "--method", "pixel-knn")
        base = ("sweep", "--dataset", f"folder:{photos}", *methods, "--shots", "1", "--seeds", "0", *TINY)
        said = kshot(*base, *options, "--out", tmp_path / "out")
        there = (tmp_path / "out" / "sweep.json").exists()
        return said, Results(tmp_path / "out").cells() if there else []

    return run


def test_several_phrasings_are_cells_of_their_own(sweep: Any, tmp_path: Path, ran: list[Job]) -> None:
    said, cells = sweep("--prompt", "recipe", "--prompt", OWN)
    assert said.status == 0, said.err
    asked = [(cell["method"], cell["settings"].get("prompt")) for cell in cells]
    both = [(method, prompt) for method in ("vlm-lora", "vlm-zero-shot") for prompt in ("recipe", OWN)]
    assert sorted(asked, key=str) == sorted([("pixel-knn", None), *both], key=str)
    content = Results(tmp_path / "out").sweep()
    assert content["prompts"] == content["settings"]["prompt"] == ["recipe", OWN]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "VLM + LoRA (prompt 2)" in report
    assert f"--prompt recipe --prompt '{OWN}'" in report
    ran.clear()
    said, _ = sweep("--prompt", "recipe", "--prompt", OWN)
    assert (said.status, ran) == (0, [])
    said, _ = sweep("--prompt", OWN)
    assert said.status == 2
    assert "another configuration (prompt" in said.err


def test_a_prompt_changes_the_numbers_and_the_key(sweep: Any, tmp_path: Path) -> None:
    _, cells = sweep("--prompt", OWN)
    assert {c["settings"]["prompt"] for c in cells if "model" in c["settings"]} == {OWN}
    content = Results(tmp_path / "out").sweep()
    assert "prompts" not in content
    assert content["settings"]["prompt"] == OWN


def test_the_closed_set_is_a_loss_of_its_own(sweep: Any, photos: Path, tmp_path: Path, kshot: Any) -> None:
    said, cells = sweep("--loss", "closed-set")
    assert said.status == 0, said.err
    assert [c["settings"].get("loss") for c in cells] == [None, "closed-set", None]
    one = ("--method", "vlm-lora", "--shots", "1", "--seeds", "0", *TINY)
    assert "free answers were not trained" in (tmp_path / "out" / "report.md").read_text()
    again = kshot("sweep", "--dataset", f"folder:{photos}", *one, "--out", tmp_path / "text")
    assert again.status == 0
    text = Results(tmp_path / "text").cells()[0]
    closed = next(c for c in cells if c["method"] == "vlm-lora")
    assert text["key"] != closed["key"]
    assert text["metrics"]["nll"] != closed["metrics"]["nll"]


@pytest.mark.parametrize("calibration", ["contextual", "pmi"])
def test_calibration_corrects_the_scores_and_not_the_answers(calibration: str, sweep: Any, tmp_path: Path) -> None:
    _, plain = sweep()
    before = {c["method"]: Results(tmp_path / "out").predictions(c["key"]) for c in plain}
    (tmp_path / "out").rename(tmp_path / "plain")
    said, cells = sweep("--calibration", calibration)
    assert said.status == 0, said.err
    for cell in cells:
        after = Results(tmp_path / "out").predictions(cell["key"])
        asked = "calibration" in cell["settings"]
        assert (after["label_log_prob"] != before[cell["method"]]["label_log_prob"]) == asked
        assert after["answer"] == before[cell["method"]]["answer"]
        assert "chosen" not in cell


def test_a_calibration_is_chosen_on_validation_images_alone(sweep: Any, tmp_path: Path, monkeypatch: Any) -> None:
    import vlm.calibration

    seen: list[np.ndarray] = []
    choose = vlm.calibration.choose

    def watched(scores: np.ndarray, labels: np.ndarray, priors: Any) -> str:
        seen.append(labels)
        return choose(scores, labels, priors)

    monkeypatch.setattr(vlm.calibration, "choose", watched)
    said, cells = sweep("--calibration", "validated")
    assert said.status == 0, said.err
    chosen = {c["method"]: c.get("chosen") for c in cells}
    assert chosen.pop("vlm-lora")["calibration"] in ("none", "contextual", "pmi")
    assert chosen == {"vlm-zero-shot": None, "pixel-knn": None}  # without a labelled image nothing is chosen
    assert [labels.tolist() for labels in seen] == [[0, 1, 2]]  # one image of each class, as there is one shot
    assert "calibration was chosen on more labelled training images" in (tmp_path / "out" / "report.md").read_text()


def test_validation_images_are_neither_shots_nor_test(photos: Path) -> None:
    dataset = catalog.load(f"folder:{photos}", split_seed=0)
    settings = Settings(calibration="validated")
    for shots in (1, 2, 4):
        shown = {e.key for e in few_shot(dataset, shots, 0, settings)}
        held = {e.key for e in validation(dataset, shots, 0, settings)}
        assert len(held) == 3 * shots
        assert not held & (shown | {e.key for e in dataset.test})
    assert validation(dataset, 2, 0, Settings()) == []
    with pytest.raises(TooFewImagesError, match="9 shots asked for"):
        validation(dataset, 5, 0, settings)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--prompt", "What? => {label}"), "must hold {image} once"),
        (("--prompt", "recipes"), "neither a preset (recipe)"),
        (("--set", "prompt={image}What?"), "neither a preset"),
        (("--prompt", "recipe", "--set", "prompt=recipe"), "prompt is given twice"),
        (("--loss", "closed"), "loss = 'closed'"),
        (("--calibration", "auto"), "calibration = 'auto'"),
        (("--loss", "closed-set", "--set", "loss=text"), "loss is given twice"),
    ],
)
def test_what_cannot_be_asked_is_refused_at_the_start(
    options: tuple[str, ...], says: str, sweep: Any, ran: list[Job]
) -> None:
    said, cells = sweep(*options)
    assert (said.status, said.err.count("\n"), ran, cells) == (2, 1, [], [])
    assert says in said.err


def test_a_choice_without_labelled_images_is_refused(photos: Path, tmp_path: Path, kshot: Any) -> None:
    where = ("--dataset", f"folder:{photos}", "--out", tmp_path / "out")
    said = kshot("zero-shot", *where, "--calibration", "validated")
    assert (said.status, said.err.count("\n")) == (2, 1)
    assert "zero-shot has none; give contextual, pmi or none" in said.err
