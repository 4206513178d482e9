"""Nearest neighbours on features; and on raw pixels, the floor for every other method.

Scores are votes or negative distances: they rank the classes and are no probabilities.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from scipy.spatial.distance import cdist

from baselines.heads.inputs import FittedHead, check_training, fitted_head
from baselines.heads.mean import unit
from baselines.heads.selection import choose, folds
from kshot.images import open_image

# Distances held at a time: 32 MiB of float64.
BLOCK = 1 << 22
NEIGHBOURS = (1, 3, 5, 10, 20)  # the first is the one fixed a priori
TEMPERATURE = 0.07


def fit_knn(train: np.ndarray, labels: np.ndarray, n_classes: int) -> FittedHead:
    """Votes of the n nearest training images by cosine, each weighted by exp(cosine / 0.07).

    The protocol of DINO (Caron et al. 2021, arXiv:2104.14294, after Wu et al. 2018); n is the one of NEIGHBOURS that
    leave-one-shot-out chooses. Products are float32: neighbours whose cosines differ by less than 1e-6 may swap.
    Raises InputError as `check_training` and `choose` do.
    """
    present = check_training(train, labels, n_classes)
    units, indices = unit(train.astype(np.float32)), np.searchsorted(present, labels)
    n = choose(_possible(indices), indices, _HeldOut(units, indices, len(present)).predicted)

    def scores(test: np.ndarray) -> np.ndarray:
        queries = unit(test.astype(np.float32))
        cosines = (block @ units.T for _, block in _blocks(queries, len(units)))
        return np.concatenate([_votes(*_nearest(each, n), indices, len(present)) for each in cosines])

    return fitted_head(train.shape[1], n_classes, present, scores, {"neighbours": n})


def _possible(indices: np.ndarray) -> Sequence[int]:
    """As many neighbours as there are when a fold is left out."""
    left = len(indices) - np.bincount(folds(indices)).max()
    return [n for n in NEIGHBOURS if n <= max(left, NEIGHBOURS[0])]


class _HeldOut:
    """The nearest neighbours of every training image in the other folds, found once for all numbers of them."""

    def __init__(self, units: np.ndarray, indices: np.ndarray, count: int) -> None:
        self._indices, self._count, fold = indices, count, folds(indices)
        parts = []
        for start, block in _blocks(units, len(units)):
            cosines = block @ units.T
            cosines[fold[start : start + len(block), None] == fold] = -np.inf
            parts.append(_nearest(cosines, max(_possible(indices))))
        self._cosines, self._neighbours = (np.concatenate(part) for part in zip(*parts, strict=True))

    def predicted(self, n: int) -> np.ndarray:
        """(N,) the class that n neighbours vote for."""
        return _votes(self._cosines[:, :n], self._neighbours[:, :n], self._indices, self._count).argmax(axis=1)


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


def fit_nearest_neighbour(train: np.ndarray, labels: np.ndarray, n_classes: int) -> FittedHead:
    """Minus the Euclidean distance to the nearest training image of each class; nothing is chosen.

    Exact: distances are sums of squared differences in float64, so equal distances come out equal, and argmax then
    takes the lower class. The usual |a|² - 2ab + |b|² is faster and is not.
    Raises InputError as `check_training` does.
    """
    present = check_training(train, labels, n_classes)

    def scores(test: np.ndarray) -> np.ndarray:
        distances = (cdist(block, train) for _, block in _blocks(test, len(train)))
        return np.concatenate(
            [np.stack([-block[:, labels == label].min(axis=1) for label in present], axis=1) for block in distances]
        )

    return fitted_head(train.shape[1], n_classes, present, scores)


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
