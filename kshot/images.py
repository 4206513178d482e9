"""Decodes encoded images to pixels: one rule for data sets, models and baselines.

Sizes are checked in the header, before anything is decoded. Of what a file holds beside its pixels the orientation is
read: metadata that is broken or inflates to megabytes harms no image. Colour profiles are ignored.
"""

import hashlib
import io
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from typing import Any, Literal

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin

from kshot.errors import ImageError

MAX_PIXELS = 89_478_485  # Pillow's own limit: 256 MiB as RGB
MAX_RATIO = 200  # of the long side to the short one: what Qwen's image processor takes
HEAD = 64  # bytes that tell an image from other files

# Pillow's names of the formats that are read. The readers of others may start a program (EPS: Ghostscript), or take
# seconds for a kilobyte (JPEG 2000). JPEG's reads MPO too, TIFF's all its compressions.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")

HEIF_ENDINGS = (".heic", ".heif", ".avif")
# Pillow reads AVIF where it was built with it, and HEIC never.
_HEIF = re.compile(rb".{4}ftyp(avi[fs]|he[iv][cxms]|mi[fa]1|msf1)", re.DOTALL)
# How files of the usual formats begin: PNG, JPEG, GIF, BMP, TIFF, WebP, PNM, JPEG 2000 and XL, Photoshop, HEIF
_BEGINNING = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|BM.{4}\0{4}|II\*\0|MM\0\*|RIFF.{4}WEBP"
    rb"|P[1-6]\s(\s|#[^\n]*\n)*\d+\s+\d+\s|\0\0\0\x0c(jP  |JXL )\r\n|8BPS\0|" + _HEIF.pattern,
    re.DOTALL,
)

CLOSE = 2  # a JPEG is decoded small as long as it stays this many times larger than it is wanted
Size = tuple[int, int]  # width, height in pixels

# Pillow warns above its limit and raises only above twice of it; its manual gives this line to make both an error.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
# Its other warnings are of metadata, such as a TIFF's tags. Set here, once: filters are the process's, not a thread's.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class EncodedImage(bytes):
    """The bytes of an encoded image, with their key: computed once, it travels with them."""

    @cached_property
    def key(self) -> str:
        """The SHA-256 of the bytes, in hex."""
        return hashlib.sha256(self).hexdigest()


def image_key(image: bytes) -> str:
    """The identity of an encoded image: the SHA-256 of its bytes, in hex."""
    return image.key if isinstance(image, EncodedImage) else hashlib.sha256(image).hexdigest()


def begins_like_image(head: bytes) -> bool:
    """Whether the first HEAD bytes of a file are those of an image."""
    return _BEGINNING.match(head) is not None


def is_plain(image: Image.Image) -> bool:
    """Whether an opened image's pixels can be taken as they are stored: upright, without transparency, RGB or 8-bit
    grey, which everybody turns into the same RGB."""
    return _orientation(image) == 1 and image.mode in ("RGB", "L") and not image.has_transparency_data


def open_header(data: bytes, name: str = "image") -> Image.Image:
    """The image with its format, mode, size and orientation, not decoded. Raises ImageError as `open_image` does."""
    pixels, metadata = _divided(data)
    try:
        image = Image.open(io.BytesIO(pixels), formats=FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError(f"{name}: more than {MAX_PIXELS:,} pixels; make it smaller") from error
    except Exception as error:  # Pillow's readers raise a dozen unrelated types on bytes that are broken
        raise ImageError(f"{name}: {_reason(data, name, error)}; replace or remove it") from error
    image.info.update(metadata)
    _check_size(image, name)
    return image


def open_image(data: bytes, name: str = "image", fit: Callable[[Size], Size] | None = None) -> Image.Image:
    """The image as RGB, upright (EXIF orientation applied); transparency is laid over white; of an animation, frame 1.

    name: what an error calls it.
    fit: the size wanted for a full size, the same rule for width and height; the image is resized to it with LANCZOS.
        A JPEG of 2 * CLOSE times that size or more is decoded at 1/2, 1/4 or 1/8, CLOSE times as large as wanted or
        more, and then resized. At just CLOSE = 2 that is 0.9 of 255 a channel and 45 dB (PSNR) from full decoding for
        the median photograph of Caltech-101; encoding the result as JPEG takes it 6 of 255 and 29 dB away. All other
        images are exact.
    Raises ImageError for bytes that are no image, a truncated image, one of more than MAX_PIXELS pixels or of sides
    beyond MAX_RATIO (seen in the header, before decoding) or one whose pixels are floating point.
    """
    with open_header(data, name) as image:
        try:
            decoded = _decode(image, fit)
            turn = TURNS.get(_orientation(image))
            decoded = decoded if turn is None else decoded.transpose(turn)
        except Exception as error:  # as above
            raise ImageError(f"{name}: {_reason(data, name, error)}; replace or remove it") from error
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
    if image.format != "JPEG" or image.mode not in ("RGB", "L"):  # CMYK to RGB is not linear
        return 1
    ratio = min(side / target for side, target in zip(image.size, wanted, strict=True))
    return next((scale for scale in (8, 4, 2) if ratio >= CLOSE * scale), 1)


def _resize(image: Image.Image, fit: Callable[[Size], Size] | None) -> Image.Image:
    size = fit(image.size) if fit else image.size
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:  # only where a program has switched Pillow's own check off
        raise ImageError(f"{name}: {width}x{height} is more than {MAX_PIXELS:,} pixels; make it smaller")
    if max(width, height) > MAX_RATIO * min(width, height):
        limit = f"one side may be at most {MAX_RATIO} times as long as the other"
        raise ImageError(f"{name}: {width}x{height} pixels is too narrow: {limit}; crop, pad or remove it")


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


def _reason(data: bytes, name: str, error: Exception) -> str:
    if not data:
        return "the file is empty"
    if isinstance(error, Image.UnidentifiedImageError):
        if _HEIF.match(data) or name.lower().endswith(HEIF_ENDINGS):
            return "HEIC, HEIF or AVIF, which cannot be read here; convert it to JPEG or PNG"
        if kind := _other_format(data):
            return f"{kind}, which is not read; convert it to PNG or JPEG"
        return "not an image in a known format"
    return f"broken image ({str(error).splitlines()[0] if str(error) else type(error).__name__})"


def _other_format(data: bytes) -> str:
    """Pillow's name of the format whose files begin so, but which is not in FORMATS; "" where it knows none."""
    Image.init()
    for kind, (_, begins) in Image.OPEN.items():
        with suppress(Exception):  # as above
            if begins and kind not in FORMATS and begins(data[:16]) is True:
                return kind
    return ""


# Metadata

ORIENTATION = ExifTags.Base.Orientation
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
INTEGERS = {3: 2, 4: 4, 8: 2, 9: 4}  # types of EXIF → their bytes
PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
# Texts of a PNG that are read: two may hold its orientation, and Pillow writes a comment into the prepared JPEG.
PNG_TEXTS = b"Raw profile type exif\0", b"XML:com.adobe.xmp\0", b"comment\0"
EXIF, XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"  # how APP1 segments of a JPEG begin
_SEGMENT = re.compile(rb"\xff+([\xc0-\xcf\xdb-\xfe])(..)", re.DOTALL)  # of a JPEG, before its first scan


def _divided(data: bytes) -> tuple[bytes, dict[Any, Any]]:
    """The file without its metadata, and those that are read, as in Pillow's `info`. Of PNG and JPEG: Pillow takes bad
    metadata of theirs for a bad image."""
    if data.startswith(PNG):
        return _divided_png(data)
    return _divided_jpeg(data) if data.startswith(JPEG) else (data, {})


def _divided_png(data: bytes) -> tuple[bytes, dict[Any, Any]]:
    kept, texts, start = [PNG], dict[bytes, tuple[bytes, bytes]](), len(PNG)
    while (kind := data[start + 4 : start + 8]) not in (b"", b"IEND"):
        body, end = start + 8, start + 12 + int.from_bytes(data[start : start + 4], "big")
        if kind == b"tRNS" or not kind[0] & 32:  # a capital letter: needed for the pixels
            kept.append(data[start:end])
        elif kind == b"eXIf" or data.startswith(PNG_TEXTS, body, end):
            name = data[body : body + 4] if kind != b"eXIf" else kind
            texts[name] = kind, data[body : end - 4]  # one of a name: each may inflate to Pillow's limit, a megabyte
        start = end
    metadata: dict[Any, Any] = {}
    for kind, content in texts.values():
        stream = PngImagePlugin.PngStream(io.BytesIO(content))
        with suppress(Exception):  # beyond that limit, or broken
            stream.call(kind, 0, len(content))
        metadata |= stream.im_info
    return b"".join([*kept, data[start : start + 12]]), metadata


def _divided_jpeg(data: bytes) -> tuple[bytes, dict[Any, Any]]:
    kept, metadata, start = [data[:2]], dict[Any, Any](), 2
    while segment := _SEGMENT.match(data, start):
        marker, end = segment[1][0], segment.start(2) + int.from_bytes(segment[2], "big")
        body = data[segment.end() : end]
        if marker == 0xE1 and body.startswith(EXIF):  # EXIF beyond 64 KiB goes on in a second segment
            metadata["exif"] = metadata.get("exif", EXIF) + body.removeprefix(EXIF)
        elif marker == 0xE1 and body.startswith(XMP):
            metadata["xmp"] = body.removeprefix(XMP)
        elif not 0xE1 <= marker <= 0xEF or marker == 0xEE:  # APP0 and APP14 say how colours are written
            kept.append(data[start:end])
        start = end
    return b"".join([*kept, data[start:]]), metadata


def _orientation(image: Image.Image) -> Any:
    """How an opened image is turned, 1 to 8: by its EXIF data, or else by XMP or a TIFF's tag; 1 where none says so."""
    found = _exif_orientation(image.info.get("exif", b""))
    if found is None:
        with suppress(Exception):  # Pillow's readers, as above
            found = Image.Image.getexif(image).get(ORIENTATION)  # not PngImageFile's, which decodes the image
    return 1 if found is None else found


def _exif_orientation(exif: bytes) -> int | None:
    """The tag in the first directory, whatever is wrong with others, at which Pillow may give up."""
    tiff = re.sub(rb"^(Exif\0\0){1,2}", b"", exif)
    order: Literal["little", "big"] = "little" if tiff.startswith(b"II*\0") else "big"

    def number(start: int, size: int) -> int:
        return int.from_bytes(tiff[start : start + size], order)

    if number(2, 2) != 42:
        return None
    first = number(4, 4) + 2
    for entry in range(first, min(first + 12 * number(first - 2, 2), len(tiff)), 12):
        size = INTEGERS.get(number(entry + 2, 2))
        if number(entry, 2) == ORIENTATION and number(entry + 4, 4) == 1 and size:
            return number(entry + 8, size)
    return None
