"""Logistic regression on frozen features: the linear probe.

Knows no encoder and never sees a test image; nothing in it is tuned. The solver is scipy's L-BFGS on scikit-learn's
objective (`kshot bench baseline` compares the two); scikit-learn's own stops by the largest entry of the gradient of
the mean, which for many classes is long before the log-probabilities stand still.
"""

from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax

from baselines.inputs import Fitted, check_training, fitted
from baselines.scaling import Scaler
from kshot_errors import KshotError

# Inverse strength of the L2 penalty, fixed a priori: on features of unit variance it is a standard normal prior on
# every weight (and scikit-learn's default). At one shot there is no held-out image to choose it on, so it is chosen
# for no number of shots.
C = 1.0
GRADIENT = 1e-3  # of the objective, its largest entry where the solver stops; see `kshot bench baseline`
STEPS = 10_000


def fit_logistic_regression(train: np.ndarray, labels: np.ndarray, n_classes: int) -> Fitted:
    """Log-probabilities, in nats.

    Minimises C · Σ cross-entropy + ½ |W|² over features standardised by the mean and deviation of the training
    images; the intercepts are free. L-BFGS from zero, its products in float32: deterministic. The optimal W lies in
    the span of the training images (the representer theorem), so with fewer images than features the search is in
    coordinates of that span.

    Args:
        train: (N, D) features. labels: (N,) class indices.

    Raises:
        InputError: shapes, labels or numbers that cannot be used, or training images of a single class.
    """
    present = check_training(train, labels, n_classes)
    scaler = Scaler.of(train)
    scaled = scaler(train)
    basis = _span(scaled)
    weights, bias = _solved(scaled if basis is None else scaled @ basis, np.searchsorted(present, labels), len(present))
    if basis is not None:
        weights = basis @ weights
    return fitted(train.shape[1], n_classes, present, lambda test: log_softmax(scaler(test) @ weights + bias, axis=1))


def _span(scaled: np.ndarray) -> np.ndarray | None:
    """(D, rank) orthonormal columns that span the rows, where there are fewer of these than features."""
    if len(scaled) >= scaled.shape[1]:
        return None
    values, vectors = np.linalg.eigh(scaled @ scaled.T)
    kept = values > values[-1] * len(values) * np.finfo(float).eps
    basis: np.ndarray = scaled.T @ (vectors[:, kept] / np.sqrt(values[kept]))
    return basis


def _solved(features: np.ndarray, labels: np.ndarray, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights (D, classes) and intercepts (classes,) of the optimum."""
    start = np.zeros((features.shape[1] + 1) * n_classes)
    for dtype in (np.float32, np.float64):  # where rounding ends the line search too early, it goes on in float64
        found = _descended(features.astype(dtype), labels, n_classes, start)
        if np.abs(found.jac).max() <= GRADIENT:  # scipy also calls it success where the objective stands still
            weights, bias = np.split(found.x, [-n_classes])
            return weights.reshape(-1, n_classes), bias
        start = found.x
    raise KshotError(f"logistic regression did not converge ({found.message}); check the features")


def _descended(features: np.ndarray, labels: np.ndarray, n_classes: int, start: np.ndarray) -> Any:
    """scipy's result, from `start` on; the products over images are in the dtype of `features`."""
    rows, dtype = np.arange(len(labels)), features.dtype

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights, bias = np.split(flat, [-n_classes])
        logits = features @ weights.reshape(-1, n_classes).astype(dtype) + bias.astype(dtype)
        log_probs = log_softmax(logits, axis=1)
        loss = 0.5 * weights @ weights - C * log_probs[rows, labels].sum(dtype=np.float64)
        slope = C * np.exp(log_probs)
        slope[rows, labels] -= C
        return loss, np.concatenate([(features.T @ slope).ravel() + weights, slope.sum(axis=0, dtype=np.float64)])

    options = {"gtol": GRADIENT, "ftol": 0.0, "maxiter": STEPS, "maxfun": 2 * STEPS}
    return minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
