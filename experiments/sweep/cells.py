"""One cell of a sweep, (data set, method, shots, seed) under its settings, and the key it is stored by; the jobs that
workers are given; and the table of a cell's predictions."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from data.dataset import Access, Example
from experiments.sweep.config import Settings

if TYPE_CHECKING:
    import pyarrow as pa

    from experiments.sweep.methods import Outcome


@dataclass(frozen=True)
class Cell:
    """What is measured, whoever computes it. settings: only those that the method's numbers depend on, JSON values.
    unkeyed: those of them that are no part of the key."""

    dataset: str
    protocol: str
    method: str
    shots: int
    seed: int
    settings: Mapping[str, Any]
    unkeyed: tuple[str, ...] = ()

    @property
    def identity(self) -> dict[str, Any]:
        """Everything the cell's numbers depend on."""
        return {field: value for field, value in vars(self).items() if field != "unkeyed"}

    @property
    def key(self) -> str:
        """Hash of the identity: the same cell has the same key on every machine."""
        keyed = {name: value for name, value in self.settings.items() if name not in self.unkeyed}
        canonical = json.dumps({**self.identity, "settings": keyed}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.method} on {self.dataset}, {self.shots} shots, seed {self.seed}"


@dataclass(frozen=True)
class Job:
    """A cell, and what only this machine needs to run it. source: how the data set is named here, maybe a path.
    service, device: what computes. access: how the data set is had."""

    cell: Cell
    settings: Settings
    source: str
    service: str = "local"
    device: str = "cpu"
    access: Access = field(default_factory=Access)

    def __str__(self) -> str:
        return str(self.cell)


@dataclass(frozen=True)
class EncodingJob:
    """Images that the cell of `cell_job`, and others that differ from it in shots and seed at most, show the VLM: its
    test images and, where cells learn (shots > 0), those of all `seeds`; of them every `parts`-th from `part` on."""

    cell_job: Job
    seeds: tuple[int, ...]
    shots: int
    part: int
    parts: int

    def __str__(self) -> str:
        return f"encoding the images of {self.cell_job.cell.dataset}, part {self.part + 1} of {self.parts}"


def service_kind(service: str) -> str:
    """What results call a service: an address stays private."""
    return service if service in ("local", "tinker") else "remote"


def predictions(test: Sequence[Example], outcome: "Outcome") -> "pa.Table":
    """One row a test image: key, label, prediction, the five best classes, log-probabilities and free answers. Ties
    between scores go to the lower class index. Where it was thought before, also the tokens of a thought, the share of
    closed ones, and the prediction without."""
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
    if outcome.thoughts is not None:
        columns["thought_tokens"] = (outcome.thoughts.tokens, pa.float32())
        columns["thoughts_closed"] = (outcome.thoughts.closed, pa.float32())
        columns["prediction_without_thought"] = (outcome.thoughts.without, pa.int32())
    arrays = {n: pa.nulls(len(labels), t) if v is None else pa.array(v, t) for n, (v, t) in columns.items()}
    return pa.table(arrays)
