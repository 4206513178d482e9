"""The metrics of a table of predictions, the most frequent confusions, and scores over seeds. Shares are fractions in
[0, 1], log-probabilities natural; None is what is not defined, and what JSON cannot hold (an infinite NLL)."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from experiments.sweep.intervals import Score, over_both, summary, wilson
from kshot.errors import ResultsError

COLUMNS = ("key", "label", "prediction", "top5", "top5_log_probs", "label_log_prob", "answer", "answer_label")
ECE_BINS = 15
# the metrics that are a share of the test images; the others have no Wilson interval
SHARES = {"accuracy", "accuracy_strict", "accuracy_constrained", "top5", "unparseable", "accuracy_without_thought"}


class Confusion(NamedTuple):
    """Images of class `label` that were named `prediction`: how many, and their share of the label's images."""

    label: int
    prediction: int
    images: int
    share: float


def metrics(table: pa.Table, n_classes: int) -> dict[str, float | None]:
    """The metrics of one cell, from its predictions (one row a test image).

    `accuracy_strict` and `unparseable` need text answers; `nll` and `ece` need probabilities; `top5` needs more than
    five classes (below that, every answer is in the top five). `nll` is in nats and None when a label has probability 0
    (the mean is infinite). `mean_per_class` is over the classes that occur in the table. Of a cell that thought before
    it answered also `accuracy_without_thought`, the shares of thoughts that were closed and that were unfinished, and
    the mean tokens of one.
    Raises ResultsError for a table that is empty, lacks a column, or mixes rows with and without values.
    """
    _check(table, n_classes)
    label, prediction = table["label"].to_numpy(), table["prediction"].to_numpy()
    answers = _values(table, "answer_label")
    accuracy = float(np.mean(prediction == label))
    return {
        "accuracy": accuracy,
        "accuracy_strict": None if answers is None else float(np.mean(answers == label)),
        # The headline of a method that answers in text is the constrained answer.
        "accuracy_constrained": None if answers is None else accuracy,
        "top5": _top5(table, label) if n_classes > 5 else None,
        "mean_per_class": _mean_per_class(label, prediction),
        "nll": _nll(table),
        "ece": _ece(table, label),
        "unparseable": None if answers is None else float(np.mean(answers < 0)),
        **(_thoughts(table, label) if "thought_tokens" in table.column_names else {}),
    }


def _thoughts(table: pa.Table, label: NDArray[Any]) -> dict[str, float | None]:
    names = "thought_tokens", "thoughts_closed", "prediction_without_thought"
    tokens, closed, without = (table[name].to_numpy().astype(np.float64) for name in names)
    return {
        "accuracy_without_thought": float(np.mean(without == label)),
        "thoughts_closed": float(np.mean(closed)),
        "thoughts_unfinished": float(np.mean(1 - closed)),
        "thought_tokens": float(np.mean(tokens)),
    }


def confusions(table: pa.Table, limit: int) -> list[Confusion]:
    """The pairs of a label and another class that was predicted for it, at most `limit`: the most frequent first, then
    by label and by prediction."""
    label, prediction = table["label"].to_numpy(), table["prediction"].to_numpy()
    wrong = prediction != label
    pairs, counts = np.unique(np.stack([label[wrong], prediction[wrong]], axis=1), axis=0, return_counts=True)
    of_class = np.bincount(label)
    worst = np.argsort(-counts, kind="stable")[:limit]  # np.unique has sorted them by label and prediction
    return [
        Confusion(int(a), int(b), int(n), float(n / of_class[a]))
        for (a, b), n in zip(pairs[worst], counts[worst], strict=True)
    ]


def scores(cells: Sequence[Mapping[str, Any]], dataset: str, metric: str = "accuracy") -> dict[str, dict[int, Score]]:
    """{method: {shots: Score}} of one data set. A group in which a cell lacks the metric is left out: an NLL is missing
    because it is infinite, so the mean of the rest would flatter."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = defaultdict(list)
    for cell in cells:
        if cell["dataset"] == dataset:
            groups[cell["method"], cell["shots"]].append(cell)
    result: dict[str, dict[int, Score]] = defaultdict(dict)
    for (method, shots), group in sorted(groups.items()):
        values = [value for cell in group if (value := cell["metrics"].get(metric)) is not None]
        if len(values) == len(group):
            result[method][shots] = _score(values, shots, group[0].get("test_images") if metric in SHARES else None)
    return dict(result)


def seeds_of(cells: Sequence[Mapping[str, Any]], dataset: str) -> set[int]:
    """The seeds of a data set's means; those of zero-shot cells only where there are no others."""
    seeds = {(cell["seed"], cell["shots"] > 0) for cell in cells if cell["dataset"] == dataset}
    return {seed for seed, drawn in seeds if drawn} or {seed for seed, _ in seeds}


def _check(table: pa.Table, n_classes: int) -> None:
    absent = [name for name in COLUMNS if name not in table.column_names]
    if absent:
        raise ResultsError(f"predictions lack the column(s) {', '.join(absent)}")
    if not table.num_rows:
        raise ResultsError("predictions are empty: no test image")
    bounds = pc.min_max(table["label"]).as_py()
    if bounds["min"] < 0 or bounds["max"] >= n_classes:
        raise ResultsError(f"labels {bounds['min']}..{bounds['max']} do not fit {n_classes} classes")


def _values(table: pa.Table, name: str) -> NDArray[Any] | None:
    """A numeric column as an array; None when all of it is null: the method has no such output."""
    column = _present(table, name)
    if column is None:
        return None
    values = column.to_numpy()
    if np.isnan(values).any():
        raise ResultsError(f"{name} holds NaN: the model is broken, not unsure")
    return values


def _present(table: pa.Table, name: str) -> pa.ChunkedArray | None:
    column = table[name]
    if column.null_count == len(column):
        return None
    if column.null_count:
        raise ResultsError(f"{name} is null in {column.null_count} of {len(column)} rows: all or none")
    return column


def _top5(table: pa.Table, label: NDArray[Any]) -> float | None:
    column = _present(table, "top5")
    if column is None:
        return None
    lists = column.combine_chunks()
    row, guess = pc.list_parent_indices(lists).to_numpy(), pc.list_flatten(lists).to_numpy()
    return len(np.unique(row[guess == label[row]])) / len(label)


def _mean_per_class(label: NDArray[Any], prediction: NDArray[Any]) -> float:
    count = np.bincount(label)
    right = np.bincount(label, weights=prediction == label)
    present = count > 0
    return float(np.mean(right[present] / count[present]))


def _nll(table: pa.Table) -> float | None:
    log_probs = _values(table, "label_log_prob")
    if log_probs is None or np.isneginf(log_probs).any():
        return None
    return float(-np.mean(log_probs, dtype=np.float64))


def _ece(table: pa.Table, label: NDArray[Any]) -> float | None:
    """Expected calibration error (Guo et al., ICML 2017): 15 equal-width bins (low, high] on the top-1 probability,
    that of the first class of top5."""
    log_probs, classes = _present(table, "top5_log_probs"), _present(table, "top5")
    if log_probs is None or classes is None:
        return None
    probability = np.exp(_first(log_probs).astype(np.float64))
    if np.isnan(probability).any():
        raise ResultsError("top5_log_probs holds NaN: the model is broken, not unsure")
    right = _first(classes) == label
    bins = np.clip(np.ceil(probability * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
    # |sum of confidence - sum of hits| per bin over n is the bin's gap weighted by its share of images.
    gaps = np.bincount(bins, weights=probability - right, minlength=ECE_BINS)
    return float(np.abs(gaps).sum() / len(label))


def _first(lists: pa.ChunkedArray) -> NDArray[Any]:
    if pc.min(pc.list_value_length(lists)).as_py() < 1:
        raise ResultsError("a row of predictions has an empty list of top classes")
    return pc.list_element(lists, 0).to_numpy()


def _score(values: Sequence[float], shots: int, images: int | None) -> Score:
    # Zero-shot cells draw no training images: equal values over seeds are one measurement, not a certainty of ± 0.
    if len(values) == 1 or (shots == 0 and len(set(values)) == 1):
        return Score(values[0], None, 1, None if images is None else wilson(values[0], images))
    return Score(*summary(values), len(values), None if images is None else over_both(values, images))
