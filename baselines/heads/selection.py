"""Chooses among a head's options on its k shots alone, by leaving out one shot of every class at a time.

Fold j holds the j-th image of each class and is predicted from all other folds. At one shot nothing can be left out:
the first option, fixed a priori, is taken.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from kshot.errors import InputError

T = TypeVar("T")


def folds(labels: np.ndarray) -> np.ndarray:
    """(N,) the fold of each image: how many images of its class come before it."""
    order, counts = np.argsort(labels, kind="stable"), np.bincount(labels)
    fold = np.empty(len(labels), np.int64)
    fold[order] = np.arange(len(labels)) - np.repeat(counts.cumsum() - counts, counts)
    return fold


def choose(options: Sequence[T], labels: np.ndarray, held_out: Callable[[T], np.ndarray]) -> T:
    """The option with the most right answers; the first of equals, and at one shot the first of all.

    held_out: an option → (N,) the label it predicts for each image, learnt from the other folds.
    Raises InputError where one class has a single image and another has more: left out, that class would be gone.
    """
    present, counts = np.unique(labels, return_counts=True)
    if counts.max() == 1:
        return options[0]
    if counts.min() == 1:
        raise InputError(
            f"class {present[counts.argmin()]} has one image and others have up to {counts.max()}: settings are chosen "
            "by leaving one out, and then it has none; give it a second image, or every class one alone"
        )
    right = [int((held_out(option) == labels).sum()) for option in options]
    return options[int(np.argmax(right))]
