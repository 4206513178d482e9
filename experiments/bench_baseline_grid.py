"""The grid of `kshot bench baseline`: four data sets' worth of features, made from a seed, and the cells on them.

Features are Gaussian classes with the spectrum of natural ones, as many as the real sets have images and as wide as
DINOv2-base's: how long heads take depends on sizes and on how hard the classes are to part, not on whose features these
are. Accuracies on them say nothing but that something was learnt.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
import safetensors.numpy

from data.catalog import DATASETS
from data.class_names import CARS

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
