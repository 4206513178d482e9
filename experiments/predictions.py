"""What a method said, as the table that is stored: one row a test image. Knows no metrics and no files."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from data.core import Example
from experiments.methods import Outcome

if TYPE_CHECKING:
    import pyarrow as pa


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
