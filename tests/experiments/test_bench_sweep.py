"""The benchmark of sweeps on one small enough for a test: what it counts, and that a cell that fails ends it."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.bench import sweep
from experiments.bench.harness import finish
from experiments.sweep import methods, workers
from experiments.sweep.methods import METHODS, Outcome, Task
from experiments.sweep.workers import call
from kshot.errors import KshotError


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run here."""

    def here(run: Callable[[Any], Any], jobs: Sequence[Any], *_: Any, first: Sequence[Any] = (), **__: Any) -> Any:
        yield from ((job, call(run, job)) for job in (*first, *jobs))

    methods.connected.cache_clear()  # workers would be new: none would know another cache
    monkeypatch.setattr(workers, "local", here)
    monkeypatch.setattr(sweep, "CLASSES", 3)
    monkeypatch.setattr(sweep, "QUICK", ({"shots": (1,), "seeds": (0,), "methods": ("pixel-knn",)}, {"limit_test": 4}))
    yield
    methods.connected.cache_clear()


@pytest.mark.usefixtures("small")
def test_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finish(sweep.measure(True, lambda *_: 1.5), tmp_path / "sweep.json")
    record = json.loads((tmp_path / "sweep.json").read_text())
    rows = {row["name"]: row["median"] for row in record["rows"]}
    photographs = 3 * sweep.SHOTS
    assert rows["images through the tower, first seed"] == 2 * photographs + 3 * 2  # mirrored twins; two to test on
    assert record["ratios"]["second_seed_vision_forwards"] == 0
    assert record["ratios"]["plan_over_measured"] == pytest.approx(1.5 / rows["the sweep's time, 2 workers"])
    assert "second_seed_vision_forwards" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_a_cell_that_fails_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Task) -> Outcome:
        raise ValueError("no")

    monkeypatch.setitem(METHODS, "pixel-knn", replace(METHODS["pixel-knn"], run=fail))
    with pytest.raises(KshotError, match="pixel-knn on icons, 1 shots, seed 0 failed: ValueError: no"):
        sweep.measure(True, lambda *_: 1.5)
