"""A model of the hub that moves to another commit between two runs: cells of two models are never in one folder."""

from pathlib import Path
from typing import Any

import pytest

from experiments.sweep import grid
from experiments.sweep.config import RunOptions, Sweep, command, load
from experiments.sweep.grid import continued, plan, run_sweep
from experiments.sweep.store import Results
from kshot.errors import ModelError, ResultsError
from vlm import models, nano

COMMITS = "a" * 40, "b" * 40


def sweep(model: str) -> Sweep:
    fields = {"datasets": ("digits",), "methods": ("vlm-zero-shot", "pixel-knn"), "shots": (1,), "seeds": (0,)}
    return load("demo", fields, {"model": model, "limit_test": 2})


def at(commit: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / commit).mkdir()
    monkeypatch.setattr(models, "_fetch_small", lambda name: str(home / commit))


def test_the_commit_is_part_of_the_key_and_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Any] = []
    for commit in COMMITS:
        at(commit, tmp_path, monkeypatch)
        plans.append(plan(sweep("o/n")))
    first, second = ({job.cell.method: job for job in each.jobs} for each in plans)
    vlm = first["vlm-zero-shot"]
    assert vlm.settings.model == f"o/n@{COMMITS[0]}"  # what every worker loads
    assert (vlm.cell.settings["model"], vlm.cell.settings["model_revision"]) == ("o/n", COMMITS[0])
    assert vlm.cell.key != second["vlm-zero-shot"].cell.key
    assert first["pixel-knn"].cell.key == second["pixel-knn"].cell.key
    results, described = Results(tmp_path / "out"), [each.describe() for each in plans]
    assert described[0]["settings"]["model_revision"] == COMMITS[0]
    with results.writing():
        results.begin(described[0])
        (tmp_path / "out/cells.jsonl").touch()
        with pytest.raises(ResultsError, match=rf"model_revision '{COMMITS[0]}' → '{COMMITS[1]}'"):
            results.begin(described[1])
    assert f"model=o/n@{COMMITS[0]}" in command(described[0])


def test_a_folder_goes_on_with_the_commit_of_its_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the hub has a newer one, or cannot be asked any more."""
    at(COMMITS[0], tmp_path, monkeypatch)
    planned, results = plan(sweep("o/n")), Results(tmp_path / "out")
    with results.writing():
        results.begin(planned.describe())
    at(COMMITS[1], tmp_path, monkeypatch)
    assert continued(sweep("o/n"), results) == sweep("o/n")  # without a cell
    (tmp_path / "out/cells.jsonl").touch()
    again = plan(continued(sweep("o/n"), results))
    assert [job.cell.key for job in again.jobs] == [job.cell.key for job in planned.jobs]
    with results.writing():
        results.begin(again.describe())
    for other in ("o/m", f"o/n@{COMMITS[1]}", nano.NAME):
        assert continued(sweep(other), results).settings.model == other
    monkeypatch.setattr(models, "_fetch_small", unreachable)
    again = plan(continued(sweep("o/n"), results))
    assert [job.cell.key for job in again.jobs] == [job.cell.key for job in planned.jobs]


def test_on_a_cluster_a_model_needs_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_fetch_small", unreachable)
    with pytest.raises(ModelError, match="cannot be reached; or name the commit: --set model=o/n@COMMIT"):
        run_sweep(sweep("o/n"), tmp_path / "out", RunOptions(executor="ray"))
    assert not (tmp_path / "out").exists()
    assert grid._checked_jobs(plan(sweep(f"o/n@{COMMITS[0]}")), Results(tmp_path / "out"), RunOptions(executor="ray"))


def unreachable(name: str) -> str:
    raise ModelError("the hub cannot be reached")


def test_a_commit_that_is_named_gives_the_same_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at(COMMITS[0], tmp_path, monkeypatch)
    assert plan(sweep("o/n")).jobs[0].cell.key == plan(sweep(f"o/n@{COMMITS[0]}")).jobs[0].cell.key


def test_of_a_model_that_cannot_be_had_no_commit_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_fetch_small", unreachable)
    assert plan(sweep("o/n")).jobs[0].cell.settings["model_revision"] is None
