"""The table of heads on frozen features. A head is fitted on training features and labels alone."""

from dataclasses import dataclass

from baselines.heads.inputs import Fit
from baselines.heads.knn import fit_knn
from baselines.heads.linear import fit_logistic_regression
from baselines.heads.mean import fit_nearest_mean
from baselines.heads.ridge import fit_ridge


@dataclass(frozen=True)
class Head:
    """probabilities: whether its scores are log-probabilities. chooses: whether it chooses settings on its
    training images, which then are all of one image a class or of two at least."""

    fit: Fit
    probabilities: bool
    chooses: bool


HEADS = {
    "logreg": Head(fit_logistic_regression, probabilities=True, chooses=False),
    "ridge": Head(fit_ridge, probabilities=False, chooses=True),
    "knn": Head(fit_knn, probabilities=False, chooses=True),
    "mean": Head(fit_nearest_mean, probabilities=False, chooses=True),
}
