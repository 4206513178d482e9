"""Logistic regression on frozen features: the linear probe.

Knows no encoder and never sees a test label; nothing in it is tuned.
"""

import numpy as np
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from baselines.inputs import check_features
from kshot_errors import InputError

# Inverse strength of the L2 penalty, fixed a priori: on features of unit variance it is a standard normal prior on
# every weight (and scikit-learn's default). At one shot there is no held-out image to choose it on, so it is chosen
# for no number of shots.
C = 1.0


def logistic_regression(train: np.ndarray, labels: np.ndarray, test: np.ndarray, n_classes: int) -> np.ndarray:
    """(M, n_classes) float64 log-probabilities, in nats; classes without a training example get -inf.

    Minimises C · Σ cross-entropy + ½ |W|² over features standardised by the mean and deviation of the training
    images; the intercepts are free. With two classes present W is one vector, scikit-learn's binary form. L-BFGS from
    zero in float64: deterministic.

    Args:
        train: (N, D) features. labels: (N,) class indices. test: (M, D) features.

    Raises:
        InputError: shapes, labels or numbers that cannot be used, or training images of a single class.
    """
    check_features(train, labels, test, n_classes)
    present = np.unique(labels)
    if len(present) < 2:
        raise InputError(f"all {len(labels)} training images are of class {present[0]}; give at least two classes")
    scaler = StandardScaler().fit(train.astype(np.float64))
    head = LogisticRegression(C=C, tol=1e-6, max_iter=10_000).fit(scaler.transform(train.astype(np.float64)), labels)
    log_probs = np.full((len(test), n_classes), -np.inf)
    if len(test):
        log_probs[:, present] = _log_probs(head.decision_function(scaler.transform(test.astype(np.float64))))
    return log_probs


def _log_probs(decision: np.ndarray) -> np.ndarray:
    """Log-softmax of the scores; not log(predict_proba), which is -inf where a probability underflows."""
    if decision.ndim == 1:  # two classes: the score of the second, against 0
        decision = np.stack([np.zeros_like(decision), decision], axis=1)
    return log_softmax(decision, axis=1)
