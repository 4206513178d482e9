"""Image bytes in, image bytes out: decoding to RGB, and the one rule by which every model's input is prepared.

Both sides of a comparison get exactly the bytes made here. Knows no data set and no model. Colour profiles are ignored.
"""

import io
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from PIL import Image, ImageOps

from data.core import Example
from kshot_errors import ImageError, InputError

MAX_PIXELS = 89_478_485  # Pillow's own limit: 256 MiB as RGB

# Pillow warns above its limit and raises only above twice of it; its manual gives this line to make both an error.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def open_image(data: bytes, name: str = "image") -> Image.Image:
    """The image as RGB, upright (EXIF orientation applied); transparency is laid over white; of an animation, frame 1.

    name: what an error calls it.
    Raises ImageError for bytes that are no image, a truncated image, one of more than MAX_PIXELS pixels (seen in the
    header, before decoding) or one whose pixels are floating point.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_pixels(image, name)
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image), name)
    except ImageError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError(f"{name}: more than {MAX_PIXELS:,} pixels; make it smaller") from error
    except Exception as error:  # Pillow's decoders raise a dozen unrelated types on bytes that are broken
        raise ImageError(f"{name}: {_reason(data, error)}; replace or remove it") from error


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


def _check_pixels(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:  # only where a program has switched Pillow's own check off
        raise ImageError(f"{name}: {width}x{height} is more than {MAX_PIXELS:,} pixels; make it smaller")


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise ImageError(f"{name}: floating-point pixels have no fixed range; save it with 8 bits a channel")
    if image.mode.startswith("I"):
        # Greyscale of 16 bits; Pillow's own conversion clips it at 255 instead of scaling.
        grey = np.clip(np.asarray(image, dtype=np.int64), 0, 65535)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


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


def _reason(data: bytes, error: Exception) -> str:
    if not data:
        return "the file is empty"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image in a known format"
    return f"broken image ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
