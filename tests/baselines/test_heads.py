"""What holds of every head; the linear ones against scikit-learn and their own objectives; neighbours, means and what
they choose against loops and scikit-learn."""

import inspect
import io
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression, RidgeClassifierCV
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from baselines.heads import HEADS, knn, linear, ridge
from baselines.heads.inputs import Fit
from baselines.heads.knn import NEIGHBOURS, TEMPERATURE, fit_knn, fit_nearest_neighbour
from baselines.heads.linear import C, fit_logistic_regression
from baselines.heads.mean import SPACES, fit_nearest_mean
from baselines.heads.ridge import PENALTIES, fit_ridge
from baselines.heads.selection import choose, folds
from kshot.errors import ImageError, InputError, KshotError

Problem = tuple[np.ndarray, np.ndarray, np.ndarray]  # train, labels, test
FITS = [*(row.fit for row in HEADS.values()), fit_nearest_neighbour]


def clusters(n_classes: int, shots: int, dim: int, *, tests: int = 7, noise: float = 1.0, seed: int = 0) -> Problem:
    """Gaussian classes; float32 features as an encoder gives them, labels in mixed order."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(n_classes), shots))
    centres = rng.normal(size=(n_classes, dim))
    train = centres[labels] + noise * rng.normal(size=(len(labels), dim)) + 0.5
    test = centres[rng.integers(n_classes, size=tests)] + noise * rng.normal(size=(tests, dim)) + 0.5
    return train.astype(np.float32), labels, test.astype(np.float32)


@pytest.fixture
def problem() -> Problem:
    return clusters(3, 4, 5)


@pytest.mark.parametrize("fit", FITS)
def test_nothing_that_fits_is_given_a_test_image(fit: Fit) -> None:
    assert list(inspect.signature(fit).parameters) == ["train", "labels", "n_classes"]


@pytest.mark.parametrize("fit", FITS)
def test_a_score_depends_on_no_other_test_image(fit: Fit, problem: Problem) -> None:
    train, labels, test = problem
    fitted = fit(train, labels, 3)
    whole = fitted.scores(test)
    alone = np.concatenate([fitted.scores(test[row : row + 1]) for row in range(len(test))])
    np.testing.assert_allclose(alone, whole, rtol=1e-5)
    assert fitted.scores(test[:0]).shape == (0, 3)


@pytest.mark.parametrize("fit", FITS)
def test_classes_without_a_training_image_are_never_chosen(fit: Fit, problem: Problem) -> None:
    train, labels, test = problem
    spread = fit(train, np.array([1, 4, 6])[labels], 8).scores(test)
    np.testing.assert_array_equal(spread[:, [1, 4, 6]], fit(train, labels, 3).scores(test))
    assert np.isneginf(np.delete(spread, [1, 4, 6], axis=1)).all()


@pytest.mark.parametrize("fit", FITS)
def test_the_order_of_training_images_does_not_matter(fit: Fit, problem: Problem) -> None:
    train, labels, test = problem
    order = np.argsort(labels, kind="stable")  # keeps who is the first, the second ... of a class
    ordered = fit(train[order], labels[order], 3).scores(test)
    np.testing.assert_allclose(ordered, fit(train, labels, 3).scores(test), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, y, b: (np.where(a == a[3, 0], np.nan, a), y, b), "train features of image 3 are not finite"),
        (lambda a, y, b: (a, y, np.where(b == b[2, 0], np.inf, b)), "test features of image 2 are not finite"),
        (lambda a, y, b: (a, y + 1, b), "label 3 is not one of 3 classes"),
        (lambda a, y, b: (a, y - 1, b), "label -1 is not one of 3 classes"),
        (lambda a, y, b: (a, y[:-1], b), "one label per image"),
        (lambda a, y, b: (a, y * 1.0, b), "whole numbers"),
        (lambda a, y, b: (a, y, b[:, 1:]), r"do not fit; give \(M, 5\)"),
        (lambda a, y, b: (a[0], y[:1], b), r"give \(N, D\)"),
        (lambda a, y, b: (a[:0], y[:0], b), "one label per image"),
        (lambda a, y, b: (a, y * 0, b), "all 12 training images are of class 0"),
    ],
)
def test_what_cannot_be_used(fit: Fit, change: Callable, message: str, problem: Problem) -> None:
    train, labels, test = change(*problem)
    with pytest.raises(InputError, match=message):
        fit(train, labels, 3).scores(test)


@pytest.mark.parametrize("name", [name for name, row in HEADS.items() if row.chooses])
def test_a_class_with_one_image_beside_others_with_more(name: str, problem: Problem) -> None:
    train, labels, _ = problem
    kept = np.flatnonzero((labels != 1) | (np.cumsum(labels == 1) == 1))
    with pytest.raises(InputError, match="class 1 has one image and others have up to 4"):
        HEADS[name].fit(train[kept], labels[kept], 3)


@pytest.mark.parametrize(
    ("name", "chosen"),
    [("logreg", {}), ("ridge", {"penalty": 5.0}), ("knn", {"neighbours": 1}), ("mean", {"space": "centred cosine"})],
)
def test_one_shot_takes_what_was_fixed_beforehand(name: str, chosen: dict[str, object]) -> None:
    train, labels, _ = clusters(6, 1, 5)
    assert HEADS[name].fit(train, labels, 6).chosen == chosen


def scikit_learn(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    head = make_pipeline(StandardScaler(), LogisticRegression(C=C, tol=1e-9, max_iter=10_000))
    return log_softmax(head.fit(train.astype(float), labels).decision_function(test.astype(float)), axis=1)


SIZES = [(1, 64), (4, 64), (10, 64)]  # fewer images than features, and more


@pytest.mark.parametrize(("shots", "dim"), SIZES)
def test_logistic_regression_is_scikit_learns(shots: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As exactly as asked: beyond what float32 products allow, float64 goes on."""
    monkeypatch.setattr(linear, "GRADIENT", 1e-7)
    train, labels, test = clusters(12, shots, dim, tests=500, noise=1.5)
    expected = scikit_learn(train, labels, test)
    scores = fit_logistic_regression(train, labels, 12).scores(test)
    np.testing.assert_array_equal(scores.argmax(axis=1), expected.argmax(axis=1))
    np.testing.assert_allclose(scores, expected, atol=1e-5)


@pytest.mark.parametrize(("shots", "dim"), SIZES)
def test_where_it_stops_predictions_stand(shots: int, dim: int) -> None:
    train, labels, test = clusters(12, shots, dim, tests=500, noise=1.5)
    expected = scikit_learn(train, labels, test)
    scores = fit_logistic_regression(train, labels, 12).scores(test)
    assert (scores.argmax(axis=1) == expected.argmax(axis=1)).mean() > 0.99
    np.testing.assert_allclose(scores, expected, atol=0.05)


def test_two_classes_have_a_weight_each() -> None:
    """scikit-learn has one vector for two classes: ours under this penalty is theirs under twice the C."""
    train, labels, test = clusters(2, 8, 5, tests=50)
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=2 * C, tol=1e-9))
    decision = reference.fit(train.astype(float), labels).decision_function(test.astype(float))
    expected = log_softmax(np.stack([np.zeros(50), decision], axis=1), axis=1)
    np.testing.assert_allclose(fit_logistic_regression(train, labels, 2).scores(test), expected, atol=0.02)


def test_logistic_regression_is_finite_where_a_probability_underflows(problem: Problem) -> None:
    train, labels, test = problem
    log_probs = fit_logistic_regression(train, labels, 3).scores(test * 1e6)
    assert np.isfinite(log_probs).all()
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=1), 1)


def test_logistic_regression_that_does_not_converge_says_so(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "STEPS", 1)
    with pytest.raises(KshotError, match="did not converge in 1 steps"):
        fit_logistic_regression(*problem[:2], 3)


@pytest.mark.parametrize("fit", [fit_logistic_regression, fit_ridge])
def test_a_feature_that_never_changes_has_no_say(fit: Fit, problem: Problem) -> None:
    train, labels, test = (np.copy(array) for array in problem)
    train[:, 2] = test[:, 2] = 0.1
    dropped = fit(np.delete(train, 2, 1), labels, 3).scores(np.delete(test, 2, 1))
    assert np.abs(fit(train, labels, 3).scores(test) - dropped).max() < 0.1  # the penalty is in units of D


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("shots", "dim"), [(2, 40), (3, 40), (9, 20)])  # fewer images than features, and more
def test_ridge_is_scikit_learns_with_its_own_leave_one_out(shots: int, dim: int, seed: int) -> None:
    train, labels, test = clusters(6, shots, dim, tests=100, noise=1.5, seed=seed)
    scaler = StandardScaler().fit(train.astype(np.float64))
    scaled, asked = (scaler.transform(features.astype(np.float64)) for features in (train, test))
    reference = RidgeClassifierCV(np.array(PENALTIES) * dim, scoring="accuracy").fit(scaled, labels)
    fitted = fit_ridge(train, labels, 6)
    assert fitted.chosen == {"penalty": pytest.approx(reference.alpha_)}
    scores = fitted.scores(test)
    np.testing.assert_allclose(2 * scores - 1, reference.decision_function(asked), atol=1e-5)  # its targets are ±1
    np.testing.assert_array_equal(scores.argmax(axis=1), reference.predict(asked))


def test_logistic_regression_on_equal_images_knows_how_frequent_classes_are() -> None:
    equal, labels = np.full((4, 8), 0.3, np.float32), np.array([0, 0, 0, 1])
    log_probs = fit_logistic_regression(equal, labels, 2).scores(equal[:3])
    np.testing.assert_allclose(np.exp(log_probs), [[0.75, 0.25]] * 3, atol=1e-3)


@pytest.mark.parametrize(("shots", "dim", "uneven"), [(3, 40, False), (9, 20, False), (9, 20, True), (9, 50, True)])
def test_ridge_leaves_one_out_as_if_it_had_fitted_without_it(shots: int, dim: int, uneven: bool) -> None:
    """The closed form against N regressions by normal equations, for every penalty; also of classes of 2 and of 9."""
    train, labels, _ = clusters(4, shots, dim)
    if uneven:
        few = [np.flatnonzero(labels == label)[2:] for label in (0, 1)]
        train, labels = (np.delete(array, np.concatenate(few), axis=0) for array in (train, labels))
    scaled, targets = StandardScaler().fit_transform(train.astype(np.float64)), np.eye(4)[labels]
    spectrum, right = ridge._Spectrum(scaled, targets), []
    for penalty in np.array(PENALTIES) * dim:
        answers = []
        for out in range(len(labels)):
            x, y = np.delete(scaled, out, 0), np.delete(targets, out, 0)
            centred = x - x.mean(axis=0)
            weights = np.linalg.solve(centred.T @ centred + penalty * np.eye(dim), centred.T @ (y - y.mean(axis=0)))
            answers.append(np.argmax(y.mean(axis=0) + (scaled[out] - x.mean(axis=0)) @ weights))
        np.testing.assert_array_equal(spectrum.held_out(penalty), answers)
        right.append(int(np.sum(answers == labels)))
    assert fit_ridge(train, labels, 4).chosen == {"penalty": PENALTIES[int(np.argmax(right))] * dim}


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


@pytest.mark.parametrize("n", NEIGHBOURS)
def test_votes_are_scikit_learns_weighted_neighbours(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "NEIGHBOURS", (n,))
    train, labels, test = clusters(5, 8, 6, tests=60)
    found = fit_knn(train, labels, 5).scores(test)
    reference = KNeighborsClassifier(n, metric="cosine", weights=lambda d: np.exp((1 - d) / TEMPERATURE))
    shares = reference.fit(train.astype(float), labels).predict_proba(test.astype(float))
    sums = np.exp((1 - reference.kneighbors(test.astype(float))[0]) / TEMPERATURE).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found.sum(axis=1, keepdims=True), sums, rtol=1e-4)
    np.testing.assert_allclose(found / sums, shares, atol=1e-4)
    monkeypatch.setattr(knn, "BLOCK", 50)
    np.testing.assert_allclose(fit_knn(train, labels, 5).scores(test), found, rtol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_the_number_of_neighbours_is_the_best_with_a_shot_left_out(seed: int) -> None:
    train, labels, _ = clusters(5, 4, 6, noise=1.5, seed=seed)
    similar, fold = cosine_similarity(train.astype(float)), fold_by_counting(labels)
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
    return cosine_similarity(test, np.array([units[labels == each].mean(axis=0) for each in range(n_classes)]))


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
    result = knn.pixels([flat.getvalue(), make_image(0)], side=8)
    assert (result.shape, result.dtype) == ((2, 192), np.float32)
    np.testing.assert_array_equal(result[0].reshape(64, 3), [[255, 0, 7]] * 64)
    assert knn.pixels([]).shape == (0, 32 * 32 * 3)
    with pytest.raises(ImageError):
        knn.pixels([b""])
