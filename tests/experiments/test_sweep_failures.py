"""Cells that fail: noted with their error, tried again when asked for, and no reason to stop the others."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.sweep import methods
from experiments.sweep.cells import Job
from experiments.sweep.config import RunOptions, load
from experiments.sweep.grid import gpus_of, run_sweep
from experiments.sweep.methods import METHODS, Outcome, Task
from kshot.errors import InputError

QUICK = ("--method", "pixel-knn", "--method", "dinov2-logreg", "--shots", "1,2", "--seeds", "0")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception | None], None]:
    """Lets pixel-knn fail at two shots, or not any more."""
    whole = METHODS["pixel-knn"]

    def set_to(error: Exception | None) -> None:
        def run(task: Task) -> Outcome:
            if error is not None and len(task.train) == 6:  # two shots of three classes
                raise error
            return whole.run(task)

        monkeypatch.setitem(METHODS, "pixel-knn", replace(whole, run=run))

    return set_to


@pytest.fixture
def sweep(photos: Path, tmp_path: Path, kshot: Any) -> Callable[..., Any]:
    return lambda *more: kshot(
        "sweep", "demo", "--dataset", f"folder:{photos}", *QUICK, "--out", tmp_path / "out", *more
    )


def test_a_failed_cell_is_noted_and_tried_again_and_the_others_run(
    sweep: Any, broken: Any, ran: list[Job], tmp_path: Path
) -> None:
    broken(ZeroDivisionError("by 0"))
    ended = sweep()
    assert ended.status == 1
    assert len(ran) == 4
    (path,) = (tmp_path / "out/failed").glob("*.json")
    noted = json.loads(path.read_text())
    assert (noted["method"], noted["shots"], noted["error"]) == ("pixel-knn", 2, "ZeroDivisionError: by 0")
    assert "test_sweep_failures" in noted["trace"]
    assert len([*(tmp_path / "out/cells").glob("*.json")]) == 3
    last = ended.err.splitlines()[-1]
    assert noted["exit_status"] == 1
    assert last.startswith("kshot: 1 of 4 cells failed, first pixel-knn on folder:")
    assert "2 shots, seed 0: ZeroDivisionError: by 0 (the same command tries them again, and --only-failed" in last
    assert (tmp_path / "out/report.html").exists()
    broken(None)
    ran.clear()
    assert sweep().status == 0  # the same command
    assert [(job.cell.method, job.cell.shots) for job in ran] == [("pixel-knn", 2)]


def test_only_failed_runs_those_alone(sweep: Any, broken: Any, ran: list[Job], tmp_path: Path) -> None:
    broken(InputError("no"))
    assert sweep().status == 2
    (tmp_path / "out/cells" / f"{next(job for job in ran if 'dinov2' in str(job)).cell.key}.json").unlink()
    ran.clear()
    assert sweep("--only-failed").status == 2  # still
    assert [job.cell.shots for job in ran] == [2]
    broken(None)
    assert sweep("--only-failed").status == 0
    assert [str(job.cell.method) for job in ran] == ["pixel-knn"] * 2
    assert not [*(tmp_path / "out/failed").glob("*.json")]
    assert "no cell has failed" in sweep("--only-failed").err
    ran.clear()
    assert sweep().status == 0
    assert [job.cell.method for job in ran] == ["dinov2-logreg"]


def test_a_damaged_note_of_a_failure_is_set_aside(sweep: Any, broken: Any, ran: list[Job], tmp_path: Path) -> None:
    broken(InputError("no"))
    assert sweep().status == 2
    (path,) = (tmp_path / "out/failed").glob("*.json")
    path.write_bytes(b"")
    broken(None)
    ran.clear()
    assert "no cell has failed" in sweep("--only-failed").err
    assert not path.exists()
    assert not ran
    assert sweep().status == 0
    assert [job.cell.method for job in ran] == ["pixel-knn"]


def test_a_second_seed_on_the_same_images_needs_no_vision_forward(
    photos: Path, tmp_path: Path, kshot: Any, ran: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight training images a class and eight shots: all seeds draw the same ones."""
    monkeypatch.setenv("KSHOT_CACHE", str(tmp_path / "cache"))
    methods.connected.cache_clear()
    small = ("--set", "views_per_class=4", "--set", "batch_size=4", "--set", "rank=4", "--set", "answer_tokens=4")
    arguments = ("sweep", "demo", "--dataset", f"folder:{photos}", "--method", "vlm-lora", "--shots", "8", *small)
    for seeds in ("0", "0,1"):
        before = methods.tower_forwards(ran[0].settings, "cpu") if ran else 0
        assert kshot(*arguments, "--seeds", seeds, "--out", tmp_path / "out").status == 0
        spent = methods.tower_forwards(ran[0].settings, "cpu") - before
        assert spent == (2 * 24 + 6 if seeds == "0" else 0)  # each training image also mirrored
    methods.connected.cache_clear()
    records = [json.loads(path.read_text()) for path in (tmp_path / "out/cells").glob("*.json")]
    assert [record["work"] for record in records] == [{"vision_forwards": 0}] * 2


@pytest.mark.parametrize(
    ("device", "visible", "gpus"),
    [("cpu", "", ()), ("cuda", "", ("0", "1", "2")), ("cuda:1", "", ("1",)), ("cuda:1", "4,GPU-7", ("GPU-7",))],
)
def test_the_gpus_that_workers_get(
    device: str, visible: str, gpus: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus_of(device) == gpus
    with pytest.raises(InputError, match="device 'cuda:3' is not available here; give cuda, or cuda:0 to cuda:"):
        gpus_of("cuda:3")


def test_more_workers_than_gpus_is_an_error(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.sweep.grid.gpus_of", lambda *_, **__: ("0",))
    sweep = load("demo", {"datasets": (f"folder:{photos}",), "shots": (1,)}, {})
    with pytest.raises(InputError, match="--workers 2, but GPUs: 1, and each worker takes one"):
        run_sweep(sweep, tmp_path, RunOptions(workers=2))
