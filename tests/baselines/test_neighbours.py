"""Neighbours, means and what they choose, against loops and against scikit-learn."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from clusters import Problem, clusters
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

from baselines.heads import knn
from baselines.heads.knn import NEIGHBOURS, TEMPERATURE, fit_knn, fit_nearest_neighbour, pixels
from baselines.heads.mean import SPACES, fit_nearest_mean
from baselines.heads.selection import choose, folds, one_shot
from kshot.errors import ImageError


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.array(
        [[x @ y / (np.linalg.norm(x) * np.linalg.norm(y)) for y in b.astype(float)] for x in a.astype(float)]
    )


def fold_by_counting(labels: np.ndarray) -> list[int]:
    return [int(np.sum(labels[:n] == label)) for n, label in enumerate(labels)]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_folds_count_the_images_of_a_class(labels: list[int]) -> None:
    assert folds(np.array(labels)).tolist() == fold_by_counting(np.array(labels))


def test_the_first_of_equals_is_chosen_and_at_one_shot_nothing_is_asked() -> None:
    labels = np.array([0, 0, 1, 1])
    answers = {"a": [0, 1, 1, 0], "b": [0, 0, 1, 0], "c": [0, 0, 0, 1]}
    assert choose(list(answers), labels, lambda option: np.array(answers[option])) == "b"
    assert choose(["x", "y"], np.array([3, 1]), lambda option: pytest.fail("nothing can be left out")) == "x"
    assert one_shot(np.array([3, 1]))
    assert not one_shot(labels)


@pytest.mark.parametrize("n", NEIGHBOURS)
def test_votes_are_scikit_learns_weighted_neighbours(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "NEIGHBOURS", (n,))
    train, labels, test = clusters(5, 8, 6, tests=60)
    found = fit_knn(train, labels, 5).scores(test)
    reference = KNeighborsClassifier(n, metric="cosine", weights=lambda d: np.exp((1 - d) / TEMPERATURE))
    shares = reference.fit(train.astype(float), labels).predict_proba(test.astype(float))
    np.testing.assert_allclose(found / found.sum(axis=1, keepdims=True), shares, atol=1e-4)


def test_votes_are_sums_over_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels, test = clusters(4, 6, 5, noise=2.0, tests=20)
    monkeypatch.setattr(knn, "NEIGHBOURS", (5,))
    expected = np.zeros((20, 4))
    for row, similar in zip(expected, cosines(test, train), strict=True):
        for near in sorted(range(24), key=lambda n: -similar[n])[:5]:
            row[labels[near]] += np.exp(similar[near] / TEMPERATURE)
    whole = fit_knn(train, labels, 4).scores(test)
    np.testing.assert_allclose(whole, expected, rtol=1e-4)
    monkeypatch.setattr(knn, "BLOCK", 50)
    np.testing.assert_allclose(fit_knn(train, labels, 4).scores(test), whole, rtol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_the_number_of_neighbours_is_the_best_with_a_shot_left_out(seed: int) -> None:
    train, labels, _ = clusters(5, 4, 6, noise=1.5, seed=seed)
    similar, fold = cosines(train, train), fold_by_counting(labels)
    right = dict.fromkeys([n for n in NEIGHBOURS if n <= 15], 0)
    for n in right:
        for image in range(20):
            others = [each for each in range(20) if fold[each] != fold[image]]
            votes = np.zeros(5)
            for near in sorted(others, key=lambda each: -similar[image, each])[:n]:
                votes[labels[near]] += np.exp(similar[image, near] / TEMPERATURE)
            right[n] += votes.argmax() == labels[image]
    assert fit_knn(train, labels, 5).chosen == {"neighbours": max(right, key=right.__getitem__)}


def by_hand(space: str, train: np.ndarray, labels: np.ndarray, test: np.ndarray, n_classes: int) -> np.ndarray:
    """(M, n_classes) scores of class means, one class and one image at a time."""
    train, test = train.astype(float), test.astype(float)
    if space == "centred cosine":
        train, test = train - train.mean(axis=0), test - train.mean(axis=0)
    if space == "euclidean":
        means = [train[labels == each].mean(axis=0) for each in range(n_classes)]
        return np.array([[-np.sum((x - mean) ** 2) for mean in means] for x in test])
    units = train / np.linalg.norm(train, axis=1, keepdims=True)
    return cosines(test, np.array([units[labels == each].mean(axis=0) for each in range(n_classes)]))


@pytest.mark.parametrize("seed", range(6))
def test_the_space_is_the_best_with_a_shot_left_out(seed: int) -> None:
    train, labels, test = clusters(5, 4, 6, noise=1.5, seed=seed, tests=30)
    fold, right = np.array(fold_by_counting(labels)), dict.fromkeys(SPACES, 0)
    for space in SPACES:
        for each in range(4):
            out = fold == each
            scores = by_hand(space, train[~out], labels[~out], train[out], 5)
            right[space] += int(np.sum(scores.argmax(axis=1) == labels[out]))
    best = max(right, key=right.__getitem__)
    fitted = fit_nearest_mean(train, labels, 5)
    assert fitted.chosen == {"space": best}
    np.testing.assert_allclose(fitted.scores(test), by_hand(best, train, labels, test, 5), atol=1e-4)


@pytest.mark.parametrize("space", SPACES)
def test_every_space_is_what_it_says(space: str, problem: Problem) -> None:
    train, labels, test = (array.astype(float) for array in problem)
    scores = SPACES[space](train, labels.astype(int), 3)(test)
    np.testing.assert_allclose(scores, by_hand(space, train, labels, test, 3), atol=1e-9)
    if space == "euclidean":
        np.testing.assert_array_equal(scores.argmax(axis=1), NearestCentroid().fit(train, labels).predict(test))


def test_nearest_neighbour_is_brute_force(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels, test = problem
    expected = np.full((7, 4), -np.inf)
    for i, x in enumerate(test.astype(np.float64)):
        for y, label in zip(train.astype(np.float64), labels, strict=True):
            expected[i, label] = max(expected[i, label], -np.sqrt(sum((a - b) ** 2 for a, b in zip(x, y, strict=True))))
    whole = fit_nearest_neighbour(train, labels, 4).scores(test)
    np.testing.assert_allclose(whole, expected, rtol=1e-14)
    monkeypatch.setattr(knn, "BLOCK", 30)
    np.testing.assert_array_equal(fit_nearest_neighbour(train, labels, 4).scores(test), whole)


def test_nearest_neighbour_ties_go_to_the_lower_class() -> None:
    points = np.full((3, 300), 0.1, np.float32)
    scores = fit_nearest_neighbour(points, np.array([2, 1, 2]), 3).scores(points)
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
