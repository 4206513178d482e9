"""Nearest class means on features. Scores are cosines or negative squared distances: they rank the classes."""

from collections.abc import Callable
from functools import partial

import numpy as np

from baselines.heads.inputs import FittedHead, head
from baselines.heads.selection import choose, folds

Model = Callable[[np.ndarray], np.ndarray]


def _centred_cosine(train: np.ndarray, indices: np.ndarray, count: int) -> Model:
    """SimpleShot's CL2N (Wang et al. 2019, arXiv:1911.04623), centred by the training images."""
    centre = train.mean(axis=0)
    model = _cosine(train - centre, indices, count)
    return lambda test: model(test - centre)


def _cosine(train: np.ndarray, indices: np.ndarray, count: int) -> Model:
    means = unit(_means(unit(train), indices, count))
    return lambda test: unit(test) @ means.T


def _euclidean(train: np.ndarray, indices: np.ndarray, count: int) -> Model:
    """Minus the squared distances; centred, so that float32 has digits left for differences."""
    centre = train.mean(axis=0)
    means = _means(train - centre, indices, count)
    squares = np.sum(means**2, axis=1)

    def scores(test: np.ndarray) -> np.ndarray:
        moved = test - centre
        return 2 * moved @ means.T - squares - np.sum(moved**2, axis=1, keepdims=True)

    return scores


# The first is the one fixed a priori.
SPACES = {"centred cosine": _centred_cosine, "cosine": _cosine, "euclidean": _euclidean}


@head
def fit_nearest_mean(train: np.ndarray, labels: np.ndarray, n_classes: int) -> FittedHead:
    """Similarity to the mean of each class, in the one of SPACES that leave-one-shot-out chooses.

    In float32, as features come: scores that differ by less than 1e-6 may swap.
    Raises InputError as `choose` does.
    """
    train = train.astype(np.float32)
    space = choose(list(SPACES), labels, partial(_held_out, train, labels, n_classes))
    model = SPACES[space](train, labels, n_classes)
    return FittedHead(lambda test: model(test.astype(np.float32)), {"space": space})


def unit(vectors: np.ndarray) -> np.ndarray:
    """(N, D) rows of length 1; a zero row stays zero."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)


def _held_out(train: np.ndarray, indices: np.ndarray, count: int, space: str) -> np.ndarray:
    """(N,) the class predicted for each image by the means of the other folds."""
    fold, predicted = folds(indices), np.empty(len(indices), np.int64)
    for each in range(fold.max() + 1):
        out = fold == each
        predicted[out] = SPACES[space](train[~out], indices[~out], count)(train[out]).argmax(axis=1)
    return predicted


def _means(vectors: np.ndarray, indices: np.ndarray, count: int) -> np.ndarray:
    """(count, D) the mean of each class; each has a vector at least."""
    order, counts = np.argsort(indices, kind="stable"), np.bincount(indices, minlength=count)
    sums = np.add.reduceat(vectors[order], counts.cumsum() - counts, axis=0)
    means: np.ndarray = sums / counts[:, None].astype(vectors.dtype)
    return means
