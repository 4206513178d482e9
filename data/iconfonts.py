"""The icon fonts in the package QtAwesome, read as files: which icons there are and what each looks like.

Knows nothing of classes, of data sets or of colours. QtAwesome is never imported: its code needs Qt, its fonts do not.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from kshot_errors import DatasetError

EM = 256  # pixels; the size at which glyphs are drawn
THUMBNAIL = 24  # pixels; the size at which drawings are compared


@dataclass(frozen=True)
class Font:
    """One font file of QtAwesome: its name up to the version number, the family whose editions it belongs to."""

    file: str
    family: str


FONTS = (
    Font("codicon", "Codicons"),
    Font("elusiveicons-webfont", "Elusive Icons"),
    Font("fontawesome5-brands-webfont", "Font Awesome"),
    Font("fontawesome5-regular-webfont", "Font Awesome"),
    Font("fontawesome5-solid-webfont", "Font Awesome"),
    Font("fontawesome6-brands-webfont", "Font Awesome"),
    Font("fontawesome6-regular-webfont", "Font Awesome"),
    Font("fontawesome6-solid-webfont", "Font Awesome"),
    Font("materialdesignicons5-webfont", "Material Design Icons"),
    Font("materialdesignicons6-webfont", "Material Design Icons"),
    Font("phosphor", "Phosphor"),
    Font("remixicon", "Remix Icon"),
)


@dataclass(frozen=True)
class Icon:
    """One named icon of one font. path: the font's file; code: its code point there."""

    font: Font
    name: str
    path: Path
    code: int

    @property
    def identity(self) -> str:
        """The same on every machine and in every list: font and name."""
        return f"{self.font.file}/{self.name}"


def read_icons() -> list[Icon]:
    """Every icon of FONTS (about 24,600), by font and name. Raises DatasetError where the fonts are not installed."""
    icons: list[Icon] = []
    for font in FONTS:
        codes = json.loads(_file(f"{font.file}-charmap-*.json").read_text(encoding="utf-8"))
        path = _file(f"{font.file}-[0-9]*.ttf")
        # int() reads hexadecimal with and without "0x": the fonts have both.
        icons += (Icon(font, name, path, int(code, 16)) for name, code in sorted(codes.items()))
    return icons


def fingerprint() -> str:
    """Changes when the fonts or what rasterises them do: 64 hex digits."""
    digest = hashlib.sha256()
    for font in FONTS:
        for pattern in (f"{font.file}-charmap-*.json", f"{font.file}-[0-9]*.ttf"):
            digest.update(hashlib.sha256(_file(pattern).read_bytes()).digest())
    for part in (version("qtawesome"), version("pillow"), features.version("freetype2")):
        digest.update(f"{part}\0".encode())
    return digest.hexdigest()


def inked(icons: Iterable[Icon]) -> Iterator[tuple[Icon, Image.Image]]:
    """Each icon with its glyph: greyscale, 255 = ink, cropped to the ink. The few blank icons are left out."""
    for icon in icons:
        image = _glyph(icon)
        if box := image.getbbox():
            yield icon, image.crop(box)


def thumbnails(glyphs: Iterable[Image.Image]) -> np.ndarray:
    """(glyphs, 24 * 24) uint8: the ink boxes padded to squares and shrunk, to compare drawings whatever their size."""
    return np.stack([_thumbnail(image) for image in glyphs])


def _glyph(icon: Icon) -> Image.Image:
    font, text = _truetype(icon.path), chr(icon.code)
    left, top, right, bottom = (int(edge) for edge in font.getbbox(text))
    image = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(image).text((-left, -top), text, fill=255, font=font)
    return image


def _thumbnail(image: Image.Image) -> np.ndarray:
    side = max(image.size)
    square = Image.new("L", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)).ravel()


def _file(pattern: str) -> Path:
    spec = find_spec("qtawesome")
    for place in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(place, "fonts").glob(pattern)):
            return path
    raise DatasetError(f"no font file {pattern} in the package qtawesome; run: pip install 'qtawesome>=1.4,<2'")


@lru_cache(maxsize=len(FONTS))
def _truetype(path: Path) -> ImageFont.FreeTypeFont:
    # BASIC: the optional shaping library must not change the drawings.
    return ImageFont.truetype(path, EM, layout_engine=ImageFont.Layout.BASIC)
