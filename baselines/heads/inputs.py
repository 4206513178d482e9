"""What all heads share: checks of features and labels, the fitted head, standardisation and principal directions.

No head has an argument for test images or their labels when it is fitted: nothing can be chosen on them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kshot.errors import InputError


@dataclass(frozen=True)
class FittedHead:
    """A trained head.

    scores: (M, D) features → (M, n_classes) scores, higher is better; -inf for classes without a training image.
        Raises InputError for features that do not fit or are not finite.
    chosen: what was chosen on the training images, JSON values; empty where nothing was.
    """

    scores: Callable[[np.ndarray], np.ndarray]
    chosen: Mapping[str, Any] = field(default_factory=dict)


def check_labels(labels: np.ndarray, n_classes: int, count: int) -> None:
    """Raises InputError unless `labels` are `count` ≥ 1 whole numbers in 0..n_classes - 1."""
    if labels.shape != (count,) or count == 0:
        raise InputError(f"labels of shape {labels.shape} for {count} training images; give one label per image")
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"labels are {labels.dtype}; give class indices, whole numbers from 0")
    wrong = labels[(labels < 0) | (labels >= n_classes)]
    if wrong.size:
        raise InputError(f"label {wrong[0]} is not one of {n_classes} classes; labels go from 0 to {n_classes - 1}")


def check_training(train: np.ndarray, labels: np.ndarray, n_classes: int) -> np.ndarray:
    """The labels that occur, in order.

    train: (N, D) features. labels: (N,) class indices. Raises InputError for shapes, labels or numbers that cannot be
    used, and for training images of a single class.
    """
    if train.ndim != 2:
        raise InputError(f"train features of shape {train.shape}; give (N, D)")
    check_labels(labels, n_classes, len(train))
    _check_finite("train", train)
    present = np.unique(labels)
    if len(present) < 2:
        raise InputError(f"all {len(labels)} training images are of class {present[0]}; give at least two classes")
    return present


def fitted_head(
    dim: int,
    n_classes: int,
    present: np.ndarray,
    scores: Callable[[np.ndarray], np.ndarray],
    chosen: Mapping[str, Any] | None = None,
) -> FittedHead:
    """A FittedHead of `scores`, (M, dim) → (M, present) float64, that checks its features and spreads its columns."""

    def checked(test: np.ndarray) -> np.ndarray:
        if test.ndim != 2 or test.shape[1] != dim:
            raise InputError(f"test features of shape {test.shape} do not fit; give (M, {dim}) like the training ones")
        _check_finite("test", test)
        spread = np.full((len(test), n_classes), -np.inf)
        if len(test):
            spread[:, present] = scores(test)
        return spread

    return FittedHead(checked, chosen or {})


def _check_finite(name: str, features: np.ndarray) -> None:
    broken = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if broken.size:
        raise InputError(f"{name} features of image {broken[0]} are not finite; check the encoder and that image")


@dataclass(frozen=True)
class Scaler:
    """Features to zero mean and unit variance; a feature that is constant in training becomes its distance from that.

    mean, deviation: (D,) float64, of the training images.
    """

    mean: np.ndarray
    deviation: np.ndarray

    @classmethod
    def of(cls, train: np.ndarray) -> "Scaler":
        """The scaler of (N, D) training features."""
        exact = train.astype(np.float64)
        mean, deviation = exact.mean(axis=0), exact.std(axis=0)
        # A constant column's deviation is rounding noise of its mean, which must not become a feature.
        noise = 10 * np.finfo(np.float64).eps * np.abs(mean)
        return cls(mean, np.where(deviation > noise, deviation, 1.0))

    def __call__(self, features: np.ndarray, dtype: type[np.floating] = np.float64) -> np.ndarray:
        """(M, D) of this dtype; float32 is half the work and loses no more than float32 features have lost already."""
        mean, deviation = self.mean.astype(dtype), self.deviation.astype(dtype)
        scaled: np.ndarray = (features.astype(dtype, copy=False) - mean) / deviation
        return scaled


def principal(scaled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Directions (D, rank), orthonormal, that span the rows of (N, D), and the squared singular values (rank,) along
    them; through the smaller of the two Gram matrices."""
    wide = len(scaled) < scaled.shape[1]
    squared, vectors = np.linalg.eigh(scaled @ scaled.T if wide else scaled.T @ scaled)
    kept = squared > squared[-1] * len(squared) * np.finfo(float).eps
    squared, vectors = squared[kept], vectors[:, kept]
    return (scaled.T @ (vectors / np.sqrt(squared)) if wide else vectors), squared
