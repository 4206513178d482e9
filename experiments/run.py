"""Run one cell: from the catalog row to a record and its predictions. Knows no results folder and no other cell.

Called in a worker process; data sets stay loaded from cell to cell.
"""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np

from data import catalog
from data.core import Dataset, Example
from data.fewshot import k_shot
from data.images import prepare_all
from experiments.cell import Cell
from experiments.config import Settings
from experiments.methods import METHODS, Outcome, Task
from kshot_errors import DatasetError

if TYPE_CHECKING:
    import pyarrow as pa

VERSIONS = ("kshot", "torch", "transformers", "peft", "timm", "scikit-learn", "numpy", "pillow", "tinker")


@dataclass(frozen=True)
class Job:
    """A cell and what only this machine needs to run it. source: how the data set is named here, maybe a path."""

    cell: Cell
    settings: Settings
    source: str
    service: str = "local"
    device: str = "cpu"

    def __str__(self) -> str:
        return str(self.cell)


def run(job: Job) -> tuple[dict[str, Any], "pa.Table"]:
    """(record, predictions) of a cell. Raises InputError for what is wrong with its data or settings."""
    from experiments.metrics import metrics

    cell, settings = job.cell, job.settings
    dataset = _prepared(job.source, settings.split_seed, settings.max_side, settings.limit_test)
    if dataset.protocol != cell.protocol:
        raise DatasetError(f"{job.source} has changed since the sweep began; run it again with another --out")
    method = METHODS[cell.method]
    train = few_shot(dataset, cell.shots, cell.seed, settings) if method.learns else []
    images = [example.image for example in dataset.test]
    task = Task(
        classes=dataset.classes,
        train=train,
        test=images,
        seed=cell.seed,
        settings=settings,
        hflip=catalog.find(job.source).hflip,
        service=job.service,
        device=job.device,
    )
    outcome = method.run(task)
    table = predictions(dataset.test, outcome)
    record = {
        "key": cell.key,
        **cell.identity,
        "metrics": metrics(table, len(dataset.classes)),
        "timings": {"fit_seconds": round(outcome.fit_seconds, 3), "predict_seconds": round(outcome.predict_seconds, 3)},
        "versions": versions(job.device),
    }
    return record, table


def few_shot(dataset: Dataset, shots: int, seed: int, settings: Settings) -> list[Example]:
    """The k labelled examples a class. Raises TooFewImagesError unless settings.allow_fewer."""
    chosen = k_shot(dataset.train, dataset.classes, shots, seed, allow_fewer=settings.allow_fewer)
    return [dataset.train[n] for n in chosen]


def predictions(test: Sequence[Example], outcome: Outcome) -> "pa.Table":
    """One row a test image: key, label, prediction, the five best classes, log-probabilities and free answers.

    Ties between scores go to the lower class index.
    """
    import pyarrow as pa

    scores = outcome.scores
    best = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    labels = np.array([example.label for example in test], np.int32)
    columns: dict[str, tuple[Any, pa.DataType]] = {
        "key": ([example.key for example in test], pa.string()),
        "label": (labels, pa.int32()),
        "prediction": (best[:, 0], pa.int32()),
        "top5": (list(best), pa.list_(pa.int32())),
        "top5_log_probs": (None, pa.list_(pa.float32())),
        "label_log_prob": (None, pa.float32()),
        "answer": (None, pa.string()),
        "answer_label": (None, pa.int32()),
    }
    if outcome.probabilities:
        columns["top5_log_probs"] = (list(np.take_along_axis(scores, best, 1)), pa.list_(pa.float32()))
        columns["label_log_prob"] = (scores[np.arange(len(labels)), labels], pa.float32())
    if outcome.answers is not None:
        columns["answer"] = ([text for text, _ in outcome.answers], pa.string())
        columns["answer_label"] = ([label for _, label in outcome.answers], pa.int32())
    arrays = {n: pa.nulls(len(labels), t) if v is None else pa.array(v, t) for n, (v, t) in columns.items()}
    return pa.table(arrays)


def versions(device: str) -> dict[str, str]:
    """The versions of what the numbers come from, and the kind of machine."""
    machine = f"{platform.system()} {platform.machine()} {device}"
    return {"python": platform.python_version(), **{n: metadata.version(n) for n in VERSIONS}, "machine": machine}


@lru_cache(maxsize=1)
def _prepared(source: str, split_seed: int, max_side: int, limit_test: int | None) -> Dataset:
    """The data set with every image as both sides of the comparison see it; training images also mirrored."""
    dataset = catalog.load(source, split_seed=split_seed)
    # keys are hashes: the smallest are a sample that does not depend on the order of the rows
    test = dataset.test if limit_test is None else sorted(dataset.test, key=lambda e: e.key)[:limit_test]
    return Dataset(
        dataset.name,
        dataset.protocol,
        dataset.classes,
        prepare_all(dataset.train, max_side=max_side, hflip=catalog.find(source).hflip > 0),
        prepare_all(test, max_side=max_side, hflip=False),
    )
