"""Metrics against scikit-learn, numpy and known numbers."""

import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from sklearn import metrics as reference

from experiments.sweep.intervals import Score, over_both
from experiments.sweep.metrics import confusions, metrics, scores, seeds_of
from kshot.errors import ResultsError

TEXT = {"accuracy_strict", "accuracy_constrained", "unparseable"}
NAMES = {"accuracy", "top5", "mean_per_class", "nll", "ece", *TEXT}


def predictions(label, probabilities=None, prediction=None, answer_label=None) -> pa.Table:
    """A predictions table; without probabilities the top five is the prediction alone."""
    n = len(label)
    order = None if probabilities is None else np.argsort(-probabilities, axis=1, kind="stable")[:, :5]
    prediction = order[:, 0] if prediction is None else prediction
    with np.errstate(divide="ignore"):
        logs = None if order is None else np.log(np.take_along_axis(probabilities, order, 1)).tolist()
        label_logs = None if order is None else np.log(probabilities[np.arange(n), label])
    nulls = [None] * n
    return pa.table(
        {
            "key": [f"{i:04}" for i in range(n)],
            "label": pa.array(label, pa.int32()),
            "prediction": pa.array(prediction, pa.int32()),
            "top5": pa.array([[p] for p in prediction] if order is None else order.tolist(), pa.list_(pa.int32())),
            "top5_log_probs": pa.array(logs or nulls, pa.list_(pa.float32())),
            "label_log_prob": pa.array(nulls if label_logs is None else label_logs, pa.float32()),
            "answer": pa.array(nulls, pa.string()),
            "answer_label": pa.array(nulls if answer_label is None else answer_label, pa.int32()),
        }
    )


@pytest.fixture
def truth() -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, 8, 300)


@pytest.fixture
def probabilities(truth: NDArray[np.int64]) -> NDArray[np.float64]:
    logits = np.random.default_rng(1).normal(size=(300, 8)) + 1.5 * np.eye(8)[truth]
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def test_agrees_with_scikit_learn(truth, probabilities):
    result = metrics(predictions(truth, probabilities), 8)
    guess = probabilities.argmax(axis=1)
    assert set(result) == NAMES
    assert result["accuracy"] == pytest.approx(reference.accuracy_score(truth, guess))
    assert result["mean_per_class"] == pytest.approx(reference.balanced_accuracy_score(truth, guess))
    assert result["top5"] == pytest.approx(reference.top_k_accuracy_score(truth, probabilities, k=5))
    assert result["nll"] == pytest.approx(reference.log_loss(truth, probabilities), rel=1e-6)


def test_ece_agrees_with_a_loop_over_bins(truth, probabilities):
    top, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (top > low) & (top <= low + 1 / 15)
        if inside.any():
            expected += inside.mean() * abs(top[inside].mean() - right[inside].mean())
    assert metrics(predictions(truth, probabilities), 8)["ece"] == pytest.approx(expected, rel=1e-5)


def test_ece_of_certainty():
    sure = np.eye(8)[[0, 1, 2, 3]]
    assert metrics(predictions([0, 1, 2, 3], sure), 8)["ece"] == 0
    assert metrics(predictions([7, 7, 7, 7], sure), 8)["ece"] == 1


def test_text_answers():
    result = metrics(predictions([0, 1, 2, 3], prediction=[0, 1, 2, 0], answer_label=[0, -1, 2, 1]), 8)
    assert (result["accuracy"], result["accuracy_constrained"], result["accuracy_strict"]) == (0.75, 0.75, 0.5)
    assert result["unparseable"] == 0.25


def test_what_has_no_meaning_is_none():
    result = metrics(predictions([0, 1, 2], prediction=[0, 1, 1]), 3)
    assert {name for name, value in result.items() if value is None} == NAMES - {"accuracy", "mean_per_class"}


def test_infinite_nll_is_none_and_json_stays_valid():
    result = metrics(predictions([7, 1], np.eye(8)[[0, 1]]), 8)
    assert result["nll"] is None
    assert result["ece"] == 0.5
    json.dumps(result, allow_nan=False)


@given(st.integers(2, 6), st.integers(1, 5), st.randoms(use_true_random=False))
def test_mean_per_class_is_accuracy_when_classes_are_balanced(n_classes, each, random):
    label = [c for c in range(n_classes) for _ in range(each)]
    guess = [random.randrange(n_classes) for _ in label]
    result = metrics(predictions(label, prediction=guess), n_classes)
    assert result["mean_per_class"] == pytest.approx(result["accuracy"])


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("answer_label", [0, None], "null in 1 of 2 rows"),
        ("label_log_prob", [0.0, float("nan")], "NaN"),
        ("label", [0, 8], "do not fit 8 classes"),
    ],
)
def test_refuses_broken_predictions(column, values, message):
    table = predictions([0, 1], np.eye(8)[[0, 1]])
    index = table.column_names.index(column)
    table = table.set_column(index, column, pa.array(values, table.schema.field(column).type))
    with pytest.raises(ResultsError, match=message):
        metrics(table, 8)


def test_refuses_empty_and_incomplete_predictions():
    table = predictions([0, 1], prediction=[0, 1])
    with pytest.raises(ResultsError, match="empty"):
        metrics(table.slice(0, 0), 8)
    with pytest.raises(ResultsError, match="lack the column"):
        metrics(table.drop_columns(["top5"]), 8)


@example(rows=[(0, 0), (1, 1)], limit=10)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60), st.integers(1, 25))
def test_confusions_are_the_largest_entries_off_the_diagonal(rows, limit):
    label, guess = zip(*rows, strict=True)
    matrix = reference.confusion_matrix(label, guess, labels=range(5))
    expected = sorted(
        (-matrix[a, b], a, b, matrix[a, b] / matrix[a].sum())
        for a in range(5)
        for b in range(5)
        if a != b and matrix[a, b]
    )
    result = confusions(predictions(label, prediction=guess), limit)
    assert result == [(a, b, -n, pytest.approx(share)) for n, a, b, share in expected[:limit]]


def test_scores_group_by_method_and_shots():
    cells = [
        {"dataset": d, "method": m, "shots": k, "seed": s, "metrics": {"accuracy": a, "nll": nll}}
        for d, m, k, s, a, nll in [
            ("x", "a", 1, 0, 0.2, 1.0),
            ("x", "a", 1, 1, 0.4, None),
            ("x", "z", 0, 0, 0.3, 1.0),
            ("x", "z", 0, 1, 0.3, 1.0),
            ("y", "a", 1, 0, 0.9, 1.0),
        ]
    ]
    result = scores(cells, "x")
    assert result["a"][1].mean == pytest.approx(0.3)
    assert result["a"][1].n == 2
    assert result["z"][0] == Score(0.3, None, 1)  # no ± 0: zero-shot draws nothing
    assert "a" not in scores(cells, "x", "nll")  # one of its seeds is infinite


def test_a_single_run_has_an_interval_over_test_images():
    values = {"accuracy": 0.3, "mean_per_class": 0.4}
    cell = {"dataset": "x", "method": "a", "shots": 0, "test_images": 50, "metrics": values}
    interval = tuple(stats.binomtest(15, 50).proportion_ci(method="wilson"))
    for cells in ([cell | {"seed": 0}], [cell | {"seed": 0}, cell | {"seed": 1}]):  # of zero shots, two are one
        assert scores(cells, "x")["a"][0] == (0.3, None, 1, pytest.approx(interval))
    assert scores([cell | {"seed": 0}], "x", "mean_per_class")["a"][0] == (0.4, None, 1, None)  # no share of images
    drawn = scores([cell | {"shots": 1, "seed": seed} for seed in (0, 1)], "x")["a"][1]
    assert drawn == (0.3, 0.0, 2, over_both([0.3, 0.3], 50))


def test_seeds_of_counts_drawn_sets():
    cells = [{"dataset": "x", "shots": k, "seed": s} for k, s in [(0, 0), (1, 3), (4, 3), (1, 4)]]
    assert seeds_of(cells, "x") == {3, 4}
    assert seeds_of(cells[:1], "x") == {0}
