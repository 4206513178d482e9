"""Image bytes to pixels: decode, resize to whole patches, keep what was decoded.

Knows no model: the patch size is given, and normalisation is the backbone's. Nothing is cropped or flipped here.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from kshot_images import open_image


def whole_patches(side: int, patch: int) -> int:
    """The multiple of `patch` nearest to `side` pixels, at least one patch; halves go up."""
    return max(1, (2 * side + patch) // (2 * patch)) * patch


def resized(image: bytes, patch: int, size: int | None = None) -> np.ndarray:
    """The whole image as (height, width, 3) uint8, bicubic with antialiasing, never cropped.

    Each side goes to its nearest multiple of `patch`; with `size` both sides become `size`, whatever the aspect.
    """
    decoded = open_image(image)
    width, height = (whole_patches(side, patch) for side in decoded.size) if size is None else (size, size)
    # Pillow's bicubic filter widens with the reduction: it antialiases always.
    return np.asarray(decoded.resize((width, height), Image.Resampling.BICUBIC))


def size_groups(pixels: Sequence[np.ndarray]) -> list[list[int]]:
    """Indices of arrays of one shape, in order of first appearance: what one batched forward can take."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, array in enumerate(pixels):
        groups.setdefault(array.shape, []).append(index)
    return list(groups.values())


class PixelCache:
    """Resized images by the SHA-256 of their bytes, up to `limit` bytes of pixels.

    A full cache stops taking: training goes over the same images in ever new order, where throwing out the oldest
    would lose each image just before it is needed again.
    """

    def __init__(self, patch: int, size: int | None = None, *, limit: int = 1 << 29) -> None:
        self._patch, self._size, self._room = patch, size, limit
        self._pixels: dict[bytes, np.ndarray] = {}

    def __call__(self, image: bytes) -> np.ndarray:
        """`resized(image)`, from memory if it was kept. The array is shared: do not write to it."""
        key = hashlib.sha256(image).digest()
        if key in self._pixels:
            return self._pixels[key]
        pixels = resized(image, self._patch, self._size)
        if pixels.nbytes <= self._room:
            self._room -= pixels.nbytes
            self._pixels[key] = pixels
        return pixels
