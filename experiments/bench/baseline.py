"""`kshot bench baseline`: the heads of a whole comparison from cached features, and how fast features are made.

The grid is run as a sweep runs it, by worker processes with one thread each; its seconds are from the first start of a
worker to the last score. Beside it each head meets the usual library's on the same features, in turn, on the threads of
this process, and an encoder, from the bytes of photographs to features, meets the bare forward pass of its backbone on
pixels that are ready.

TODO The grid of `kshot bench baseline`: four data sets' worth of features, made from a seed, and the cells on them.

Features are Gaussian classes with the spectrum of natural ones, as many as the real sets have images and as wide as
DINOv2-base's: how long heads take depends on sizes and on how hard the classes are to part, not on whose features these
are. Accuracies on them say nothing but that something was learnt.
TODO The heads of `kshot bench baseline` against scikit-learn's, on the same made features, in turn.

A head of ours includes what it chooses on its shots; scikit-learn's neighbours and means are told what was chosen, its
ridge chooses among the same penalties by its own leave-one-out.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from sklearn.linear_model import LogisticRegression, RidgeClassifierCV
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.preprocessing import StandardScaler, normalize

from baselines.heads import HEADS, Head
from baselines.heads.knn import TEMPERATURE
from baselines.heads.linear import C
from baselines.heads.ridge import PENALTIES
from data.benchmarks.layouts import CARS
from data.catalog import DATASETS
from experiments.bench import features
from experiments.bench.harness import FOLDER, finish, in_turn, quiet, result, row
from experiments.sweep import workers
from kshot.errors import KshotError

# ---- The grid of `kshot bench baseline`: four data sets' worth of features, made from a seed, and the cells on them.

DIM = 768  # of DINOv2-base
SPREAD = 3.0  # of the images of a class, in units of that of the classes: accuracy at one shot is far from 0 and 1
SEED = 0


class Size(NamedTuple):
    """A data set's numbers of classes and images, and the shots of the blog's sweep on it."""

    classes: int
    train: int
    test: int
    shots: tuple[int, ...]


def _size(name: str, classes: int, shots: tuple[int, ...] = (1, 2, 4, 8, 16)) -> Size:
    return Size(classes, DATASETS[name].train, DATASETS[name].test, shots)


SIZES = {
    "caltech101": _size("caltech101", 102),
    "cars": _size("cars", len(CARS)),
    "flowers": _size("flowers", 102, (1, 2, 4, 8, 10)),  # ten training images a class are all that there are
    "pets": _size("pets", 37),
}


class Problem(NamedTuple):
    """Features (N, DIM) float32 and labels (N,) of two splits."""

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray


@dataclass(frozen=True)
class Cell:
    """A head on k shots of a data set. folder: where `write` put the features."""

    folder: Path
    dataset: str
    shots: int
    seed: int
    head: str


class Ran(NamedTuple):
    """seconds: to fit the head and score all test images, on one thread."""

    seconds: float
    accuracy: float


def write(folder: Path, sizes: Mapping[str, Size]) -> None:
    """Make the features of every set and put them into files: what an encoder's cache would hold."""
    for number, (name, size) in enumerate(sizes.items()):
        made = _made(size, np.random.default_rng((SEED, number)))
        safetensors.numpy.save_file(made._asdict(), folder / f"{name}.safetensors")


def cells(folder: Path, sizes: Mapping[str, Size], seeds: int, heads: Mapping[str, object]) -> Iterator[Cell]:
    """Every data set x shots x seed x head, the long ones first."""
    grid = [(name, k) for name, size in sizes.items() for k in size.shots]
    grid.sort(key=lambda each: -each[1] * sizes[each[0]].classes ** 2)
    yield from (Cell(folder, name, k, seed, head) for name, k in grid for seed in range(seeds) for head in heads)


def run(cell: Cell) -> Ran:
    """One cell, in a worker."""
    from baselines.heads import HEADS

    problem = load(cell.folder, cell.dataset)
    chosen = shots_of(problem.train_labels, cell.shots, cell.seed)
    train, labels = problem.train[chosen], problem.train_labels[chosen]
    start = perf_counter()
    scores = HEADS[cell.head].fit(train, labels, SIZES[cell.dataset].classes).scores(problem.test)
    seconds = perf_counter() - start
    return Ran(seconds, float((scores.argmax(axis=1) == problem.test_labels).mean()))


@lru_cache(maxsize=1)
def load(folder: Path, dataset: str) -> Problem:
    """The features of a set."""
    return Problem(**safetensors.numpy.load_file(folder / f"{dataset}.safetensors"))


def shots_of(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """The numbers of `shots` images of every class."""
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels)
    starts = counts.cumsum() - counts
    return np.concatenate([by_class[start : start + shots] for start in starts])


def _made(size: Size, rng: np.random.Generator) -> Problem:
    spectrum = (1 / np.sqrt(np.arange(1, DIM + 1))).astype(np.float32)
    mix = np.linalg.qr(rng.standard_normal((DIM, DIM), dtype=np.float32))[0]
    centres = rng.standard_normal((size.classes, DIM), dtype=np.float32)

    def split(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % size.classes
        noise = SPREAD * rng.standard_normal((count, DIM), dtype=np.float32)
        return np.ascontiguousarray(((centres[labels] + noise) * spectrum) @ mix), labels

    return Problem(*split(size.train), *split(size.test))


# ---- The heads of `kshot bench baseline` against scikit-learn's, on the same made features, in turn.

ON = ("cars", 4)  # data set and shots
ON_QUICK = ("pets", 2)
AGREE = 0.99  # of predictions, at least
TOLERANCE = 1e-6  # of scikit-learn's logistic regression: at its default, 1e-4, it stops long before the optimum

Labels = np.ndarray
Peer = Callable[[np.ndarray, Labels, np.ndarray, Any], Labels]  # train, labels, test, what ours chose → predictions


def _scaled(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scaler = StandardScaler().fit(train.astype(np.float64))
    return scaler.transform(train.astype(np.float64)), scaler.transform(test.astype(np.float64))


def _logreg(train: np.ndarray, labels: Labels, test: np.ndarray, chosen: Any) -> Labels:
    scaled, asked = _scaled(train, test)
    found: Labels = LogisticRegression(C=C, tol=TOLERANCE, max_iter=10_000).fit(scaled, labels).predict(asked)
    return found


def _ridge(train: np.ndarray, labels: Labels, test: np.ndarray, chosen: Any) -> Labels:
    scaled, asked = _scaled(train, test)
    found: Labels = RidgeClassifierCV(np.array(PENALTIES) * DIM, scoring="accuracy").fit(scaled, labels).predict(asked)
    return found


def _knn(train: np.ndarray, labels: Labels, test: np.ndarray, chosen: Any) -> Labels:
    n = chosen["neighbours"]
    model = KNeighborsClassifier(n, metric="cosine", weights=lambda d: np.exp((1 - d) / TEMPERATURE))
    found: Labels = model.fit(train, labels).predict(test)
    return found


def _mean(train: np.ndarray, labels: Labels, test: np.ndarray, chosen: Any) -> Labels:
    """In a cosine space: the mean of unit vectors, then the nearest by angle, as scikit-learn has no centroid of it."""
    if chosen["space"] == "euclidean":
        found: Labels = NearestCentroid().fit(train, labels).predict(test)
        return found
    centre = train.mean(axis=0) if chosen["space"] == "centred cosine" else 0.0
    units, asked = normalize(train - centre), normalize(test - centre)
    centroids = normalize(NearestCentroid().fit(units, labels).centroids_)
    nearest: Labels = (asked @ centroids.T).argmax(axis=1)
    return nearest


PEERS: dict[str, Peer] = {"logreg": _logreg, "ridge": _ridge, "knn": _knn, "mean": _mean}


def measure_heads(folder: Path, quick: bool) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of seconds and of agreement, and scikit-learn's seconds over ours for each head. Raises KshotError where
    predictions differ: speed bought with errors."""
    (dataset, shots), rounds = (ON_QUICK if quick else ON), 1 if quick else 3
    problem, n_classes = load(folder, dataset), SIZES[dataset].classes
    chosen = shots_of(problem.train_labels, shots, seed=0)
    train, labels, test = problem.train[chosen], problem.train_labels[chosen], problem.test
    rows, ratios = [], {}
    for name, head in HEADS.items():
        told, kept = head.fit(train, labels, n_classes).chosen, dict[str, Labels]()
        ours = partial(_ours, head, train, labels, test, n_classes)
        peer = partial(PEERS[name], train, labels, test, told)
        spent = in_turn({"ours": _keeping(kept, "ours", ours), "peer": _keeping(kept, "peer", peer)}, rounds)
        agree = float((kept["ours"] == kept["peer"]).mean())
        if agree < AGREE:
            raise KshotError(f"{name}: {100 * agree:.2f}% of predictions are scikit-learn's: nothing to compare")
        facts = {"dataset": dataset, "shots": shots, "chosen": dict(told), "agree": agree}
        rows += [row(f"{name}, kshot", spent["ours"], "s", **facts), row(f"{name}, scikit-learn", spent["peer"], "s")]
        ratios[f"{name}_vs_sklearn"] = median(b / a for a, b in zip(spent["ours"], spent["peer"], strict=True))
    return rows, ratios


def _ours(head: Head, train: np.ndarray, labels: Labels, test: np.ndarray, n_classes: int) -> Labels:
    found: Labels = head.fit(train, labels, n_classes).scores(test).argmax(axis=1)
    return found


def _keeping(kept: dict[str, Labels], name: str, run: Callable[[], Labels]) -> Callable[[], None]:
    def task() -> None:
        kept[name] = run()

    return task


# ---- `kshot bench baseline`: the heads of a whole comparison from cached features, and how fast features are made.

SEEDS = 5
QUICK = {name: SIZES[name]._replace(shots=SIZES[name].shots[:3]) for name in ("flowers", "pets")}
PACKAGES = ("numpy", "pillow", "scikit-learn", "scipy", "timm", "torch")


def bench(root: Path | None, quick: bool, json_path: Path | None, device: str = "cpu", model: str = "") -> None:
    """Measure, print the table and write the JSON file (default results/bench/baseline.json). Raises as `measure`
    does, and ResultsError."""
    finish(measure(root, quick, device, model), json_path or FOLDER / "baseline.json")


def measure(root: Path | None, quick: bool, device: str = "cpu", model: str = "") -> dict[str, Any]:
    """The record of `experiments.bench.harness`. root: a folder of class folders; None: photographs made here, from a seed.

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
        more, ratios = measure_heads(place, quick)
        grid, seconds = _grid(place, sizes, 1 if quick else SEEDS)
    ratios = {"grid_seconds": seconds, "feature_rate_share": share, **ratios}
    return result([*grid, *more, *rows], ratios, PACKAGES)


def _grid(folder: Path, sizes: Mapping[str, Size], seeds: int) -> tuple[list[dict[str, Any]], float]:
    """Rows of the grid and its seconds."""
    jobs = list(cells(folder, sizes, seeds, HEADS))
    start = perf_counter()
    done = list(workers.results(workers.local(run, jobs)))
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
