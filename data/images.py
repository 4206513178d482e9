"""Image bytes in, image bytes out: the one rule by which every model's input is prepared.

Both sides of a comparison get exactly the bytes made here. Knows no data set and no model.
"""

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from PIL import Image, ImageOps

from data.core import Example
from kshot_errors import InputError
from kshot_images import open_image


def prepare(data: bytes, *, max_side: int = 480, mirrored: bool = False, name: str = "image") -> bytes:
    """The image as models get it: JPEG bytes (Pillow's default quality), RGB, longest side at most max_side pixels.

    Resized with LANCZOS, never enlarged; the short side is rounded down, as in the reference recipe.
    mirrored: flipped left to right, after resizing.
    Raises ImageError; InputError if max_side < 1.
    """
    return _encode(_fit(open_image(data, name), max_side), mirrored)


def prepare_all(examples: Sequence[Example], *, max_side: int = 480, hflip: bool) -> list[Example]:
    """The examples in order with prepared images, key and label kept; decoded in a thread pool.

    hflip: also make `mirrored`, the prepared image flipped left to right; else mirrored is None.
    Raises ImageError; InputError if max_side < 1.
    """

    def one(example: Example) -> Example:
        image = _fit(open_image(example.image, f"image {example.key[:12]}"), max_side)
        return replace(example, image=_encode(image, False), mirrored=_encode(image, True) if hflip else None)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, examples))


def _fit(image: Image.Image, max_side: int) -> Image.Image:
    if max_side < 1:
        raise InputError(f"max_side must be 1 pixel or more, not {max_side}")
    longest = max(image.size)
    if longest <= max_side:
        return image
    width, height = (max(1, side * max_side // longest) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _encode(image: Image.Image, mirrored: bool) -> bytes:
    buffer = io.BytesIO()
    (ImageOps.mirror(image) if mirrored else image).save(buffer, "JPEG")
    return buffer.getvalue()
