"""Image bytes in, image bytes out: the one rule by which every model's input is prepared.

Both sides of a comparison get exactly the bytes made here. Knows no data set and no model.
"""

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from PIL import Image, ImageOps

from data.core import Example, Slice, content_key
from data.spool import keep
from kshot_errors import DatasetError, InputError
from kshot_images import Size, open_image


def prepare(data: bytes, *, max_side: int = 480, mirrored: bool = False, name: str = "image") -> bytes:
    """The image as models get it: JPEG bytes (Pillow's default quality), RGB, longest side at most max_side pixels.

    Resized with LANCZOS, never enlarged; the short side is rounded down, as in the reference recipe. The same bytes as
    that recipe gives, except for a JPEG four times as large or more, which `kshot_images.open_image` decodes smaller.
    mirrored: flipped left to right, after resizing.
    Raises ImageError; InputError if max_side < 1.
    """
    return _encode(decode(data, max_side=max_side, name=name), mirrored)


def prepare_all(examples: Sequence[Example], *, max_side: int = 480, hflip: bool) -> list[Example]:
    """The examples in order with prepared images, key and label kept; read, prepared and put aside in a thread pool.

    In memory is one image a thread; the prepared ones go to disk (`data.spool`) and are read when asked for.
    hflip: also make `mirrored`, the prepared image flipped left to right; else mirrored is None.
    Raises ImageError; InputError if max_side < 1; DatasetError where images can be neither read nor put aside.
    """

    def one(example: Example) -> Example:
        image = decode(_checked(example), max_side=max_side, name=f"image {example.key[:12]}")
        mirrored = keep(_encode(image, True)) if hflip else None
        return replace(example, stored=keep(_encode(image, False)), stored_mirrored=mirrored)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, examples))


def _checked(example: Example) -> bytes:
    """The image. Raises DatasetError where it is not the one that the example was made of."""
    image = example.image
    if content_key(image) != example.key:
        where = f" in {example.stored.path}" if isinstance(example.stored, Slice) else ""
        raise DatasetError(f"image {example.key[:12]}{where} has changed; delete that file, or get the data again")
    return image


def decode(data: bytes, *, max_side: int = 480, name: str = "image") -> Image.Image:
    """The pixels that `prepare` encodes: RGB, upright, longest side at most max_side. Raises as `prepare` does."""
    if max_side < 1:
        raise InputError(f"max_side must be 1 pixel or more, not {max_side}")
    return open_image(data, name, partial(_fit, max_side=max_side))


def _fit(size: Size, max_side: int) -> Size:
    longest = max(size)
    if longest <= max_side:
        return size
    width, height = (max(1, side * max_side // longest) for side in size)
    return width, height


def _encode(image: Image.Image, mirrored: bool) -> bytes:
    buffer = io.BytesIO()
    (ImageOps.mirror(image) if mirrored else image).save(buffer, "JPEG")
    return buffer.getvalue()
