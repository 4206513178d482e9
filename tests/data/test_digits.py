"""The digits are scikit-learn's, all of them."""

import io
from collections import Counter

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from data import catalog
from data.dataset import Dataset, content_key
from data.embedded.digits import _png


def test_counts(digits: Dataset) -> None:
    train, test = (Counter(e.label for e in side) for side in (digits.train, digits.test))
    assert digits.classes[:3] == ("zero", "one", "two")
    assert len({e.key for e in (*digits.train, *digits.test)}) == 1797
    assert test == dict.fromkeys(range(10), 50)
    assert min(train.values()) >= 124


def test_labels_and_pixels_are_scikit_learns(digits: Dataset) -> None:
    source = load_digits()
    label_of = {e.key: (e.label, e.image) for e in (*digits.train, *digits.test)}
    assert Counter(label for label, _ in label_of.values()) == Counter(source.target.tolist())
    by_key = {content_key(_png(p)): (p, y) for p, y in zip(source.images, source.target, strict=True)}
    assert by_key.keys() == label_of.keys()
    for key, (pixels, target) in by_key.items():
        label, image = label_of[key]
        assert label == target
        drawn = Image.open(io.BytesIO(image))
        assert (drawn.mode, drawn.size) == ("L", (64, 64))
        back = 16 - np.asarray(drawn.resize((8, 8), Image.Resampling.BOX)) * (16 / 255)
        assert np.abs(back - pixels).mean() < 1.2


def test_another_seed_is_another_split(digits: Dataset) -> None:
    other = catalog.load("digits", split_seed=7)
    assert other.protocol == "seeded-split-7"
    assert {e.key for e in other.test} != {e.key for e in digits.test}
