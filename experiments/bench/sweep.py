"""`kshot bench sweep`: what is shared between cells and workers, and whether the plan told the time.

Each sweep has a cache of its own that begins empty. The time of a sweep is that of its cells and of what they share:
reading the data before it is not in the plan's either, and drawing the report is nobody's time. Images that went
through the vision tower are counted by the files of features that are new, whoever made them.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from experiments.bench.data import GRAINS, encoded
from experiments.bench.harness import FOLDER, finish, quiet, result, row
from experiments.bench.train_case import NAMES, SIZES
from experiments.plan.estimate import estimate, of_jobs
from experiments.sweep.config import Sweep, load
from experiments.sweep.grid import Plan, execute, plan
from experiments.sweep.store import Results
from experiments.sweep.workers import Failure
from kshot.errors import KshotError

QUICK = {"shots": (1, 2), "seeds": (0,)}, {"views_per_class": 16, "limit_test": 60}  # of the demo
WORKERS = 2
CLASSES, SHOTS = 8, 4  # of the set whose seeds all draw the same images
PACKAGES = ("numpy", "peft", "scikit-learn", "timm", "torch", "transformers")


def bench(quick: bool, json_path: Path | None) -> None:
    """Measure, print the table and write the JSON file (default results/bench/sweep.json). Raises KshotError where a
    cell fails, ResultsError."""
    finish(measure(quick), json_path or FOLDER / "sweep.json")


def measure(quick: bool) -> dict[str, Any]:
    """The record of `experiments.bench.harness`."""
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        seeds = _second_seed(place / "seeds")
        sweep = load("demo", *(QUICK if quick else ({}, {})))
        told = _told(sweep, place)
        whole = _seconds(sweep, place / "whole", WORKERS)
        part = sweep.model_copy(update={"seeds": (0,)})
        took = {n: _seconds(part, place / f"{n}", n) for n in ([] if quick else (1, WORKERS))}
    rows = [
        row("images through the tower, first seed", [seeds[0]], "images", classes=CLASSES, shots=SHOTS),
        row("images through the tower, second seed on the same images", [seeds[1]], "images"),
        row("the plan's time", [told], "s", cells=len(plan(sweep).jobs)),
        row(f"the sweep's time, {WORKERS} workers", [whole.all], "s"),
        *(row(f"one seed, {_named(n)}", [each.all], "s") for n, each in took.items()),
        *(row(f"of it after the first job, {_named(n)}", [each.working], "s") for n, each in took.items()),
    ]
    ratios = {"second_seed_vision_forwards": float(seeds[1]), "plan_over_measured": told / whole.all}
    if not quick:
        ratios["one_worker_over_two"] = took[1].working / took[WORKERS].working
        ratios["one_worker_over_two_with_start"] = took[1].all / took[WORKERS].all
    return result(rows, ratios, PACKAGES)


class Took(NamedTuple):
    """Seconds of a sweep: of all of it, and from the end of its first job on, when every worker has started."""

    all: float
    working: float


def _named(workers: int) -> str:
    return "one worker" if workers == 1 else f"{workers} workers"


def _told(sweep: Sweep, place: Path) -> float:
    """Seconds that the plan says."""
    with _cache(place / "plan"):
        planned = plan(sweep)
        found = estimate(of_jobs(planned.jobs, planned.datasets), place / "out", WORKERS)
    if found.spent is None:
        raise KshotError(f"the plan tells no time: {found.no_time}")
    return found.spent.total


def _seconds(sweep: Sweep, place: Path, workers: int) -> Took:
    with _cache(place / "cache"):
        planned = plan(sweep)
        start = perf_counter()
        first = _run(planned, place / "out", workers)
        end = perf_counter()
        return Took(end - start, end - first)


def _second_seed(place: Path) -> tuple[int, int]:
    """Images that two seeds sent through the tower, one after the other. As many images a class as shots: they draw the
    same ones."""
    _write(place / "photographs")
    small = {"views_per_class": 8, "batch_size": 8, "answer_tokens": 16}
    once = load("demo", {"datasets": (f"folder:{place / 'photographs'}",), "methods": ("vlm-lora",), **_grid(0)}, small)
    twice = once.model_copy(update={"seeds": (0, 1)})
    with _cache(place / "cache") as features:
        counts = [0]
        for sweep in (once, twice):
            _run(plan(sweep), place / "out", 2)
            counts.append(len([*features.rglob("*.safetensors")]))
    return counts[1] - counts[0], counts[2] - counts[1]


def _grid(seed: int) -> dict[str, Any]:
    return {"shots": (SHOTS,), "seeds": (seed,)}


def _write(place: Path) -> None:
    """Class folders of made photographs, split by folder."""
    rng = np.random.default_rng(0)
    for split, count in (("train", SHOTS), ("test", 2)):
        for name in NAMES[:CLASSES]:
            folder = place / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                image = encoded(rng, SIZES[number % len(SIZES)], GRAINS[""])
                (folder / f"{number}.jpg").write_bytes(image)


def _run(planned: Plan, folder: Path, workers: int) -> float:
    """All cells that the folder lacks; when the first job was done. Raises KshotError for one that fails."""
    results, done = Results(folder), list[float]()
    with results.writing():
        results.begin(planned.describe())
        for job, failure in execute(planned, results, planned.missing(results), workers=workers):
            done.append(perf_counter())
            if isinstance(failure, Failure):
                raise KshotError(f"{job} failed: {failure.message}")
    return done[0]


@contextmanager
def _cache(folder: Path) -> Iterator[Path]:
    """kshot's cache in this folder, for this process and its workers; gives where image features are in it."""
    before = os.environ.get("KSHOT_CACHE")
    os.environ["KSHOT_CACHE"] = str(folder)
    try:
        yield folder / "vision"
    finally:
        del os.environ["KSHOT_CACHE"]
        os.environ.update({} if before is None else {"KSHOT_CACHE": before})
