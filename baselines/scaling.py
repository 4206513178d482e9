"""Standardisation by training images alone, and the directions in which they spread. Knows no head."""

from dataclasses import dataclass

import numpy as np


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
