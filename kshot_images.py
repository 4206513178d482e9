"""What encoded image bytes mean as pixels: one rule for data sets, models and baselines. Knows none of them.

Sizes are checked in the header, before anything is decoded. Colour profiles are ignored. Like `kshot_errors` it stands
below data, vlm and baselines.
"""

import io
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageOps

from kshot_errors import ImageError

MAX_PIXELS = 89_478_485  # Pillow's own limit: 256 MiB as RGB

# Pillow warns above its limit and raises only above twice of it; its manual gives this line to make both an error.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def is_plain(image: Image.Image) -> bool:
    """Whether an opened image's pixels can be taken as they are stored: upright RGB without transparency.

    Of a file whose EXIF data cannot be read that is not known, so it is not plain.
    """
    try:
        upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    except Exception:  # Pillow's readers raise a dozen unrelated types on bytes that are broken
        return False
    return upright and image.mode == "RGB" and not image.has_transparency_data


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


def open_image(data: bytes, name: str = "image") -> Image.Image:
    """The image as RGB, upright (EXIF orientation applied); transparency is laid over white; of an animation, frame 1.

    name: what an error calls it.
    Raises ImageError for bytes that are no image, a truncated image, one of more than MAX_PIXELS pixels (seen in the
    header, before decoding) or one whose pixels are floating point.
    """
    with open_header(data, name) as image:
        try:
            image.load()
            upright = ImageOps.exif_transpose(image)
        except Exception as error:  # as above
            raise ImageError(f"{name}: {_reason(data, error)}; replace or remove it") from error
        return _to_rgb(upright, name)


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


def _reason(data: bytes, error: Exception) -> str:
    if not data:
        return "the file is empty"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image in a known format"
    return f"broken image ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
