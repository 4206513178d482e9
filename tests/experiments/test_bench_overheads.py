"""The benchmarks of the server and of sweeps, on small ones: what they measure, and what ends them."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.bench import overheads
from experiments.bench.harness import finish
from experiments.sweep import methods, workers
from experiments.sweep.methods import METHODS, Outcome, Task
from experiments.sweep.workers import call
from kshot.errors import KshotError


@pytest.fixture
def small(photos: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A sweep of seconds, run here."""

    def here(run: Callable[[Any], Any], jobs: Sequence[Any], *_: Any, first: Sequence[Any] = (), **__: Any) -> Any:
        yield from ((job, call(run, job)) for job in (*first, *jobs))

    methods.connected.cache_clear()  # workers would be new: none would know another cache
    monkeypatch.setattr(workers, "local", here)
    monkeypatch.setattr(overheads, "CLASSES", 3)
    grid = {"datasets": (f"folder:{photos}",), "methods": ("pixel-knn",), "shots": (1,), "seeds": (0,)}
    monkeypatch.setattr(overheads, "QUICK", (grid, {"limit_test": 4}))
    yield
    methods.connected.cache_clear()


@pytest.mark.usefixtures("small")
def test_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finish(overheads.measure_sweep(True, lambda *_: 1.5), tmp_path / "sweep.json")
    record = json.loads((tmp_path / "sweep.json").read_text())
    rows = {row["name"]: row["median"] for row in record["rows"]}
    photographs = 3 * overheads.SHOTS
    assert rows["images through the tower, first seed"] == 2 * photographs + 3 * 2  # mirrored twins; two to test on
    assert record["ratios"]["second_seed_vision_forwards"] == 0
    assert record["ratios"]["plan_over_measured"] == pytest.approx(1.5 / rows["the sweep's time, 2 workers"])
    assert "second_seed_vision_forwards" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_a_cell_that_fails_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Task) -> Outcome:
        raise ValueError("no")

    monkeypatch.setitem(METHODS, "vlm-lora", replace(METHODS["vlm-lora"], run=fail))
    with pytest.raises(KshotError, match=r"vlm-lora on folder:.*, 4 shots, seed 0 failed: ValueError: no"):
        overheads.measure_sweep(True, lambda *_: 1.5)


@pytest.mark.slow
def test_the_times_are_those_of_a_server(tmp_path: Path) -> None:
    with overheads.server(tmp_path) as address:
        rows, ratios = overheads.one_by_one(address, 2)
        more, together = overheads.together(address, 2)
    assert len({row["name"] for row in rows}) == len(rows)
    medians = {row["name"]: row["median"] for row in rows}
    spent = {row["name"]: (row["median"], row["engine_ms"]) for row in rows if "engine_ms" in row}
    assert len(spent) == 4
    assert all(whole > 0 and engine >= 0 for whole, engine in spent.values())
    assert spent[f"forward_backward of {overheads.BATCH}"][1] > 0
    assert ratios["overhead_ms"] == max(value for name, value in medians.items() if "beyond" in name)
    assert 0 < more[0]["engine_s"] < more[0]["median"]
    assert 0 < together["engine_share"] < 1
