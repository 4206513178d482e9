"""Nearest neighbour, on any features or on raw pixels: the floor every method has to clear.

Knows no encoder. Scores are negative distances: they rank the classes and are not probabilities.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from scipy.spatial.distance import cdist

from baselines.inputs import check_features
from kshot_images import open_image

# Distances held at a time: 32 MiB of float64.
BLOCK = 1 << 22


def pixels(images: Sequence[bytes], side: int = 32) -> np.ndarray:
    """(N, side * side * 3) float32 in 0..255: each JPEG or PNG file squeezed to side x side RGB, bicubic.

    Raises:
        ImageError: bytes that are no image.
    """
    small = np.empty((len(images), side, side, 3), np.float32)
    for n, image in enumerate(images):
        small[n] = np.asarray(open_image(image).resize((side, side), Image.Resampling.BICUBIC))
    return small.reshape(len(images), side * side * 3)


def nearest_neighbour(train: np.ndarray, labels: np.ndarray, test: np.ndarray, n_classes: int) -> np.ndarray:
    """(M, n_classes) float64: minus the Euclidean distance to the nearest training example of each class.

    Exact: distances are sums of squared differences in float64, so equal distances come out equal, and argmax then
    takes the lower class. The usual |a|² - 2ab + |b|² is faster and is not. Classes without an example get -inf.

    Args:
        train: (N, D) features. labels: (N,) class indices. test: (M, D) features.

    Raises:
        InputError: shapes, labels or numbers that cannot be used.
    """
    check_features(train, labels, test, n_classes)
    scores = np.full((len(test), n_classes), -np.inf)
    rows = max(1, BLOCK // len(train))
    for start in range(0, len(test), rows):
        distances = cdist(test[start : start + rows], train)
        for label in np.unique(labels):
            scores[start : start + rows, label] = -distances[:, labels == label].min(axis=1)
    return scores
