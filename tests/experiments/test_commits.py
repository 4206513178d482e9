"""A model of the hub that moves to another commit between two runs: cells of two models are never in one folder."""

from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
from safetensors.torch import save_file

from baselines import nano as nano_dinov2
from baselines.backbone import load as load_backbone
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


SMALL, TINY = "vit_small_patch14_dinov2.lvd142m", "vit_tiny_patch16_224.augreg_in21k"


def timm_hub(home: Path, name: str, commit: str) -> Path:
    """A hub's cache whose `main` of a model of timm is at this commit; where its files lie."""
    folder = home / f"models--timm--{name}"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    (snapshot / "config.json").write_text("{}", encoding="utf-8")
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs/main").write_text(commit, encoding="utf-8")
    return snapshot


def backbones(*names: str) -> Sweep:
    fields = {"datasets": ("digits",), "methods": ("dinov2-logreg", "pixel-knn"), "shots": (1,), "seeds": (0,)}
    return load("demo", fields, {"backbone": names})


def test_backbones_of_the_hub_are_at_one_commit_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit is part of the key and of the folder, which goes on with it; the command of a report names it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home := tmp_path / "cache"))
    names = SMALL, nano_dinov2.NAME
    timm_hub(home, SMALL, COMMITS[0])
    planned, results = plan(backbones(*names)), Results(tmp_path / "out")
    heads = [job for job in planned.jobs if job.cell.method == "dinov2-logreg"]
    assert [job.settings.backbone for job in heads] == [f"{names[0]}@{COMMITS[0]}", names[1]]
    recorded = [(job.cell.settings["backbone"], job.cell.settings["backbone_revision"]) for job in heads]
    assert recorded == [(names[0], COMMITS[0]), (names[1], nano_dinov2.REVISION)]
    assert f"--backbone {names[0]}@{COMMITS[0]} --backbone {names[1]}" in command(planned.describe())
    with results.writing():
        results.begin(planned.describe())
        (tmp_path / "out/cells.jsonl").touch()
    timm_hub(home, SMALL, COMMITS[1])
    newer, again = plan(backbones(*names)), plan(continued(backbones(*names), results))
    assert [job.cell.key for job in again.jobs] == [job.cell.key for job in planned.jobs]
    changed = {a.cell.key for a in newer.jobs} ^ {b.cell.key for b in planned.jobs}
    assert len(changed) == 2  # the one backbone's cell, at each commit
    with results.writing(), pytest.raises(ResultsError, match="backbone_revision"):
        results.begin(newer.describe())


def test_a_pinned_backbone_is_loaded_from_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which commit's file timm reads; and a cache that lacks the commit is an error, not another commit's weights."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    module = timm.create_model(TINY, pretrained=False)
    for number, commit in enumerate(COMMITS):
        module.cls_token.data.fill_(number)
        save_file(module.state_dict(), timm_hub(tmp_path, TINY, commit) / "model.safetensors")
    for number, commit in enumerate(COMMITS):
        assert float(load_backbone(f"{TINY}@{commit}").module.cls_token.mean()) == number
    with pytest.raises(ModelError, match="cannot load model"):
        load_backbone(f"{TINY}@{'c' * 40}")
