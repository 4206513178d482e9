"""Decoding, whole patches, the pixel cache."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from baselines.features import PixelCache, resized, size_batches, whole_patches
from kshot.errors import ImageError
from kshot.images import open_image


@pytest.mark.parametrize(
    ("side", "patch", "expected"), [(64, 14, 70), (60, 14, 56), (63, 14, 70), (62, 14, 56), (3, 14, 14), (518, 14, 518)]
)
def test_whole_patches(side: int, patch: int, expected: int) -> None:
    assert whole_patches(side, patch) == expected


def test_the_whole_image_is_seen(make_image: Callable[..., bytes]) -> None:
    """The far edges survive: a crop would lose the marks there."""
    picture = np.zeros((50, 90, 3), np.uint8)
    picture[:, :6], picture[:, -6:], picture[:6], picture[-6:] = 255, 255, 255, 255
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    pixels = resized(stream.getvalue(), 16)
    assert pixels.shape == (48, 96, 3)
    assert min(pixels[:, 0].min(), pixels[:, -1].min(), pixels[0].min(), pixels[-1].min()) > 250
    assert resized(stream.getvalue(), 16, 64).shape == (64, 64, 3)


def test_an_image_of_whole_patches_is_not_resampled(make_image: Callable[..., bytes]) -> None:
    image = make_image(0, 48, 64)
    np.testing.assert_array_equal(resized(image, 16), np.asarray(open_image(image)))


@pytest.mark.parametrize("cut", [0, 7, 300])
def test_broken_bytes(cut: int, make_image: Callable[..., bytes]) -> None:
    with pytest.raises(ImageError, match=r"^image: "):
        resized(make_image(0)[:cut], 16)


def test_size_batches() -> None:
    shapes = [(2, 3), (3, 2), (2, 3)]
    arrays = [np.empty(shape) for shape in shapes]
    assert size_batches(arrays, 2) == [[0, 2], [1]]
    assert size_batches(arrays, 1) == [[0], [2], [1]]


def test_cache_keeps_until_full(make_image: Callable[..., bytes]) -> None:
    first, second = make_image(0), make_image(1)
    cache = PixelCache(16, limit=64 * 64 * 3)
    assert cache(first) is cache(first)
    assert cache(second) is not cache(second)
    np.testing.assert_array_equal(cache(second), resized(second, 16))
