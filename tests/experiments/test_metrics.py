"""Metrics against scikit-learn, numpy and known numbers."""

import json
from statistics import mean

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss, top_k_accuracy_score

from experiments.metrics import Difference, Score, bootstrap_difference, metrics, scores, seeds_of, summary
from kshot_errors import ResultsError

NAMES = {
    "accuracy",
    "accuracy_strict",
    "accuracy_constrained",
    "top5",
    "mean_per_class",
    "nll",
    "ece",
    "unparseable",
}


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
    found = metrics(predictions(truth, probabilities), 8)
    guess = probabilities.argmax(axis=1)
    assert set(found) == NAMES
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, guess))
    assert found["mean_per_class"] == pytest.approx(balanced_accuracy_score(truth, guess))
    assert found["top5"] == pytest.approx(top_k_accuracy_score(truth, probabilities, k=5))
    assert found["nll"] == pytest.approx(log_loss(truth, probabilities), rel=1e-6)


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
    found = metrics(predictions([0, 1, 2, 3], prediction=[0, 1, 2, 0], answer_label=[0, -1, 2, 1]), 8)
    assert (found["accuracy"], found["accuracy_constrained"], found["accuracy_strict"]) == (0.75, 0.75, 0.5)
    assert found["unparseable"] == 0.25


def test_what_has_no_meaning_is_none():
    found = metrics(predictions([0, 1, 2], prediction=[0, 1, 1]), 3)
    assert {name for name, value in found.items() if value is None} == NAMES - {"accuracy", "mean_per_class"}


def test_infinite_nll_is_none_and_json_stays_valid():
    found = metrics(predictions([7, 1], np.eye(8)[[0, 1]]), 8)
    assert found["nll"] is None
    assert found["ece"] == 0.5
    json.dumps(found, allow_nan=False)


@given(st.integers(2, 6), st.integers(1, 5), st.randoms(use_true_random=False))
def test_mean_per_class_is_accuracy_when_classes_are_balanced(n_classes, each, random):
    label = [c for c in range(n_classes) for _ in range(each)]
    guess = [random.randrange(n_classes) for _ in label]
    found = metrics(predictions(label, prediction=guess), n_classes)
    assert found["mean_per_class"] == pytest.approx(found["accuracy"])


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


def test_summary_is_the_t_interval():
    values = [0.5, 0.6, 0.7, 0.62]
    low, high = stats.t.interval(0.95, 3, loc=mean(values), scale=stats.sem(values))
    middle, half = summary(values)
    assert (middle - half, middle + half) == pytest.approx((low, high))
    assert summary([1, 2, 3])[1] == pytest.approx(4.302652729749 / 3**0.5)  # t(0.975, 2), from a printed table


def test_summary_of_one_seed_has_no_interval():
    assert summary([0.4]) == (0.4, None)
    with pytest.raises(ResultsError):
        summary([])


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
    found = scores(cells, "x")
    assert found["a"][1].mean == pytest.approx(0.3)
    assert found["a"][1].n == 2
    assert found["z"][0] == Score(0.3, None, 1)  # no ± 0: zero-shot draws nothing
    assert "a" not in scores(cells, "x", "nll")  # one of its seeds is infinite


def test_seeds_of_counts_drawn_sets():
    cells = [{"dataset": "x", "shots": k, "seed": s} for k, s in [(0, 0), (1, 3), (4, 3), (1, 4)]]
    assert seeds_of(cells, "x") == {3, 4}
    assert seeds_of(cells[:1], "x") == {0}


def paired(n: int, share: float, seed: int) -> pa.Table:
    label = np.arange(n) % 8
    wrong = np.random.default_rng(seed).random(n) > share
    return predictions(label, prediction=np.where(wrong, (label + 1) % 8, label))


def test_bootstrap_of_identical_tables_is_zero():
    assert bootstrap_difference(paired(100, 0.7, 0), paired(100, 0.7, 0), seed=1) == Difference(0, 0, 0, 1)


def test_bootstrap_of_a_clear_difference_excludes_zero():
    found = bootstrap_difference(paired(400, 0.9, 0), paired(400, 0.6, 1), seed=1)
    assert 0.2 < found.low < found.difference < found.high < 0.4
    assert found.p < 0.001
    swapped = bootstrap_difference(paired(400, 0.6, 1), paired(400, 0.9, 0), seed=1)
    assert swapped.high < 0
    assert swapped.difference == -found.difference


def test_bootstrap_interval_is_that_of_resampled_images():
    a, b = paired(200, 0.8, 2), paired(200, 0.75, 3)
    gain = (a["prediction"].to_numpy() == a["label"].to_numpy()) * 1.0 - (
        b["prediction"].to_numpy() == b["label"].to_numpy()
    )
    draws = np.random.default_rng(5).choice(gain, (10_000, 200)).mean(axis=1)
    found = bootstrap_difference(a, b, seed=1)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), abs=0.01)


def test_bootstrap_is_reproducible_and_ignores_row_order():
    a, b = paired(100, 0.8, 2), paired(100, 0.7, 3)
    shuffled = b.take(np.random.default_rng(0).permutation(100))
    assert bootstrap_difference(a, b, seed=4) == bootstrap_difference(a, shuffled, seed=4)
    assert bootstrap_difference(a, b, seed=4) != bootstrap_difference(a, b, seed=5)


def test_bootstrap_refuses_other_images():
    a = paired(100, 0.8, 2)
    with pytest.raises(ResultsError, match="different test images"):
        bootstrap_difference(a, a.slice(1), seed=0)
    relabelled = a.set_column(1, "label", pa.array([5, *a["label"].to_pylist()[1:]], pa.int32()))
    with pytest.raises(ResultsError, match="different labels for image '0000'"):
        bootstrap_difference(a, relabelled, seed=0)
