"""Logistic regression on frozen features: the linear probe.

Nothing in it is tuned. The objective is scikit-learn's. Its own solver at
its default tolerance stops, for many classes, before predictions stand still, and takes several times as long where
they do (`kshot bench baseline` has the two side by side).
"""

import numpy as np
import torch
from torch import Tensor

from baselines.heads.inputs import FittedHead, Linear, Scaler, head, principal
from kshot.errors import KshotError

# Inverse strength of the L2 penalty, fixed a priori: on features of unit variance it is a standard normal prior on
# every weight (and scikit-learn's default). At one shot there is no held-out image to choose it on, so it is chosen
# for no number of shots.
C = 1.0
# What a typical p(1 - p) is where a head has learnt, p the probability of a class. It is for speed alone: with it the
# search has half as many steps on the benchmark's 196 classes of 16 images.
CURVATURE = 3e-4
# The largest entry of the gradient where the solver stops, in coordinates in which the curvature is about one: scores
# are then some hundredths of a nat from the optimum.
GRADIENT = 1e-3
STEPS = 2_000


@head
def fit_logistic_regression(train: np.ndarray, labels: np.ndarray, n_classes: int) -> FittedHead:
    """Log-probabilities, in nats.

    Minimises C · Σ cross-entropy + ½ |W|² over features standardised by the mean and deviation of the training
    images; the intercepts are free. The optimal W lies in the span of the training images (the representer theorem),
    so the search is in coordinates of that span: along its principal directions, each divided by the root of the
    curvature to expect there, 1 + C · CURVATURE · squared singular value. L-BFGS from zero, its products in float32:
    deterministic.
    Raises KshotError where it does not converge.
    """
    scaler = Scaler.of(train)
    scaled = scaler(train)
    directions, squared = principal(scaled)
    basis = directions / np.sqrt(1 + C * CURVATURE * squared)
    point = _solved(scaled @ basis, basis, labels, n_classes)
    linear = Linear(scaler, (basis @ point[:-1]).astype(np.float32), point[-1], log_probs=True)
    return FittedHead(linear, linear=linear)


def _solved(features: np.ndarray, basis: np.ndarray, labels: np.ndarray, n_classes: int) -> np.ndarray:
    """(rank + 1, classes) the optimal weights along `basis`, and below them the intercepts. features: (N, rank)."""
    point = torch.zeros((features.shape[1] + 1, n_classes), dtype=torch.float64)
    lengths = torch.from_numpy((basis**2).sum(axis=0))  # the columns are orthogonal: |W|² is a sum along them
    for dtype in (torch.float32, torch.float64):  # where rounding ends the line search too early, it goes on in float64
        gradient = _descend(torch.from_numpy(features).to(dtype), lengths, torch.from_numpy(labels), point)
        if gradient <= GRADIENT:
            return point.numpy()
    reason = f"logistic regression did not converge in {STEPS} steps (gradient {gradient:.1g}, not {GRADIENT})"
    raise KshotError(f"{reason}; check the features")


def _descend(features: Tensor, lengths: Tensor, labels: Tensor, point: Tensor) -> float:
    """Move `point` to the optimum; returns the largest entry of the gradient there.

    The products over images are in the dtype of `features`, all sums in float64.
    """
    rows, dtype = torch.arange(len(labels)), features.dtype
    point.grad = gradient = torch.empty_like(point)

    def objective() -> Tensor:
        weights, bias = point[:-1], point[-1]
        decay = lengths[:, None] * weights
        slope = torch.log_softmax(torch.addmm(bias.to(dtype), features, weights.to(dtype)), dim=1)
        loss = 0.5 * (decay * weights).sum() - C * slope[rows, labels].sum(dtype=torch.float64)
        slope = slope.exp_()
        slope[rows, labels] -= 1
        gradient[:-1] = decay + C * (features.T @ slope)
        gradient[-1] = C * slope.sum(0, dtype=torch.float64)
        return loss

    with torch.no_grad():
        torch.optim.LBFGS(
            [point],
            max_iter=STEPS,
            max_eval=2 * STEPS,
            tolerance_grad=GRADIENT,
            tolerance_change=0.0,
            history_size=10,
            line_search_fn="strong_wolfe",
        ).step(objective)
        objective()  # the line search may have ended at another point
    return float(gradient.abs().max())
