"""Logistic regression and nearest neighbour against computations written down independently."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from scipy.optimize import minimize
from scipy.special import logsumexp

from baselines.knn import nearest_neighbour, pixels
from baselines.linear import logistic_regression
from kshot_errors import ImageError, InputError

HEADS = [logistic_regression, nearest_neighbour]


@pytest.fixture
def problem() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 4)
    centres = rng.normal(size=(3, 5))
    train = (centres[labels] + rng.normal(size=(12, 5))).astype(np.float32)
    return train, labels, rng.normal(size=(7, 5)).astype(np.float32)


def test_logistic_regression_minimises_its_objective(problem: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    train, labels, test = (array.astype(np.float64) for array in problem)
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    train, test = (train - mean) / deviation, (test - mean) / deviation

    def objective(flat: np.ndarray) -> float:
        weights, bias = flat[:15].reshape(5, 3), flat[15:]
        logits = train @ weights + bias
        chosen = logits[np.arange(12), labels.astype(int)]
        return float(np.sum(logsumexp(logits, axis=1) - chosen) + 0.5 * np.sum(weights**2))

    found = minimize(objective, np.zeros(18), method="BFGS", options={"gtol": 1e-6}).x
    logits = test @ found[:15].reshape(5, 3) + found[15:]
    expected = logits - logsumexp(logits, axis=1, keepdims=True)
    np.testing.assert_allclose(logistic_regression(*problem, 3), expected, atol=1e-4)


def test_logistic_regression_scatters_present_classes(problem: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    train, labels, test = problem
    log_probs = logistic_regression(train, labels, test, 3)
    spread = logistic_regression(train, np.array([1, 4, 6])[labels], test, 8)
    np.testing.assert_array_equal(spread[:, [1, 4, 6]], log_probs)
    assert np.isneginf(np.delete(spread, [1, 4, 6], axis=1)).all()
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=1), 1)


def test_logistic_regression_with_two_classes(problem: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    train, labels, _ = problem
    two = train[labels < 2]
    log_probs = logistic_regression(two, labels[labels < 2], two * 1e6, 2)
    assert np.isfinite(log_probs).all()  # also where the probability itself underflows
    np.testing.assert_array_equal(
        log_probs.argmax(axis=1), logistic_regression(two, labels[:8], two * 1e3, 2).argmax(1)
    )


def test_logistic_regression_knows_only_training_statistics(
    problem: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    train, labels, test = problem
    whole = logistic_regression(train, labels, test, 3)
    for row in range(len(test)):
        alone = logistic_regression(train, labels, test[row : row + 1], 3)
        np.testing.assert_allclose(alone[0], whole[row], rtol=1e-12)


def test_logistic_regression_takes_constant_features(problem: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    train, labels, test = (np.copy(array) for array in problem)
    train[:, 2] = test[:, 2] = 0.1
    dropped = logistic_regression(np.delete(train, 2, 1), labels, np.delete(test, 2, 1), 3)
    np.testing.assert_allclose(logistic_regression(train, labels, test, 3), dropped, atol=1e-4)


def test_nearest_neighbour_is_brute_force(
    problem: tuple[np.ndarray, np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, labels, test = problem
    expected = np.full((7, 4), -np.inf)
    for i, x in enumerate(test.astype(np.float64)):
        for y, label in zip(train.astype(np.float64), labels, strict=True):
            expected[i, label] = max(expected[i, label], -np.sqrt(sum((a - b) ** 2 for a, b in zip(x, y, strict=True))))
    whole = nearest_neighbour(train, labels, test, 4)
    np.testing.assert_allclose(whole, expected, rtol=1e-14)
    monkeypatch.setattr("baselines.knn.BLOCK", 30)
    np.testing.assert_array_equal(nearest_neighbour(train, labels, test, 4), whole)


def test_nearest_neighbour_ties_go_to_the_lower_class() -> None:
    points = np.full((3, 300), 0.1, np.float32)
    scores = nearest_neighbour(points, np.array([2, 1, 2]), points, 3)
    np.testing.assert_array_equal(scores, [[-np.inf, 0, 0]] * 3)
    np.testing.assert_array_equal(scores.argmax(axis=1), 1)


def test_pixels_are_rgb_bytes(make_image: Callable[..., bytes]) -> None:
    flat = io.BytesIO()
    Image.new("RGB", (50, 20), (255, 0, 7)).save(flat, "PNG")
    result = pixels([flat.getvalue(), make_image(0)], side=8)
    assert (result.shape, result.dtype) == ((2, 192), np.float32)
    np.testing.assert_array_equal(result[0].reshape(64, 3), [[255, 0, 7]] * 64)
    assert pixels([]).shape == (0, 32 * 32 * 3)
    with pytest.raises(ImageError):
        pixels([b""])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, y, b: (np.where(a == a[3, 0], np.nan, a), y, b), "train features of image 3 are not finite"),
        (lambda a, y, b: (a, y, np.where(b == b[2, 0], np.inf, b)), "test features of image 2 are not finite"),
        (lambda a, y, b: (a, y + 1, b), "label 3 is not one of 3 classes"),
        (lambda a, y, b: (a, y - 1, b), "label -1 is not one of 3 classes"),
        (lambda a, y, b: (a, y[:-1], b), "one label per image"),
        (lambda a, y, b: (a, y * 1.0, b), "whole numbers"),
        (lambda a, y, b: (a, y, b[:, 1:]), "do not fit"),
        (lambda a, y, b: (a[:0], y[:0], b), "one label per image"),
    ],
)
def test_what_cannot_be_used(
    head: Callable, change: Callable, message: str, problem: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    with pytest.raises(InputError, match=message):
        head(*change(*problem), 3)


def test_a_single_class_cannot_be_fitted(problem: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    train, labels, test = problem
    with pytest.raises(InputError, match="all 12 training images are of class 0"):
        logistic_regression(train, labels * 0, test, 3)


@pytest.mark.parametrize("head", HEADS)
def test_no_test_images(head: Callable, problem: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    train, labels, test = problem
    assert head(train, labels, test[:0], 3).shape == (0, 3)
