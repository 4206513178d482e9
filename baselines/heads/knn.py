"""Nearest neighbours on features; and on raw pixels, the floor for every other method.

Scores are votes or negative distances: they rank the classes and are no probabilities.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from scipy.spatial.distance import cdist

from baselines.heads.inputs import FittedHead, head
from baselines.heads.mean import unit
from baselines.heads.selection import choose, folds
from kshot.images import open_image

# Distances held at a time: 32 MiB of float64.
BLOCK = 1 << 22
NEIGHBOURS = (1, 3, 5, 10, 20)  # the first is the one fixed a priori
TEMPERATURE = 0.07


@head
def fit_knn(train: np.ndarray, labels: np.ndarray, n_classes: int) -> FittedHead:
    """Votes of the n nearest training images by cosine, each weighted by exp(cosine / 0.07).

    The protocol of DINO (Caron et al. 2021, arXiv:2104.14294, after Wu et al. 2018); n is the one of NEIGHBOURS that
    leave-one-shot-out chooses. Products are float32: neighbours whose cosines differ by less than 1e-6 may swap.
    Raises InputError as `choose` does.
    """
    units = unit(train.astype(np.float32))
    left = len(labels) - np.bincount(folds(labels)).max()  # as many neighbours as there are without a fold
    possible = [n for n in NEIGHBOURS if n <= max(left, NEIGHBOURS[0])]
    cosines, neighbours = _held_out(units, labels, max(possible))
    n = choose(possible, labels, lambda n: _votes(cosines[:, :n], neighbours[:, :n], labels, n_classes).argmax(axis=1))

    def scores(test: np.ndarray) -> np.ndarray:
        queries = unit(test.astype(np.float32))
        cosines = (block @ units.T for _, block in _blocks(queries, len(units)))
        return np.concatenate([_votes(*_nearest(each, n), labels, n_classes) for each in cosines])

    return FittedHead(scores, {"neighbours": n})


def _held_out(units: np.ndarray, labels: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, n) cosines of every training image's nearest neighbours in the other folds, and which these are."""
    fold, parts = folds(labels), []
    for start, block in _blocks(units, len(units)):
        cosines = block @ units.T
        cosines[fold[start : start + len(block), None] == fold] = -np.inf
        parts.append(_nearest(cosines, n))
    nearest, neighbours = (np.concatenate(part) for part in zip(*parts, strict=True))
    return nearest, neighbours


def _nearest(cosines: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(B, n) the largest of (B, N) cosines, the largest first, and whose they are."""
    if n > 1:
        values, nearest = torch.topk(torch.from_numpy(cosines), n, dim=1)
        return values.numpy(), nearest.numpy()
    first = cosines.argmax(axis=1)[:, None]  # the lower index of equals
    return np.take_along_axis(cosines, first, axis=1), first


def _votes(cosines: np.ndarray, neighbours: np.ndarray, indices: np.ndarray, count: int) -> np.ndarray:
    """(B, count) float64: the sum of a class's votes."""
    rows = np.arange(len(cosines))[:, None] * count
    weights = np.exp(cosines.astype(np.float64) / TEMPERATURE)
    votes = np.bincount((rows + indices[neighbours]).ravel(), weights.ravel(), len(cosines) * count)
    return votes.reshape(len(cosines), count)


@head
def fit_nearest_neighbour(train: np.ndarray, labels: np.ndarray, n_classes: int) -> FittedHead:
    """Minus the Euclidean distance to the nearest training image of each class; nothing is chosen.

    Exact: distances are sums of squared differences in float64, so equal distances come out equal, and argmax then
    takes the lower class. The usual |a|² - 2ab + |b|² is faster and is not.
    """

    def scores(test: np.ndarray) -> np.ndarray:
        distances = (cdist(block, train) for _, block in _blocks(test, len(train)))
        nearest = ([each[:, labels == label].min(axis=1) for label in range(n_classes)] for each in distances)
        return -np.concatenate([np.stack(columns, axis=1) for columns in nearest])

    return FittedHead(scores)


def pixels(images: Sequence[bytes], side: int = 32) -> np.ndarray:
    """(N, side * side * 3) float32 in 0..255: each JPEG or PNG file squeezed to side x side RGB, bicubic.

    Raises:
        ImageError: bytes that are no image.
    """
    small = np.empty((len(images), side, side, 3), np.float32)
    for n, image in enumerate(images):
        small[n] = np.asarray(open_image(image).resize((side, side), Image.Resampling.BICUBIC))
    return small.reshape(len(images), side * side * 3)


def _blocks(rows: np.ndarray, others: int) -> Iterator[tuple[int, np.ndarray]]:
    """(number of its first row, block) of `rows`: those whose distances to so many others are in memory together."""
    step = max(1, BLOCK // others)
    return ((start, rows[start : start + step]) for start in range(0, len(rows), step))
