"""Confidence intervals over seeds and over test images, and paired differences. Shares are fractions in [0, 1]."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kshot.errors import ResultsError

LEVEL = 0.95
RESAMPLES = 10_000


class Score(NamedTuple):
    """A metric over the seeds of one (method, shots): mean, half-width of Student's 95% interval over seeds (None
    without one), number of seeds. within: where it is a share of test images whose number is known, its 95% interval
    inside [0, 1]: over seeds and images (see `over_both`), of one value alone over images."""

    mean: float
    half_width: float | None
    n: int
    within: tuple[float, float] | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """(low, high) of the interval it has, whichever that is."""
        if self.within is not None or self.half_width is None:
            return self.within
        return self.mean - self.half_width, self.mean + self.half_width


class Difference(NamedTuple):
    """Accuracy of a minus accuracy of b (fractions), its 95% interval, the two-sided p of "no difference"."""

    difference: float
    low: float
    high: float
    p: float


def summary(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean of one value per seed and the half-width of its 95% Student-t interval; None with a single seed."""
    if not values:
        raise ResultsError("no values to summarise: give one per seed")
    if len(values) == 1:
        return float(values[0]), None
    from scipy.special import stdtrit  # a tenth of the import time of scipy.stats

    n = len(values)
    return fmean(values), float(stdtrit(n - 1, (1 + LEVEL) / 2)) * stdev(values) / n**0.5


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95% score interval of a share of n independent images (Wilson, J. Am. Stat. Assoc. 22, 1927): (low, high) in
    [0, 1], and no point where all are right or none. Raises ResultsError for no images and for what is no share."""
    if n < 1 or not 0 <= share <= 1:
        raise ResultsError(f"{share} of {n} images is no share of test images")
    from scipy.special import ndtri

    z2 = float(ndtri((1 + LEVEL) / 2)) ** 2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = (z2 * (share * (1 - share) / n + z2 / (4 * n * n))) ** 0.5 / (1 + z2 / n)
    # The share is inside; rounding must not put it outside at 0 and 1.
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def over_both(values: Sequence[float], images: int) -> tuple[float, float]:
    """The 95% interval of the mean share of several seeds that holds other training sets and other test images: (low,
    high) in [0, 1].

    values: a share a seed, all of the same `images`. On each side the distances of two intervals are added in squares
    (MOVER; Zou and Donner, Statistics in Medicine 27, 2008): Student's over seeds, which for three seeds is wide where
    a bootstrap of three would be too narrow, and Wilson's of so many independent images; it is cut at 0 and 1. Raises
    ResultsError for fewer than two seeds or no images."""
    mean, seeds = summary(values)
    if seeds is None:
        raise ResultsError("one seed has no interval over seeds: see wilson")
    low, high = wilson(min(1.0, max(0.0, mean)), images)
    return max(0.0, mean - math.hypot(mean - low, seeds)), min(1.0, mean + math.hypot(high - mean, seeds))


def bootstrap_difference(runs_a: Sequence[pa.Table], runs_b: Sequence[pa.Table], seed: int) -> Difference:
    """Paired bootstrap over test images of accuracy(a) - accuracy(b), each the mean of its runs: percentile interval,
    two-sided p.

    runs_a, runs_b: predictions, one table per training seed, in the same order. An image's gain is the mean over the
    seeds of right(a) - right(b); images are drawn again, the seeds stay: the interval is about other images, not about
    other training sets. Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 13 and 16; 10,000
    resamples, p smoothed by one so that it is never 0. Raises ResultsError unless there is a run, as many of a as of b,
    and all hold the same images with the same labels.
    """
    if not runs_a or len(runs_a) != len(runs_b):
        raise ResultsError(f"cannot pair {len(runs_a)} runs with {len(runs_b)}: give one of each per seed")
    first, *others = [_in_order(run) for pair in zip(runs_a, runs_b, strict=True) for run in pair]
    right = [_right(run, first).astype(int) for run in (first, *others)]
    gain = sum(right[::2]) - sum(right[1::2])  # whole numbers: times the number of runs
    # A resample's difference depends only on how often it drew each gain: a few counts instead of n indices.
    values, counts = np.unique(-np.asarray(gain), return_counts=True)
    n = int(counts.sum())
    totals = -np.random.default_rng(seed).multinomial(n, counts / n, size=RESAMPLES) @ values
    scale = n * len(runs_a)
    low, high = np.quantile(totals, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) / scale
    tail = int(min(np.sum(totals <= 0), np.sum(totals >= 0)))
    difference = float(np.sum(gain)) / scale
    return Difference(difference, float(low), float(high), min(1.0, 2 * (1 + tail) / (1 + RESAMPLES)))


def _in_order(run: pa.Table) -> pa.Table:
    """Rows by (key, label): twin images share a key; their labels may differ."""
    if not run.num_rows:
        raise ResultsError("predictions are empty: nothing to pair")
    return run.select(["key", "label", "prediction"]).sort_by([("key", "ascending"), ("label", "ascending")])


def _right(run: pa.Table, first: pa.Table) -> NDArray[np.bool_]:
    """Whether each prediction is right. Both in order; the images must be those of the first run."""
    if not run.select(["key", "label"]).equals(first.select(["key", "label"])):
        raise ResultsError(f"cannot pair predictions: {_mismatch(first, run)}")
    return run["prediction"].to_numpy() == run["label"].to_numpy()


def _mismatch(a: pa.Table, b: pa.Table) -> str:
    pairs_a, pairs_b = ([*zip(t["key"].to_pylist(), t["label"].to_pylist(), strict=True)] for t in (a, b))
    odd = set(pairs_a) ^ set(pairs_b)
    if {key for key, _ in pairs_a} == {key for key, _ in pairs_b} and odd:
        return f"different labels for image {min(odd)[0]!r}"
    return f"different test images ({len(pairs_a)} and {len(pairs_b)}, {len({key for key, _ in odd})} not in both)"
