"""The heads of `kshot bench baseline` against scikit-learn's, on the same made features, in turn.

A head of ours includes what it chooses on its shots; scikit-learn's neighbours and means are told what was chosen, its
ridge chooses among the same penalties by its own leave-one-out.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression, RidgeClassifierCV
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.preprocessing import StandardScaler, normalize

from baselines.heads import HEADS, Head
from baselines.knn import TEMPERATURE
from baselines.linear import C
from baselines.ridge import PENALTIES
from experiments.bench import in_turn, row
from experiments.bench_baseline_grid import DIM, SIZES, load, shots_of
from kshot_errors import KshotError

ON = ("cars", 4)  # data set and shots
ON_QUICK = ("pets", 2)
AGREE = 0.99  # of predictions, at least
TOLERANCE = 1e-6  # of scikit-learn's logistic regression: at its default, 1e-4, it stops long before the optimum

Labels = np.ndarray
Peer = Callable[[np.ndarray, Labels, np.ndarray, Any], Labels]  # train, labels, test, what ours chose → predictions


def _scaled(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scaler = StandardScaler().fit(train.astype(np.float64))
    return scaler.transform(train.astype(np.float64)), scaler.transform(test.astype(np.float64))


def _logreg(train: np.ndarray, labels: Labels, test: np.ndarray, chosen: Any) -> Labels:
    scaled, asked = _scaled(train, test)
    found: Labels = LogisticRegression(C=C, tol=TOLERANCE, max_iter=10_000).fit(scaled, labels).predict(asked)
    return found


def _ridge(train: np.ndarray, labels: Labels, test: np.ndarray, chosen: Any) -> Labels:
    scaled, asked = _scaled(train, test)
    found: Labels = RidgeClassifierCV(np.array(PENALTIES) * DIM, scoring="accuracy").fit(scaled, labels).predict(asked)
    return found


def _knn(train: np.ndarray, labels: Labels, test: np.ndarray, chosen: Any) -> Labels:
    n = chosen["neighbours"]
    model = KNeighborsClassifier(n, metric="cosine", weights=lambda d: np.exp((1 - d) / TEMPERATURE))
    found: Labels = model.fit(train, labels).predict(test)
    return found


def _mean(train: np.ndarray, labels: Labels, test: np.ndarray, chosen: Any) -> Labels:
    """In a cosine space: the mean of unit vectors, then the nearest by angle, as scikit-learn has no centroid of it."""
    if chosen["space"] == "euclidean":
        found: Labels = NearestCentroid().fit(train, labels).predict(test)
        return found
    centre = train.mean(axis=0) if chosen["space"] == "centred cosine" else 0.0
    units, asked = normalize(train - centre), normalize(test - centre)
    centroids = normalize(NearestCentroid().fit(units, labels).centroids_)
    nearest: Labels = (asked @ centroids.T).argmax(axis=1)
    return nearest


PEERS: dict[str, Peer] = {"logreg": _logreg, "ridge": _ridge, "knn": _knn, "mean": _mean}


def measure(folder: Path, quick: bool) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of seconds and of agreement, and scikit-learn's seconds over ours for each head. Raises KshotError where
    predictions differ: speed bought with errors."""
    (dataset, shots), rounds = (ON_QUICK if quick else ON), 1 if quick else 3
    problem, n_classes = load(folder, dataset), SIZES[dataset].classes
    chosen = shots_of(problem.train_labels, shots, seed=0)
    train, labels, test = problem.train[chosen], problem.train_labels[chosen], problem.test
    rows, ratios = [], {}
    for name, head in HEADS.items():
        told, kept = head.fit(train, labels, n_classes).chosen, dict[str, Labels]()
        ours = partial(_ours, head, train, labels, test, n_classes)
        peer = partial(PEERS[name], train, labels, test, told)
        spent = in_turn({"ours": _keeping(kept, "ours", ours), "peer": _keeping(kept, "peer", peer)}, rounds)
        agree = float((kept["ours"] == kept["peer"]).mean())
        if agree < AGREE:
            raise KshotError(f"{name}: {100 * agree:.2f}% of predictions are scikit-learn's: nothing to compare")
        facts = {"dataset": dataset, "shots": shots, "chosen": dict(told), "agree": agree}
        rows += [row(f"{name}, kshot", spent["ours"], "s", **facts), row(f"{name}, scikit-learn", spent["peer"], "s")]
        ratios[f"{name}_vs_sklearn"] = median(b / a for a, b in zip(spent["ours"], spent["peer"], strict=True))
    return rows, ratios


def _ours(head: Head, train: np.ndarray, labels: Labels, test: np.ndarray, n_classes: int) -> Labels:
    found: Labels = head.fit(train, labels, n_classes).scores(test).argmax(axis=1)
    return found


def _keeping(kept: dict[str, Labels], name: str, run: Callable[[], Labels]) -> Callable[[], None]:
    def task() -> None:
        kept[name] = run()

    return task
