"""How the model is asked, what it learns and how scores are corrected: options of a sweep, kept apart in results."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trained import TINY, in_this_process, status_of

from data import catalog
from experiments.sweep.cells import Job
from experiments.sweep.config import Settings
from experiments.sweep.run import few_shot, validation
from experiments.sweep.store import Results
from kshot.errors import TooFewImagesError

OWN = "{image}What is drawn here? => It is a {label}."


@pytest.fixture(scope="module")
def command(photos: Path) -> list[str]:
    """A sweep of vlm-lora and vlm-zero-shot at one shot and seed."""
    methods = ("--method", "vlm-zero-shot", "--method", "vlm-lora", "--method", "pixel-knn")
    return ["sweep", "demo", "--dataset", f"folder:{photos}", *methods, "--shots", "1", "--seeds", "0", *TINY]


@pytest.fixture(scope="module")
def plain(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The results of the sweep without further options."""
    out = tmp_path_factory.mktemp("plain") / "out"
    with pytest.MonkeyPatch.context() as patch:
        in_this_process(patch)
        assert status_of(*command, "--out", out) == 0
    return Results(out)


@pytest.fixture
def sweep(command: list[str], tmp_path: Path, kshot: Any, ran: list[Job]) -> Any:
    """Runs the sweep with options; gives how it ended and its records."""

    def run(*options: str) -> tuple[Any, list[dict[str, Any]]]:
        ended = kshot(*command, *options, "--out", tmp_path / "out")
        there = (tmp_path / "out" / "sweep.json").exists()
        return ended, Results(tmp_path / "out").cells() if there else []

    return run


def test_several_phrasings_are_cells_of_their_own(sweep: Any, tmp_path: Path, ran: list[Job]) -> None:
    ended, cells = sweep("--prompt", "recipe", "--prompt", OWN)
    assert ended.status == 0, ended.err
    prompts = [(cell["method"], cell["settings"].get("prompt")) for cell in cells]
    both = [(method, prompt) for method in ("vlm-lora", "vlm-zero-shot") for prompt in ("recipe", OWN)]
    assert sorted(prompts, key=str) == sorted([("pixel-knn", None), *both], key=str)
    content = Results(tmp_path / "out").sweep()
    assert content["prompts"] == content["settings"]["prompt"] == ["recipe", OWN]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "VLM + LoRA (prompt 2)" in report
    assert f"--prompt recipe --prompt '{OWN}'" in report
    ran.clear()
    ended, _ = sweep("--prompt", "recipe", "--prompt", OWN)
    assert (ended.status, ran) == (0, [])
    ended, _ = sweep("--prompt", OWN)
    assert ended.status == 2
    assert "another configuration (prompt" in ended.err


def test_the_closed_set_is_a_loss_of_its_own(sweep: Any, plain: Results, tmp_path: Path) -> None:
    ended, cells = sweep("--loss", "closed-set")
    assert ended.status == 0, ended.err
    assert [c["settings"].get("loss") for c in cells] == [None, "closed-set", None]
    assert "free answers were not trained" in (tmp_path / "out" / "report.md").read_text()
    text, closed = (next(c for c in each if c["method"] == "vlm-lora") for each in (plain.cells(), cells))
    assert text["key"] != closed["key"]
    assert text["metrics"]["nll"] != closed["metrics"]["nll"]


@pytest.mark.parametrize("calibration", ["contextual", "pmi"])
def test_calibration_corrects_the_scores_and_not_the_answers(
    calibration: str, sweep: Any, plain: Results, tmp_path: Path
) -> None:
    before = {c["method"]: plain.predictions(c["key"]) for c in plain.cells()}
    ended, cells = sweep("--calibration", calibration)
    assert ended.status == 0, ended.err
    for cell in cells:
        after = Results(tmp_path / "out").predictions(cell["key"])
        corrected = "calibration" in cell["settings"]
        assert (after["label_log_prob"] != before[cell["method"]]["label_log_prob"]) == corrected
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
    ended, cells = sweep("--calibration", "validated")
    assert ended.status == 0, ended.err
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
