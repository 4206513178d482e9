"""`kshot bench baseline`: the heads of a whole comparison from cached features, and how fast features are made.

The grid is run as a sweep runs it, by worker processes with one thread each; its seconds are from the first start of a
worker to the last score. Beside it each head meets the usual library's on the same features, in turn, on the threads of
this process, and an encoder, from the bytes of photographs to features, meets the bare forward pass of its backbone on
pixels that are ready.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

from baselines.heads import HEADS
from experiments import bench_baseline_features as features
from experiments import bench_baseline_peers as peers
from experiments import executors
from experiments.bench import FOLDER, finish, result, row
from experiments.bench_baseline_grid import DIM, SIZES, Ran, Size, cells, run, write
from experiments.bench_train_children import quiet

SEEDS = 5
QUICK = {name: SIZES[name]._replace(shots=SIZES[name].shots[:3]) for name in ("flowers", "pets")}
PACKAGES = ("numpy", "pillow", "scikit-learn", "scipy", "timm", "torch")


def bench(root: Path | None, quick: bool, json_path: Path | None, device: str = "cpu", model: str = "") -> None:
    """Measure, print the table and write the JSON file (default results/bench/baseline.json). Raises as `measure`
    does, and ResultsError."""
    finish(measure(root, quick, device, model), json_path or FOLDER / "baseline.json")


def measure(root: Path | None, quick: bool, device: str = "cpu", model: str = "") -> dict[str, Any]:
    """The record of `experiments.bench`. root: a folder of class folders; None: photographs made here, from a seed.

    model: the backbone; "" is DINOv2-small's shape (quick) or DINOv2-base's with random weights.
    Raises InputError for a device that cannot be; ModelError for the model; DatasetError; KshotError where a head and
    its peer disagree.
    """
    quiet()
    rows, share = features.measure(root, quick, device, model)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        sizes = QUICK if quick else SIZES
        write(place, sizes)
        more, ratios = peers.measure(place, quick)
        grid, seconds = _grid(place, sizes, 1 if quick else SEEDS)
    ratios = {"grid_seconds": seconds, "feature_rate_share": share, **ratios}
    return result([*grid, *more, *rows], ratios, PACKAGES)


def _grid(folder: Path, sizes: Mapping[str, Size], seeds: int) -> tuple[list[dict[str, Any]], float]:
    """Rows of the grid and its seconds."""
    jobs = list(cells(folder, sizes, seeds, HEADS))
    start = perf_counter()
    done = list(executors.results(executors.local(run, jobs)))
    seconds = perf_counter() - start
    facts: dict[str, Any] = {
        "cells": len(jobs),
        "dim": DIM,
        "train": _most(sizes, "train"),
        "test": _most(sizes, "test"),
    }
    rows = [row("grid of heads", [seconds], "s", **facts)]
    for head in HEADS:
        ran: list[Ran] = [outcome for cell, outcome in done if cell.head == head]
        spent = [each.seconds for each in ran]
        facts = {"sum": sum(spent), "longest": max(spent), "mean_accuracy": mean(each.accuracy for each in ran)}
        rows.append(row(f"{head}, a cell on one thread", [median(spent)], "s", cells=len(ran), **facts))
    return rows, seconds


def _most(sizes: Mapping[str, Size], split: str) -> int:
    return max(getattr(size, split) for size in sizes.values())
