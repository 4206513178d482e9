"""Ridge regression on frozen features, one output a class, in closed form; its penalty is chosen by leave-one-out.

Knows no encoder and never sees a test image. Scores are regression outputs: they rank classes and are no
probabilities.
"""

from dataclasses import dataclass

import numpy as np

from baselines.inputs import Fitted, check_training, fitted
from baselines.scaling import Scaler
from baselines.selection import choose

# In units of the number of features: on standardised features 1 means that signal and noise are believed equally
# strong. The first is the one fixed a priori.
PENALTIES = (1.0, 1e-3, 1e-2, 1e-1, 1e1, 1e2, 1e3)


def fit_ridge(train: np.ndarray, labels: np.ndarray, n_classes: int) -> Fitted:
    """Outputs of the regression on 1 for an image's class and 0 for the others.

    Minimises |Y - XW - b|² + λ |W|² over standardised features, with free intercepts. λ is the one of PENALTIES
    (times D) with the most right leave-one-out answers, which a linear smoother has in closed form (Allen 1974): the
    residual divided by one minus the leverage. The squared leave-one-out error would be the other usual criterion; at
    few shots it is less for outputs near zero, whoever wins. (Features are standardised once, over all training
    images, as in scikit-learn's RidgeClassifierCV on scaled features.) With one image a class, leaving it out leaves
    none: λ is then the first.

    Args:
        train: (N, D) features. labels: (N,) class indices.

    Raises:
        InputError: shapes, labels or numbers that cannot be used; training images of a single class; a class with one
            image beside classes with more.
    """
    present = check_training(train, labels, n_classes)
    scaler, indices = Scaler.of(train), np.searchsorted(present, labels)
    scaled, targets = scaler(train), np.eye(len(present))[indices]
    spectrum = _Spectrum.of(scaled, targets)
    penalty = choose([float(each * train.shape[1]) for each in PENALTIES], indices, spectrum.held_out)
    weights, mean = spectrum.weights(scaled, penalty).astype(np.float32), targets.mean(axis=0)
    return fitted(
        train.shape[1],
        n_classes,
        present,
        lambda test: scaler(test, np.float32) @ weights + mean,
        {"penalty": penalty},
    )


@dataclass(frozen=True)
class _Spectrum:
    """The eigenvectors of the training images' Gram matrix, in which every λ's solution is a rescaling.

    left: (N, rank) orthonormal. squared: (rank,) squared singular values. targets: (N, classes), centred.
    inside: (rank, classes) the targets in these coordinates.
    """

    left: np.ndarray
    squared: np.ndarray
    targets: np.ndarray
    inside: np.ndarray

    @classmethod
    def of(cls, scaled: np.ndarray, targets: np.ndarray) -> "_Spectrum":
        """Through the smaller of the two Gram matrices."""
        wide = len(scaled) < scaled.shape[1]
        squared, vectors = np.linalg.eigh(scaled @ scaled.T if wide else scaled.T @ scaled)
        kept = squared > squared[-1] * len(squared) * np.finfo(float).eps
        squared, vectors = squared[kept], vectors[:, kept]
        left = vectors if wide else scaled @ (vectors / np.sqrt(squared))
        centred = targets - targets.mean(axis=0)
        return cls(left, squared, centred, left.T @ centred)

    def held_out(self, penalty: float) -> np.ndarray:
        """(N,) the class that a regression on all other images says for each one."""
        shrunk = self.squared / (self.squared + penalty)
        residual = self.targets - self.left @ (shrunk[:, None] * self.inside)
        free = 1 - 1 / len(self.targets) - self.left**2 @ shrunk  # one minus the leverage; the intercept has 1/N
        answers: np.ndarray = (self.targets - residual / free[:, None]).argmax(axis=1)
        return answers

    def weights(self, scaled: np.ndarray, penalty: float) -> np.ndarray:
        """(D, classes)."""
        solution: np.ndarray = scaled.T @ (self.left @ (self.inside / (self.squared + penalty)[:, None]))
        return solution
