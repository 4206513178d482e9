"""What every head requires of its features and labels, checked in one place.

Knows no head. There is no argument for test labels, here or in any head: nothing can be chosen on them.
"""

import numpy as np

from kshot_errors import InputError


def check_labels(labels: np.ndarray, n_classes: int, count: int) -> None:
    """Raises InputError unless `labels` are `count` ≥ 1 whole numbers in 0..n_classes - 1."""
    if labels.shape != (count,) or count == 0:
        raise InputError(f"labels of shape {labels.shape} for {count} training images; give one label per image")
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"labels are {labels.dtype}; give class indices, whole numbers from 0")
    wrong = labels[(labels < 0) | (labels >= n_classes)]
    if wrong.size:
        raise InputError(f"label {wrong[0]} is not one of {n_classes} classes; labels go from 0 to {n_classes - 1}")


def check_features(train: np.ndarray, labels: np.ndarray, test: np.ndarray, n_classes: int) -> None:
    """Raises InputError unless train is (N, D), labels (N,), test (M, D), all numbers finite."""
    if train.ndim != 2 or test.ndim != 2 or train.shape[1] != test.shape[1]:
        raise InputError(f"train {train.shape} and test {test.shape} features do not fit; give (N, D) and (M, D)")
    check_labels(labels, n_classes, len(train))
    for name, features in (("train", train), ("test", test)):
        broken = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if broken.size:
            raise InputError(f"{name} features of image {broken[0]} are not finite; check the encoder and that image")
