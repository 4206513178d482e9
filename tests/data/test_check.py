"""What `check` finds: every bad image, and what train and test share."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from data import check as checks
from data.check import NEAR, check, near_pairs, perceptual_hash, refuse_broken
from data.dataset import Dataset, Example, content_key
from kshot.errors import DatasetError


def example(image: bytes, label: int = 0) -> Example:
    return Example(content_key(image), image, label)


def opened(image: bytes) -> Image.Image:
    return Image.open(io.BytesIO(image)).convert("RGB")


def encoded(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def dataset(train: list[bytes], test: list[bytes]) -> Dataset:
    return Dataset("own", "given", ("cat",), [example(i) for i in train], [example(i) for i in test])


def test_a_sound_set(make_image: Callable[..., bytes]) -> None:
    found = check(dataset([make_image(n) for n in range(5)], [make_image(n) for n in range(5, 9)]))
    assert (found.images, found.broken, found.exact, found.near, found.duplicates) == (9, [], [], [], 0)


def test_images_that_train_and_test_share(make_image: Callable[..., bytes]) -> None:
    images = [make_image(n, 200, 150) for n in range(6)]
    smaller = encoded(opened(images[2]).resize((120, 90)), quality=60)
    found = check(dataset([*images[:4], images[0]], [images[5], images[1], smaller]))
    assert (found.exact, found.near, found.duplicates) == ([(1, 1)], [(2, 2)], 1)


def test_every_bad_image_is_listed(make_image: Callable[..., bytes]) -> None:
    good = make_image(0, format="JPEG")
    whole = dataset([good, good[:400], b"text"], [b"", b""])
    changed = replace(whole, test=[*whole.test, replace(whole.train[0], key="0" * 64)])
    found = check(changed)
    assert [line.partition(": ")[2].split("(")[0] for line in found.broken] == [
        "broken image ",
        "not an image in a known format; replace or remove it",
        *["the file is empty; replace or remove it"] * 2,
        "its bytes have changed; get the data again",
    ]
    assert found.near == []  # what cannot be seen is like nothing
    with pytest.raises(DatasetError) as raised:
        refuse_broken(changed)
    assert str(raised.value).splitlines() == ["own: 5 problems", *(f"  {line}" for line in found.broken)]


def test_a_set_without_broken_images_is_remembered(
    make_image: Callable[..., bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KSHOT_CACHE", str(tmp_path / "cache"))
    opened: list[str] = []
    monkeypatch.setattr(checks, "open_image", lambda data, name: opened.append(name))
    sound = dataset([make_image(0), make_image(1)], [make_image(2)])
    for _ in range(2):
        refuse_broken(sound)
    assert len(opened) == 3
    refuse_broken(dataset([make_image(0), make_image(1)], [make_image(3)]))
    assert len(opened) == 6


def test_images_in_two_classes(make_image: Callable[..., bytes]) -> None:
    cat, dog = make_image(0), make_image(1)
    found = check(Dataset("own", "given", ("cat", "dog"), [example(cat), example(dog, 1)], [example(cat, 1)]))
    assert found.two_classes == {content_key(cat): {0, 1}}


@pytest.mark.parametrize("seed", range(4))
def test_a_copy_is_near_and_another_image_is_not(make_image: Callable[..., bytes], seed: int) -> None:
    image, other = opened(make_image(seed, 320, 240)), opened(make_image(seed + 50, 320, 240))
    copies = [
        image.resize((160, 120)),
        opened(encoded(image, quality=30)),
        ImageEnhance.Brightness(image).enhance(0.85),
        image.convert("L").convert("RGB"),
    ]
    bits = [(perceptual_hash(image) ^ perceptual_hash(copy)).bit_count() for copy in (*copies, other)]
    assert max(bits[:-1]) <= NEAR < bits[-1]


@given(st.lists(st.integers(0, 2**64 - 1), max_size=20), st.lists(st.integers(0, 2**64 - 1), max_size=20))
def test_pairs_are_those_of_counting_bits(one: list[int], other: list[int]) -> None:
    other = [*other, *(bits ^ 0b10110 for bits in one[:3]), *(bits ^ (2**7 - 1) for bits in one[:3])]
    expected = [(i, j) for i, a in enumerate(one) for j, b in enumerate(other) if (a ^ b).bit_count() <= NEAR]
    assert near_pairs(np.array(one, np.uint64), np.array(other, np.uint64)) == expected
