"""Mirrored images in training, where a mirror image is of another class: the setting hflip, and the note on it."""

import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest
from PIL import Image, ImageDraw
from reported import SWEEP, cell, store_predictions

from baselines import nano
from experiments.adapters.train import plan_training
from experiments.plan.counts import count
from experiments.plan.estimate import estimate, rows
from experiments.report.comparisons import training_notes
from experiments.sweep.cells import Job
from experiments.sweep.config import RunOptions, command, load
from experiments.sweep.grid import plan
from experiments.sweep.run import dataset_of, train_examples
from experiments.sweep.store import Results
from experiments.sweep.workload import of_jobs, of_sweep

HEAD, TRAINED = "dinov2-logreg", "dinov2-lora"


@pytest.fixture(scope="module")
def arrows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two classes that are each other's mirror image."""
    home, draw = tmp_path_factory.mktemp("drawn") / "arrows", Random(0)
    for (name, way), n in product({"left arrow": -1, "right arrow": 1}.items(), range(50)):
        image = Image.new("RGB", (64, 64), "white")
        x, y, size = 32 + draw.randint(-5, 5), 32 + draw.randint(-5, 5), draw.randint(14, 20)
        pen, colour = ImageDraw.Draw(image), (draw.randrange(140), draw.randrange(140), draw.randrange(140))
        pen.line((x - way * size, y, x, y), colour, 6)
        pen.polygon([(x, y - size * 0.7), (x, y + size * 0.7), (x + way * size, y)], colour)
        (home / name).mkdir(parents=True, exist_ok=True)
        image.save(home / name / f"{n}.png")
    return f"folder:{home}"


@pytest.fixture
def sweep(arrows: str, tmp_path: Path, kshot: Any, ran: list[Job]) -> Callable[..., tuple[Any, Results]]:
    def run(*options: str) -> tuple[Any, Results]:
        methods, out = ("--method", HEAD, "--method", TRAINED), tmp_path / f"out{len(options)}"
        ended = kshot(
            "sweep", "demo", "--dataset", arrows, *methods, "--shots", "16", "--seeds", "0", *options, "--out", out
        )
        assert ended.status == 0, ended.err
        return ended, Results(out)

    return run


@pytest.mark.slow
def test_what_trains_learns_without_mirroring_and_is_warned_of_with_it(sweep: Callable[..., Any]) -> None:
    usual, results = sweep()
    (note,) = (line for line in usual.out.splitlines() if "--set hflip=0" in line)
    assert note.startswith("folder:arrows, k = 16: DINOv2 + LoRA is ")
    assert "points of accuracy behind DINOv2 + logistic regression" in note
    assert "mirrored images (hflip 0.5)" in note
    text, page = ((results.folder / f"report.{kind}").read_text() for kind in ("md", "html"))
    assert "--set hflip=0" in text
    assert "--set hflip=0" in page
    assert note not in results.sweep()["notes"]  # it changes as cells come
    without, better = sweep("--set", "hflip=0")
    assert "behind" not in without.out
    assert {c["method"]: c["metrics"]["accuracy"] >= 0.9 for c in better.cells()} == {HEAD: True, TRAINED: True}
    hflips = [{c["method"]: c["settings"].get("hflip") for c in each.cells()} for each in (results, better)]
    assert hflips == [{HEAD: None, TRAINED: 0.5}, {HEAD: None, TRAINED: 0.0}]
    better_text = (better.folder / "report.md").read_text()
    shown = [re.search(r"\| folder:arrows \| 2 \| 20 \| 1 \| 2 \| (\S+) \|", each) for each in (text, better_text)]
    assert [row and row[1] for row in shown] == ["0.5", "0"]
    assert "points of accuracy behind" not in better_text
    assert "--set hflip=0.0" in better_text  # the command that runs it again


def test_few_classes_have_enough_steps(arrows: str) -> None:
    """256 x 2 views in batches of 8 are 64 steps; views that are given stay, and so do the recipe's."""
    grid = {"datasets": [arrows], "methods": [TRAINED], "shots": [2], "seeds": [0]}
    cases: list[tuple[dict[str, Any], int]] = [({}, 256), ({"views_per_class": 64}, 64), ({"backbone": nano.NAME}, 256)]
    for settings, views in cases:
        chosen = load("demo", grid, settings)
        planned = plan(chosen)
        assert planned.jobs[0].cell.settings["views_per_class"] == views
        assert of_sweep(chosen).cells[0].settings == planned.jobs[0].settings
        content = planned.describe()
        assert content.get("views_per_class") == ({"folder:arrows": 256} if views == 256 else None)
        assert ("--set views_per_class=64" in command(content)) == (views == 64)
    assert load("demo", grid, {"backbone": "vit_base_patch14_dinov2.lvd142m"}).on(2, 0).settings.views_per_class == 160


def test_images_are_mirrored_where_they_may_be_shown(arrows: str) -> None:
    """Whatever the sweep before it in this process did."""
    grid = {"datasets": [arrows], "methods": ["vlm-lora", HEAD], "shots": [2], "seeds": [0]}
    for hflip, twins in ((0, False), (0.5, True), (0, False), (1, True)):
        chosen = load("demo", grid, {"hflip": hflip})
        planned = plan(chosen)
        examples = train_examples(planned.jobs[0], dataset_of(planned.jobs[0]))
        assert [example.mirrored is not None for example in examples] == [twins] * 4
        for workload in (of_sweep(chosen), of_jobs(planned.jobs, planned.datasets)):
            assert count(workload, None).tower == 20 + 4 * (1 + twins)


def test_the_plan_speaks_of_mirrored_images_where_there_are_any(arrows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.plan.estimate._unmeasured", lambda *_: "not here")
    grid = {"datasets": [arrows], "methods": ["vlm-lora"], "shots": [2], "seeds": [0]}
    plans = [rows(estimate(of_sweep(load("demo", grid, {"hflip": h})), Path("out"), RunOptions())) for h in (0, 0.5)]
    tower = [next(row[2] for row in each if row[0] == "vision tower") for each in plans]
    assert tower == ["each once for all cells", "each once for all cells, mirrored twins too"]


def test_an_adapter_is_trained_as_it_is_set(arrows: str) -> None:
    usual, own, other = (plan_training(arrows, 2, 0, settings)[0] for settings in ({}, {"hflip": "0.5"}, {"hflip": 0}))
    assert usual.cell == own.cell
    assert [job.cell.settings["hflip"] for job in (usual, other)] == [0.5, 0]
    assert [job.settings.hflip for job in (usual, other)] == [0.5, 0]
    assert usual.cell.key != other.cell.key


def behind(folder: Path, head: float, trained: float, images: int = 200, **settings: Any) -> list[str]:
    """The notes on two methods of these accuracies, on so many images."""
    folder.mkdir()
    cells = [cell(HEAD, 4, seed, head) for seed in (0, 1)]
    cells += [cell(TRAINED, 4, seed, trained) | {"settings": settings} for seed in (0, 1)]
    store_predictions(folder, cells, images)
    return [*training_notes(folder, SWEEP, cells)]


def test_the_note_is_due_from_twenty_points_on(tmp_path: Path) -> None:
    (note,) = behind(tmp_path / "a", 0.8, 0.6, hflip=0.5)
    assert "icons, k = 4: DINOv2 + LoRA is 20.0 points of accuracy behind" in note
    assert "(p <0.001)" in note
    assert behind(tmp_path / "b", 0.8, 0.605, hflip=0.5) == []
    assert behind(tmp_path / "c", 0.4, 0.8, hflip=0.5) == []
    assert behind(tmp_path / "d", 0.8, 0.6, images=5, hflip=0.5) == []  # one image of five: p is 2 x 0.8^5


@pytest.mark.parametrize("settings", [{"hflip": 0.0}, {}])
def test_mirroring_is_named_only_where_it_was_used(tmp_path: Path, settings: dict[str, Any]) -> None:
    (note,) = behind(tmp_path / "a", 0.9, 0.3, **settings)
    assert "60.0 points" in note
    assert "mirror" not in note
    assert "learning_rate" in note


def test_a_head_is_compared_with_what_trains_the_same_model(tmp_path: Path) -> None:
    """Only the small backbone's head is better than what trains it; the large one's is no reason to speak."""
    compared = SWEEP | {"methods": [HEAD, TRAINED], "compare": {"backbone": ["small", "large"]}}
    shares = {("small", HEAD): 0.9, ("small", TRAINED): 0.6, ("large", HEAD): 0.5, ("large", TRAINED): 0.45}
    cells = [
        cell(method, 4, 0, share) | {"settings": {"backbone": backbone}, "key": f"{backbone}-{method}"}
        for (backbone, method), share in shares.items()
    ]
    store_predictions(tmp_path, [*cells, cell("pixel-knn", 4, 0, 1.0), cell("vlm-lora", 4, 0, 0.1)])
    (note,) = training_notes(tmp_path, compared, [*cells, cell("pixel-knn", 4, 0, 1.0), cell("vlm-lora", 4, 0, 0.1)])
    assert "DINOv2 + LoRA (small) is 30.0 points" in note
