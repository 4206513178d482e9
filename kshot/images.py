"""Decodes encoded images to pixels: one rule for data sets, models and baselines.

Sizes are checked in the header, before anything is decoded. Colour profiles are ignored.
"""

import hashlib
import io
import warnings
from collections.abc import Callable
from functools import cached_property

import numpy as np
from PIL import ExifTags, Image, ImageOps

from kshot.errors import ImageError

MAX_PIXELS = 89_478_485  # Pillow's own limit: 256 MiB as RGB

CLOSE = 2  # a JPEG is decoded small as long as it stays this many times larger than it is wanted
Size = tuple[int, int]  # width, height in pixels

# Pillow warns above its limit and raises only above twice of it; its manual gives this line to make both an error.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


class EncodedImage(bytes):
    """The bytes of an encoded image, with their key: computed once, it travels with them."""

    @cached_property
    def key(self) -> str:
        """The SHA-256 of the bytes, in hex."""
        return hashlib.sha256(self).hexdigest()


def image_key(image: bytes) -> str:
    """The identity of an encoded image: the SHA-256 of its bytes, in hex."""
    return image.key if isinstance(image, EncodedImage) else hashlib.sha256(image).hexdigest()


def is_plain(image: Image.Image) -> bool:
    """Whether an opened image's pixels can be taken as they are stored: upright, without transparency, RGB or 8-bit
    grey, which everybody turns into the same RGB.

    Of a file whose EXIF data cannot be read that is not known, so it is not plain.
    """
    try:
        upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    except Exception:  # Pillow's readers raise a dozen unrelated types on bytes that are broken
        return False
    return upright and image.mode in ("RGB", "L") and not image.has_transparency_data


def open_header(data: bytes, name: str = "image") -> Image.Image:
    """The image with its format, mode, size and EXIF, not decoded. Raises ImageError as `open_image` does."""
    try:
        image = Image.open(io.BytesIO(data))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError(f"{name}: more than {MAX_PIXELS:,} pixels; make it smaller") from error
    except Exception as error:  # Pillow's readers raise a dozen unrelated types on bytes that are broken
        raise ImageError(f"{name}: {_reason(data, error)}; replace or remove it") from error
    _check_pixels(image, name)
    return image


def open_image(data: bytes, name: str = "image", fit: Callable[[Size], Size] | None = None) -> Image.Image:
    """The image as RGB, upright (EXIF orientation applied); transparency is laid over white; of an animation, frame 1.

    name: what an error calls it.
    fit: the size wanted for a full size, the same rule for width and height; the image is resized to it with LANCZOS.
        A JPEG of 2 * CLOSE times that size or more is decoded at 1/2, 1/4 or 1/8, CLOSE times as large as wanted or
        more, and then resized. At just CLOSE = 2 that is 0.9 of 255 a channel and 45 dB (PSNR) from full decoding for
        the median photograph of Caltech-101; encoding the result as JPEG takes it 6 of 255 and 29 dB away. All other
        images are exact.
    Raises ImageError for bytes that are no image, a truncated image, one of more than MAX_PIXELS pixels (seen in the
    header, before decoding) or one whose pixels are floating point.
    """
    with open_header(data, name) as image:
        try:
            decoded = _decode(image, fit)
            ImageOps.exif_transpose(decoded, in_place=True)
        except Exception as error:  # as above
            raise ImageError(f"{name}: {_reason(data, error)}; replace or remove it") from error
        return _resize(_to_rgb(decoded, name), fit)


def _decode(image: Image.Image, fit: Callable[[Size], Size] | None) -> Image.Image:
    """The image with its pixels, unchanged or, where it is decoded small, at the size that `fit` wants."""
    wanted = fit(image.size) if fit else image.size
    scale = _scale(image, wanted)
    if scale == 1:
        image.load()
        return image
    width, height = image.size
    image.draft(None, (width // scale, height // scale))
    # The last column and row of the small image may lie partly outside: their share is cut off.
    return image.resize(wanted, Image.Resampling.LANCZOS, (0, 0, width / scale, height / scale))


def _scale(image: Image.Image, wanted: Size) -> int:
    """By how much libjpeg may scale down while it decodes: 1, 2, 4 or 8."""
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):  # CMYK to RGB is not linear
        return 1
    ratio = min(side / target for side, target in zip(image.size, wanted, strict=True))
    return next((scale for scale in (8, 4, 2) if ratio >= CLOSE * scale), 1)


def _resize(image: Image.Image, fit: Callable[[Size], Size] | None) -> Image.Image:
    size = fit(image.size) if fit else image.size
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


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
    return image if image.mode == "RGB" else image.convert("RGB")  # a conversion copies in any case


def _reason(data: bytes, error: Exception) -> str:
    if not data:
        return "the file is empty"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image in a known format"
    return f"broken image ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
