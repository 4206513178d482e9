"""The grid of `kshot bench baseline`: four data sets' worth of features, made from a seed, and the cells on them.

Its workers import this module alone, which is light: other parts would take them seconds that are none of the heads'.
"""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy

from baselines.heads import HEADS, Head
from data.benchmarks.layouts import CARS
from data.catalog import DATASETS
from experiments.bench.harness import timed

DIM = 768  # of DINOv2-base
SPREAD = 3.0  # of the images of a class, in units of that of the classes: accuracy at one shot is far from 0 and 1


class Size(NamedTuple):
    """A data set's numbers of classes and images, and the shots of the blog's sweep on it."""

    classes: int
    train: int
    test: int
    shots: tuple[int, ...]


SHOTS = (1, 2, 4, 8, 16)
CLASSES = {"caltech101": 102, "cars": len(CARS), "flowers": 102, "pets": 37}
SIZES = {name: Size(count, DATASETS[name].train, DATASETS[name].test, SHOTS) for name, count in CLASSES.items()}
SIZES["flowers"] = SIZES["flowers"]._replace(shots=(1, 2, 4, 8, 10))  # that many training images a class are there
QUICK = {name: SIZES[name]._replace(shots=SHOTS[:3]) for name in ("flowers", "pets")}


class Problem(NamedTuple):
    """Features (N, DIM) float32 and labels (N,) of two splits."""

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray

    def shots(self, shots: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Features and labels of `shots` training images of every class."""
        order = np.random.default_rng(seed).permutation(len(self.train_labels))
        labels = self.train_labels[order]
        chosen = np.concatenate([order[labels == label][:shots] for label in range(labels.max() + 1)])
        return self.train[chosen], self.train_labels[chosen]


class Cell(NamedTuple):
    """A head on k shots of a data set. folder: where `write` put the features."""

    folder: Path
    dataset: str
    shots: int
    seed: int
    head: str


def write(folder: Path, sizes: Mapping[str, Size]) -> None:
    """Make the features of every set and put them into files: what an encoder's cache would hold."""
    for number, (name, size) in enumerate(sizes.items()):
        rng = np.random.default_rng((0, number))
        spectrum = (1 / np.sqrt(np.arange(1, DIM + 1))).astype(np.float32)
        mix = np.linalg.qr(rng.standard_normal((DIM, DIM), dtype=np.float32))[0]
        centres = rng.standard_normal((size.classes, DIM), dtype=np.float32)
        arrays = []
        for count in (size.train, size.test):
            labels = np.arange(count) % size.classes
            noise = SPREAD * rng.standard_normal((count, DIM), dtype=np.float32)
            arrays += [np.ascontiguousarray(((centres[labels] + noise) * spectrum) @ mix), labels]
        safetensors.numpy.save_file(Problem(*arrays)._asdict(), folder / f"{name}.safetensors")


@lru_cache(maxsize=1)
def problem(folder: Path, dataset: str) -> Problem:
    """The features of a set that `write` made."""
    return Problem(**safetensors.numpy.load_file(folder / f"{dataset}.safetensors"))


def cells(folder: Path, sizes: Mapping[str, Size], seeds: int) -> list[Cell]:
    """Every data set x shots x seed x head, the long ones first."""
    grid = [(name, k) for name, size in sizes.items() for k in size.shots]
    grid.sort(key=lambda each: -each[1] * sizes[each[0]].classes ** 2)
    return [Cell(folder, name, k, seed, head) for name, k in grid for seed in range(seeds) for head in HEADS]


def run(cell: Cell) -> tuple[float, float]:
    """One cell, in a worker: seconds to fit the head and score all test images, and the accuracy."""
    made, n_classes = problem(cell.folder, cell.dataset), SIZES[cell.dataset].classes
    fitted = timed(predict, HEADS[cell.head], *made.shots(cell.shots, cell.seed), made.test, n_classes)
    return fitted.seconds, float((fitted.value == made.test_labels).mean())


def predict(head: Head, train: np.ndarray, labels: np.ndarray, test: np.ndarray, n_classes: int) -> np.ndarray:
    """(test,) labels."""
    return head.fit(train, labels, n_classes).scores(test).argmax(axis=1)
