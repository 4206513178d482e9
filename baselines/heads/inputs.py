"""What all heads share: checks of features and labels, standardisation, principal directions, and linear maps.

No head has an argument for test images or their labels when it is fitted: nothing can be chosen on them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import numpy as np
from scipy.special import log_softmax

from kshot.errors import InputError


class Scaler:
    """Features to zero mean and unit variance: (features - mean) / deviation, mean and deviation (D,) float64."""

    def __init__(self, mean: np.ndarray, deviation: np.ndarray) -> None:
        self.mean, self.deviation = mean, deviation

    @classmethod
    def of(cls, train: np.ndarray) -> "Scaler":
        """That of (N, D) training features; a feature that is constant there becomes its distance from that."""
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


@dataclass(frozen=True)
class Linear:
    """A linear map of standardised features. weights: (D, n_classes) float32. bias: (n_classes,) float64, -inf for a
    class without a training image. log_probs: whether its outputs become log-probabilities, by softmax."""

    scaler: Scaler
    weights: np.ndarray
    bias: np.ndarray
    log_probs: bool

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """(M, D) features → (M, n_classes) float64."""
        outputs = (self.scaler(features, np.float32) @ self.weights).astype(np.float64) + self.bias
        return log_softmax(outputs, axis=1) if self.log_probs else outputs

    def spread(self, present: np.ndarray, n_classes: int) -> "Linear":
        """The same map with columns for all classes; its own are those of `present`."""
        weights = np.zeros((len(self.weights), n_classes), self.weights.dtype)
        bias = np.full(n_classes, -np.inf)
        weights[:, present], bias[present] = self.weights, self.bias
        return Linear(self.scaler, weights, bias, self.log_probs)


@dataclass(frozen=True)
class FittedHead:
    """A trained head.

    scores: (M, D) features → (M, n_classes) scores, higher is better; -inf for classes without a training image.
        Raises InputError for features that do not fit or are not finite.
    chosen: what was chosen on the training images, JSON values; empty where nothing was.
    linear: the same as arrays, where the head is a linear map.
    """

    scores: Callable[[np.ndarray], np.ndarray]
    chosen: Mapping[str, Any] = field(default_factory=dict)
    linear: Linear | None = None


Fit = Callable[[np.ndarray, np.ndarray, int], FittedHead]  # train (N, D), labels (N,), n_classes


def head(fit: Fit) -> Fit:
    """A head of `fit`, which then sees features and labels that are sound, and only classes that occur: they are
    counted from 0, in order.

    Raises InputError for shapes, labels or numbers that cannot be used, and for training images of a single class.
    """

    @wraps(fit)
    def checked(train: np.ndarray, labels: np.ndarray, n_classes: int) -> FittedHead:
        present = _check_training(train, labels, n_classes)
        fitted = fit(train, np.searchsorted(present, labels), len(present))

        def scores(test: np.ndarray) -> np.ndarray:
            if test.ndim != 2 or test.shape[1] != train.shape[1]:
                wanted = f"give (M, {train.shape[1]}) like the training ones"
                raise InputError(f"test features of shape {test.shape} do not fit; {wanted}")
            _check_finite("test", test)
            spread = np.full((len(test), n_classes), -np.inf)
            if len(test):
                spread[:, present] = fitted.scores(test)
            return spread

        linear = None if fitted.linear is None else fitted.linear.spread(present, n_classes)
        return FittedHead(scores, fitted.chosen, linear)

    return checked


def _check_training(train: np.ndarray, labels: np.ndarray, n_classes: int) -> np.ndarray:
    """The labels that occur, in order."""
    if train.ndim != 2:
        raise InputError(f"train features of shape {train.shape}; give (N, D)")
    if labels.shape != (count := len(train),) or count == 0:
        raise InputError(f"labels of shape {labels.shape} for {count} training images; give one label per image")
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"labels are {labels.dtype}; give class indices, whole numbers from 0")
    wrong = labels[(labels < 0) | (labels >= n_classes)]
    if wrong.size:
        raise InputError(f"label {wrong[0]} is not one of {n_classes} classes; labels go from 0 to {n_classes - 1}")

    _check_finite("train", train)
    present = np.unique(labels)
    if len(present) < 2:
        raise InputError(f"all {len(labels)} training images are of class {present[0]}; give at least two classes")
    return present


def _check_finite(name: str, features: np.ndarray) -> None:
    broken = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if broken.size:
        raise InputError(f"{name} features of image {broken[0]} are not finite; check the encoder and that image")


def principal(scaled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Directions (D, rank), orthonormal, that span the rows of (N, D), and the squared singular values (rank,) along
    them; through the smaller of the two Gram matrices."""
    wide = len(scaled) < scaled.shape[1]
    squared, vectors = np.linalg.eigh(scaled @ scaled.T if wide else scaled.T @ scaled)
    kept = squared > squared[-1] * len(squared) * np.finfo(float).eps
    squared, vectors = squared[kept], vectors[:, kept]
    return (scaled.T @ (vectors / np.sqrt(squared)) if wide else vectors), squared
