"""Problems for the heads: overlapping classes."""

import numpy as np

Problem = tuple[np.ndarray, np.ndarray, np.ndarray]  # train, labels, test


def clusters(n_classes: int, shots: int, dim: int, *, tests: int = 7, noise: float = 1.0, seed: int = 0) -> Problem:
    """Gaussian classes; float32 features as an encoder gives them, labels in mixed order."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(n_classes), shots))
    centres = rng.normal(size=(n_classes, dim))
    train = centres[labels] + noise * rng.normal(size=(len(labels), dim)) + 0.5
    test = centres[rng.integers(n_classes, size=tests)] + noise * rng.normal(size=(tests, dim)) + 0.5
    return train.astype(np.float32), labels, test.astype(np.float32)
