"""How long a sweep takes: the order of work against brute force, rates from runs of known cost, and a real sweep."""

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest

from experiments.plan.estimate import estimate
from experiments.plan.time import (
    FEW,
    Measurement,
    ProbeResult,
    Rates,
    RunTime,
    fit_rates,
    makespan,
    measure,
    sweep_time,
)
from experiments.sweep import workers as executors
from experiments.sweep.config import RunOptions, load
from experiments.sweep.workload import Workload, of_sweep
from kshot.errors import InputError

TINY = {"views_per_class": 4, "batch_size": 4, "rank": 4}


def by_the_clock(seconds: list[int], workers: int) -> int:
    """Second by second: whoever is free takes the next job."""
    waiting, busy, now = list(seconds), [0] * workers, 0
    while waiting or any(busy):
        busy = [waiting.pop(0) if not left and waiting else left for left in busy]
        busy, now = [max(left - 1, 0) for left in busy], now + 1
    return now


def best(seconds: list[int], workers: int) -> int:
    """The shortest of all ways to share the jobs out."""
    ways = product(range(workers), repeat=len(seconds))
    return min(
        max(sum(s for s, of in zip(seconds, way, strict=True) if of == w) for w in range(workers)) for way in ways
    )


@pytest.mark.parametrize("seed", range(20))
def test_the_first_free_worker_takes_the_next_job(seed: int) -> None:
    rng = np.random.default_rng(seed)
    seconds, workers = rng.integers(1, 9, rng.integers(1, 8)).tolist(), int(rng.integers(1, 4))
    found = makespan(seconds, workers)
    assert found == by_the_clock(seconds, workers)
    assert best(seconds, workers) <= found <= (2 - 1 / workers) * best(seconds, workers)  # Graham's bound
    assert makespan([], workers) == 0


def cost(rates: Rates, *, train: int, test: int, steps: int, encode: bool = False, loads: bool = False) -> RunTime:
    """A run that costs exactly what these rates say."""
    fit = rates.step * steps + rates.fit * train
    predict = test * (rates.scored + rates.encoded * encode)
    answer = test * rates.generated
    return RunTime(fit, predict, answer, 0.0, rates.load * loads + rates.fixed + fit + predict + answer)


@pytest.mark.parametrize(
    "rates",
    [
        Rates(load=5, fixed=0.3, step=0.05, scored=0.002, generated=0.003, encoded=0.01),
        Rates(load=2, fixed=0.1, fit=0.004, scored=0.001, encoded=0.02),
        Rates(load=1, fixed=0.2, scored=0.002, generated=0.01, encoded=0.01),
    ],
    ids=("trained model", "fitted head", "zero-shot"),
)
def test_rates_are_found_again(rates: Rates) -> None:
    small, large = (8, 8) if rates.step else (4, 40) if rates.fit else (0, 0)
    steps = 9 if rates.step else 1
    warm = cost(rates, train=small, test=FEW, steps=1)
    runs = (
        cost(rates, train=small, test=FEW, steps=1, loads=True),
        warm,
        cost(rates, train=large, test=50, steps=1, encode=True),
        cost(rates, train=large, test=50, steps=steps),
    )
    found = fit_rates(*runs, (small, large), 50, steps if rates.step else 0)
    for name, value in vars(rates).items():
        assert getattr(found, name) == pytest.approx(value), name


def test_the_time_of_a_sweep_by_hand(photos: Path) -> None:
    """Three classes, 6 test images, 2 shots: two cells of each method on two workers."""
    grid = {"datasets": (f"folder:{photos}",), "methods": ("vlm-lora", "dinov2-logreg"), "shots": (2,), "seeds": (0, 1)}
    workload = of_sweep(load("demo", grid, TINY))
    source, known = workload.cells[0].source, next(iter(workload.datasets.values()))
    drawn = known.train_count((0, 1), 2, workload.cells[0].settings)
    lora = Rates(load=7, fixed=1, step=2, scored=0.5, generated=0.25, encoded=4)
    head = Rates(load=3, fixed=0.5, fit=0.125, scored=0.0625, encoded=8)
    of = {"vlm-lora": lora, "dinov2-logreg": head}
    rates = {each.variant: of[each.method] for each in workload.cells}
    measured = Measurement(11, {source: ProbeResult(0, 13, 0.5, 0.75, rates, 0)}, 0)
    found = sweep_time(workload, measured, 2)
    assert found.start == 11 + 7 + 3
    assert found.prepare == 13 + 6 * 0.5 + drawn * 0.75
    assert found.encode == ((6 + 2 * drawn) * 4 + (6 + drawn) * 8) / 2
    each = (1 + 3 * 2 + 6 * 0.5 + 6 * 0.25, 0.5 + 6 * 0.125 + 6 * 0.0625)
    assert found.cells == sum(each)  # a long one a worker, then a short one
    assert found.methods == {"vlm-lora": 2 * each[0], "dinov2-logreg": 2 * each[1]}
    assert found.total == found.start + found.prepare + found.encode + found.cells


@pytest.fixture
def workload(photos: Path) -> Workload:
    return of_sweep(load("demo", {"datasets": (f"folder:{photos}",), "methods": ("pixel-knn",)}, TINY))


def test_what_workers_see_is_averaged(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = workload.cells[0].variant

    def local(run: Any, jobs: list[Any], workers: int, **_: Any) -> Iterator[Any]:
        assert len(jobs) == workers == 2
        (source,) = workload.datasets
        for n, job in enumerate(jobs, 1):
            yield job, {source: ProbeResult(1e12 + n, n, n, n, {variant: Rates(fixed=n)}, n)}

    monkeypatch.setattr(executors, "local", local)
    found = measure(workload, 2)
    (result,) = found.results.values()
    assert (result.data, result.prepared, result.mirrored) == (1.5, 1.5, 1.5)
    assert result.rates == {variant: Rates(fixed=1.5)}
    assert found.peak == 2


@pytest.mark.usefixtures("ran")
def test_a_measurement_that_fails_says_why(workload: Workload) -> None:
    cells = [cell._replace(source="folder:gone") for cell in workload.cells]
    gone = Workload(cells, {"folder:gone": next(iter(workload.datasets.values()))})
    with pytest.raises(InputError, match="gone is not a folder"):
        measure(gone, 1)


@pytest.mark.slow
def test_a_sweep_takes_what_was_said(
    tmp_path: Path, kshot: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first file to the last cell, on two workers. Other work on the machine changes by the minute: so it is
    estimated before and after."""
    monkeypatch.setenv("KSHOT_CACHE", str(tmp_path / "cache"))
    workload = of_sweep(load("demo", {"shots": (1, 4)}, {}))

    def planned_seconds() -> float:
        found = estimate(workload, tmp_path / "none", RunOptions(workers=2)).time
        assert found is not None
        return found.total

    before, out = planned_seconds(), tmp_path / "out"
    assert kshot("sweep", "demo", "--shots", "1,4", "--workers", "2", "--out", out).status == 0
    after = planned_seconds()
    took = max(path.stat().st_mtime for path in out.glob("cells/*.json")) - (out / "sweep.json").stat().st_mtime
    assert mean((before, after)) == pytest.approx(took, rel=0.3), (before, took, after)
