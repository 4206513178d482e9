"""Ridge regression on frozen features, one output a class, in closed form; its penalty is chosen by leave-one-out.

Scores are regression outputs: they rank classes and are no probabilities.
"""

import numpy as np

from baselines.heads.inputs import FittedHead, Linear, Scaler, head, principal
from baselines.heads.selection import choose

# In units of the number of features: on standardised features 1 means that signal and noise are believed equally
# strong. The first is the one fixed a priori.
PENALTIES = (1.0, 1e-3, 1e-2, 1e-1, 1e1, 1e2, 1e3)


@head
def fit_ridge(train: np.ndarray, labels: np.ndarray, n_classes: int) -> FittedHead:
    """Outputs of the regression on 1 for an image's class and 0 for the others.

    Minimises |Y - XW - b|² + λ |W|² over standardised features, with free intercepts. λ is the one of PENALTIES
    (times D) with the most right leave-one-out answers, which a linear smoother has in closed form (Allen 1974): the
    residual divided by one minus the leverage. The squared leave-one-out error would be the other usual criterion; at
    few shots it is less for outputs near zero, whoever wins. (Features are standardised once, over all training
    images, as in scikit-learn's RidgeClassifierCV on scaled features.) With one image a class, leaving it out leaves
    none: λ is then the first.
    Raises InputError as `choose` does.
    """
    scaler = Scaler.of(train)
    spectrum = _Spectrum(scaler(train), np.eye(n_classes)[labels])
    penalty = choose([float(each * train.shape[1]) for each in PENALTIES], labels, spectrum.held_out)
    linear = Linear(scaler, spectrum.weights(penalty).astype(np.float32), spectrum.mean, log_probs=False)
    return FittedHead(linear, {"penalty": penalty}, linear)


class _Spectrum:
    """The training images along their principal directions, where every λ's solution is a rescaling.

    directions: (D, rank). squared: (rank,) squared singular values. left: (N, rank) orthonormal, left singular vectors.
    targets: (N, classes), mean: (classes,) theirs. projected: (rank, classes) the centred targets in these coordinates.
    """

    def __init__(self, scaled: np.ndarray, targets: np.ndarray) -> None:
        self.directions, self.squared = principal(scaled)
        self.left = scaled @ (self.directions / np.sqrt(self.squared))
        self.targets, self.mean = targets, targets.mean(axis=0)
        self.projected = self.left.T @ (targets - self.mean)

    def held_out(self, penalty: float) -> np.ndarray:
        """(N,) the class that a regression on all other images predicts for each one."""
        shrunk = self.squared / (self.squared + penalty)
        residual = self.targets - self.mean - self.left @ (shrunk[:, None] * self.projected)
        free = 1 - 1 / len(self.targets) - self.left**2 @ shrunk  # one minus the leverage; the intercept has 1/N
        predicted: np.ndarray = (self.targets - residual / free[:, None]).argmax(axis=1)
        return predicted

    def weights(self, penalty: float) -> np.ndarray:
        """(D, classes)."""
        slope = np.sqrt(self.squared) / (self.squared + penalty)
        solution: np.ndarray = self.directions @ (slope[:, None] * self.projected)
        return solution
