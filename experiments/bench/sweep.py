"""`kshot bench sweep`: what is shared between cells and workers, and whether the plan's time is right.

Each sweep has a cache of its own that begins empty. The time of a sweep is that of its cells and of what they share:
reading the data before it is not in the plan's either, and the report is not drawn. Images that went through the vision
tower are counted by the files of features that are new, whichever process made them.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from experiments.bench.case import GRAIN, NAMES, SIZES, encoded
from experiments.bench.harness import quiet, record, row
from experiments.sweep.cells import Job
from experiments.sweep.config import Sweep, load
from experiments.sweep.grid import Observer, Plan, RunOptions, plan, run_sweep
from experiments.sweep.store import Results
from experiments.sweep.workers import Failure
from kshot.errors import KshotError

QUICK = {"shots": (1, 2), "seeds": (0,)}, {"views_per_class": 16, "limit_test": 60}  # of the demo
WORKERS = 2
CLASSES, SHOTS = 8, 4  # of the set whose seeds all draw the same images
PACKAGES = ("numpy", "peft", "scikit-learn", "timm", "torch", "transformers")

PlanSeconds = Callable[[Plan, Path, int], float]  # the plan, the sweep's folder, workers → the time that is planned


class Clock(Observer):
    """Of a sweep in seconds: all of it, and after its first job, when every worker has started. Raises KshotError for a
    job that fails."""

    def __init__(self) -> None:
        self._first = self.total = self.after_first = 0.0

    @contextmanager
    def running(self, planned: Plan, results: Results, jobs: Sequence[Job]) -> Iterator[None]:
        start = perf_counter()
        yield
        end = perf_counter()
        self.total, self.after_first = end - start, end - self._first

    def finished(self, job: Any, failure: Failure | None, done: int, total: int) -> None:
        self._first = self._first or perf_counter()
        if failure is not None:
            raise KshotError(f"{job} failed: {failure.message}")


def measure(quick: bool, planned_seconds: PlanSeconds) -> dict[str, Any]:
    """The record of `experiments.bench.harness`. Raises KshotError where a cell fails."""
    quiet()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first, second = _images_encoded(folder / "seeds")
        sweep = load("demo", *(QUICK if quick else ({}, {})))
        with _cache(folder / "plan"):
            planned = plan(sweep)
            expected = planned_seconds(planned, folder / "out", WORKERS)
        whole = _run(sweep, folder / "whole", WORKERS)
        one_seed = sweep.model_copy(update={"seeds": (0,)})
        clocks = {n: _run(one_seed, folder / f"{n}", n) for n in ([] if quick else (1, WORKERS))}
    texts = {n: "one worker" if n == 1 else f"{n} workers" for n in clocks}
    rows = [
        row("images through the tower, first seed", [first], "images", classes=CLASSES, shots=SHOTS),
        row("images through the tower, second seed on the same images", [second], "images"),
        row("the plan's time", [expected], "s", cells=len(planned.jobs)),
        row(f"the sweep's time, {WORKERS} workers", [whole.total], "s"),
        *(row(f"one seed, {texts[n]}", [clock.total], "s") for n, clock in clocks.items()),
        *(row(f"of it after the first job, {texts[n]}", [clock.after_first], "s") for n, clock in clocks.items()),
    ]
    ratios = {"second_seed_vision_forwards": float(second), "plan_over_measured": expected / whole.total}
    if not quick:
        ratios["one_worker_over_two"] = clocks[1].after_first / clocks[WORKERS].after_first
        ratios["one_worker_over_two_with_start"] = clocks[1].total / clocks[WORKERS].total
    return record(rows, ratios, PACKAGES)


def _run(sweep: Sweep, folder: Path, workers: int) -> Clock:
    clock = Clock()
    with _cache(folder / "cache"):
        run_sweep(sweep, folder / "out", RunOptions(workers=workers), clock)
    return clock


def _images_encoded(folder: Path) -> tuple[int, int]:
    """Images that two seeds sent through the tower, one after the other. As many images a class as shots: they draw the
    same ones."""
    rng = np.random.default_rng(0)
    for split, count in (("train", SHOTS), ("test", 2)):
        for name in NAMES[:CLASSES]:
            images = folder / "photographs" / split / name
            images.mkdir(parents=True)
            for n in range(count):
                (images / f"{n}.jpg").write_bytes(encoded(rng, SIZES[n % len(SIZES)], GRAIN))
    changes = {"datasets": (f"folder:{folder / 'photographs'}",), "methods": ("vlm-lora",), "shots": (SHOTS,)}
    small = {"views_per_class": 8, "batch_size": 8, "answer_tokens": 16}
    counts = [0]
    for seeds in ((0,), (0, 1)):
        _run(load("demo", {**changes, "seeds": seeds}, small), folder, 2)
        counts.append(len([*(folder / "cache" / "vision").rglob("*.safetensors")]))
    return counts[1] - counts[0], counts[2] - counts[1]


@contextmanager
def _cache(folder: Path) -> Iterator[None]:
    """kshot's cache in this folder, for this process and its workers."""
    before = os.environ.get("KSHOT_CACHE")
    os.environ["KSHOT_CACHE"] = str(folder)
    try:
        yield
    finally:
        del os.environ["KSHOT_CACHE"]
        os.environ.update({} if before is None else {"KSHOT_CACHE": before})
