"""Intervals against scipy, and paired differences against a bootstrap that draws images one by one."""

from statistics import mean

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike
from scipy import stats

from experiments.sweep.intervals import RESAMPLES, Difference, Score, bootstrap_difference, over_both, summary, wilson
from kshot.errors import ResultsError


def table(keys: list[str], label: ArrayLike, prediction: ArrayLike) -> pa.Table:
    """What a bootstrap reads of a predictions table."""
    return pa.table({"key": keys, "label": pa.array(label, pa.int32()), "prediction": pa.array(prediction, pa.int32())})


def test_summary_is_the_t_interval():
    values = [0.5, 0.6, 0.7, 0.62]
    low, high = stats.t.interval(0.95, 3, loc=mean(values), scale=stats.sem(values))
    middle, half = summary(values)
    assert (middle - half, middle + half) == pytest.approx((low, high))


def test_summary_of_one_seed_has_no_interval():
    assert summary([0.4]) == (0.4, None)
    with pytest.raises(ResultsError):
        summary([])


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (0, 570), (26, 570), (570, 570), (1, 3), (4000, 8041)])
def test_wilson_agrees_with_scipy(right, n):
    expected = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert wilson(right / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_and_is_symmetric(case):
    right, n = case
    low, high = wilson(right / n, n)
    assert 0 <= low <= right / n <= high <= 1
    assert low < high
    assert wilson((n - right) / n, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


@pytest.mark.parametrize(("share", "n"), [(0.5, 0), (-0.1, 10), (1.1, 10), (float("nan"), 10)])
def test_wilson_refuses_what_is_no_share(share, n):
    with pytest.raises(ResultsError, match="no share of test images"):
        wilson(share, n)


def test_the_interval_of_a_score_is_the_one_it_has():
    assert Score(0.5, 0.1, 3).interval == pytest.approx((0.4, 0.6))
    assert Score(0.5, None, 1, (0.3, 0.7)).interval == (0.3, 0.7)
    assert Score(0.5, None, 1).interval is None


def test_an_interval_over_seeds_and_images_holds_what_it_should() -> None:
    """In simulated experiments: each seed has an accuracy of its own, each image is right or wrong with it."""
    rng, truth, covered = np.random.default_rng(0), 0.8, 0
    for _ in range(400):
        images = rng.random(200)  # how hard each is; the same ones for all seeds
        values = [float(np.mean(images < truth + rng.normal(0, 0.03))) for _ in range(3)]
        low, high = over_both(values, 200)
        assert 0 <= low < mean(values) < high <= 1
        covered += low <= truth <= high
    assert 0.93 <= covered / 400 <= 1.0


def test_an_interval_over_both_stays_within_and_is_one_of_the_two_where_the_other_is_nothing() -> None:
    assert over_both([1.0, 1.0, 1.0], 50) == pytest.approx(wilson(1.0, 50))
    assert over_both([0.0, 0.0], 50) == pytest.approx(wilson(0.0, 50))
    assert over_both([0.2, 0.8], 1000) == (0.0, 1.0)  # Student's alone would go far beyond
    values = [0.4, 0.5, 0.6]
    low, high = over_both(values, 10**9)
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 2, loc=0.5, scale=stats.sem(values)), abs=1e-4)
    with pytest.raises(ResultsError, match="one seed has no interval"):
        over_both([0.5], 50)


def paired(n: int, share: float, seed: int) -> pa.Table:
    label = np.arange(n) % 8
    wrong = np.random.default_rng(seed).random(n) > share
    return table([f"{i:04}" for i in range(n)], label, np.where(wrong, (label + 1) % 8, label))


TWINS = ["a", "a", "b"], [0, 1, 0]  # keys, labels


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (paired(100, 0.7, 0), paired(100, 0.7, 0), Difference(0, 0, 0, 1)),
        (paired(50, 1.0, 0), paired(50, 0.0, 0), Difference(1, 1, 1, 2 / (1 + RESAMPLES))),
        (table(*TWINS, [0, 0, 0]), table(*(each[::-1] for each in TWINS), [0, 0, 0]), Difference(0, 0, 0, 1)),
    ],
    ids=["the same", "p is never zero", "twins are paired whatever their order"],
)
def test_bootstrap_without_chance(a, b, expected):
    assert bootstrap_difference([a], [b], seed=1) == expected


def test_bootstrap_of_a_clear_difference_excludes_zero():
    result = bootstrap_difference([paired(400, 0.9, 0)], [paired(400, 0.6, 1)], seed=1)
    assert 0.2 < result.low < result.difference < result.high < 0.4
    assert result.p < 0.001
    swapped = bootstrap_difference([paired(400, 0.6, 1)], [paired(400, 0.9, 0)], seed=1)
    assert swapped.high < 0
    assert swapped.difference == -result.difference


def test_bootstrap_is_reproducible_and_ignores_row_order():
    a, b = paired(100, 0.8, 2), paired(100, 0.7, 3)
    shuffled = b.take(np.random.default_rng(0).permutation(100))
    assert bootstrap_difference([a], [b], seed=4) == bootstrap_difference([a], [shuffled], seed=4)
    assert bootstrap_difference([a], [b], seed=4) != bootstrap_difference([a], [b], seed=5)


def test_bootstrap_over_seeds_is_that_of_resampled_images():
    runs_a = [paired(150, share, seed) for share, seed in ((0.85, 2), (0.82, 4), (0.79, 6))]
    runs_b = [paired(150, share, seed) for share, seed in ((0.75, 3), (0.7, 5), (0.7, 7))]
    right = [sum((t["prediction"].to_numpy() == t["label"].to_numpy()) * 1 for t in runs) for runs in (runs_a, runs_b)]
    gain, rng = right[0] - right[1], np.random.default_rng(5)  # of three seeds: whole numbers tie where thirds may not
    draws = np.array([gain[rng.integers(0, 150, 150)].sum() for _ in range(20_000)])
    result = bootstrap_difference(runs_a, runs_b, seed=1)
    assert result.difference == pytest.approx(gain.mean() / 3)
    assert (result.low, result.high) == pytest.approx(tuple(np.quantile(draws / 450, [0.025, 0.975])), abs=0.005)
    assert 0.01 < result.p < 0.2
    assert result.p == pytest.approx(2 * min(np.mean(draws <= 0), np.mean(draws >= 0)), abs=0.02)


@given(st.integers(1, 4), st.integers(0, 100))
def test_a_run_that_is_there_several_times_counts_once(times, seed):
    a, b = paired(40, 0.8, seed), paired(40, 0.6, seed + 1)
    once, often = bootstrap_difference([a], [b], seed=1), bootstrap_difference([a] * times, [b] * times, seed=1)
    assert often == pytest.approx(once)


A = paired(100, 0.8, 2)
RELABELLED = A.set_column(1, "label", pa.array([5, *A["label"].to_pylist()[1:]], pa.int32()))


@pytest.mark.parametrize(
    ("runs_a", "runs_b", "message"),
    [
        ([A], [A.slice(1)], "different test images"),
        ([A, A], [A, A.slice(1)], "different test images"),
        ([A], [RELABELLED], "different labels for image '0000'"),
        ([A, A], [A], "cannot pair 2 runs with 1"),
        ([], [], "cannot pair 0 runs with 0"),
        ([A.slice(0, 0)], [A.slice(0, 0)], "empty"),
    ],
)
def test_bootstrap_refuses_what_cannot_be_paired(runs_a, runs_b, message):
    with pytest.raises(ResultsError, match=message):
        bootstrap_difference(runs_a, runs_b, seed=0)
