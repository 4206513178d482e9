"""The data set `icons`: real icons of many designers, in 20 classes, drawn once each and kept in the user's cache.

The icons are those of FAMILIES. The nano models have learnt from the other families alone, so what they know of the
classes is their names and how other designers draw them.
An icon's class is the first word of its name ("home-plus" is a home). The same drawing in two fonts or under two names
is one design; a drawing in two classes is left out of both, since its label would be a guess. Designs that are nearly
the same, or have one name in two editions of one family (redrawn), are one group and are on one side of the split.

The icon fonts in the package QtAwesome are read as files: importing QtAwesome would need Qt.
"""

import colorsys
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from data.dataset import Dataset, DatasetSpec, Item, content_key, examples_of
from data.fewshot import split_items
from data.pack import open_or_make
from kshot.errors import DatasetError

# Reading the fonts

EM = 256  # pixels; the size at which glyphs are drawn
THUMBNAIL = 24  # pixels; the size at which drawings are compared


FONTS = {  # the font files of QtAwesome, up to the version number, and the family whose editions they belong to
    "codicon": "Codicons",
    "elusiveicons-webfont": "Elusive Icons",
    "fontawesome5-brands-webfont": "Font Awesome",
    "fontawesome5-regular-webfont": "Font Awesome",
    "fontawesome5-solid-webfont": "Font Awesome",
    "fontawesome6-brands-webfont": "Font Awesome",
    "fontawesome6-regular-webfont": "Font Awesome",
    "fontawesome6-solid-webfont": "Font Awesome",
    "materialdesignicons5-webfont": "Material Design Icons",
    "materialdesignicons6-webfont": "Material Design Icons",
    "phosphor": "Phosphor",
    "remixicon": "Remix Icon",
}
FAMILIES = ("Elusive Icons", "Font Awesome", "Phosphor", "Remix Icon")  # whose icons the data set has


@dataclass(frozen=True)
class Icon:
    """One named icon of one font. path: the font's file; code: its code point there."""

    font: str
    family: str
    name: str
    path: Path
    code: int

    @property
    def identity(self) -> str:
        """The same on every machine and in every list: font and name."""
        return f"{self.font}/{self.name}"


def read_icons() -> list[Icon]:
    """Every icon of FONTS (about 24,600), by font and name. Raises DatasetError where the fonts are not installed."""
    icons: list[Icon] = []
    for font, family in FONTS.items():
        codes = json.loads(_file(f"{font}-charmap-*.json").read_text(encoding="utf-8"))
        path = _file(f"{font}-[0-9]*.ttf")
        # int() reads hexadecimal with and without "0x": the fonts have both.
        icons += (Icon(font, family, name, path, int(code, 16)) for name, code in sorted(codes.items()))
    return icons


def fingerprint() -> str:
    """Changes when the fonts or what rasterises them do: 64 hex digits."""
    digest = hashlib.sha256()
    for font in FONTS:
        for pattern in (f"{font}-charmap-*.json", f"{font}-[0-9]*.ttf"):
            digest.update(hashlib.sha256(_file(pattern).read_bytes()).digest())
    for part in (version("qtawesome"), version("pillow"), features.version("freetype2")):
        digest.update(f"{part}\0".encode())
    return digest.hexdigest()


def inked(icons: Iterable[Icon]) -> Iterator[tuple[Icon, Image.Image]]:
    """Each icon with its glyph: greyscale, 255 = ink, cropped to the ink. The few blank icons are left out."""
    for icon in icons:
        if image := inked_text(_truetype(icon.path), chr(icon.code)):
            yield icon, image


def inked_text(font: ImageFont.FreeTypeFont, text: str) -> Image.Image | None:
    """A text in greyscale, 255 = ink, cropped to the ink; None where it is blank."""
    left, top, right, bottom = (int(edge) for edge in font.getbbox(text))
    image = Image.new("L", (max(0, right - left), max(0, bottom - top)))
    ImageDraw.Draw(image).text((-left, -top), text, fill=255, font=font)
    return image.crop(box) if (box := image.getbbox()) else None


def thumbnails(glyphs: Iterable[Image.Image], side: int = THUMBNAIL) -> np.ndarray:
    """(glyphs, side * side) uint8: the ink boxes padded to squares and shrunk, so that drawings of any size compare."""
    small = (_tile(image, 1.0).resize((side, side), Image.Resampling.BOX) for image in glyphs)
    return np.stack([np.asarray(image).ravel() for image in small])


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


# Drawing

DRAWING_VERSION = 1  # raise it when a drawing changes: caches of drawings are named by it
SIDE = 64
SUPERSAMPLE = 4
MARGIN = 2  # pixels free on every side
TILT = 12.0  # degrees, either way
DARK = 0.4  # share of dark themes
BUTTON = 0.3  # share of icons on a button
MIN_CONTRAST = 4.5  # what WCAG 2.1 asks of text; black or white has it on any fill

Colour = tuple[int, int, int]


def render(glyph: Image.Image, rng: Random) -> bytes:
    """A glyph as an interface shows it, of random size, position, tilt and colours, at times on a button.

    glyph: ink as greyscale, cropped to it → PNG bytes, 64x64 RGB; the drawing is 28 to 60 pixels long. Every choice
    comes from rng.
    """
    ground, fill, ink = _colours(rng)
    layers = [(_tile(glyph, rng.uniform(0.58, 0.72)), ink)] if fill else [(_tile(glyph, 1.0), ink)]
    size = rng.uniform(46, SIDE - 2 * MARGIN) if fill else rng.uniform(28, 56)
    if fill:
        layers.insert(0, (_button(layers[0][0].width, rng), fill))
    canvas = _compose(ground, layers, size, rng)
    buffer = io.BytesIO()
    # Stored, not deflated: the bytes, and with them the image's key, do not depend on the build of zlib.
    canvas.reduce(SUPERSAMPLE).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def contrast(one: Colour, other: Colour) -> float:
    """Contrast ratio of two colours after WCAG 2.1: 1 (the same) to 21 (black and white)."""
    dark, light = sorted((_luminance(one), _luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def _colours(rng: Random) -> tuple[Colour, Colour | None, Colour]:
    """Ground, fill of the button (None: no button) and ink; the ink stands out from what is behind it."""
    dark = rng.random() < DARK
    ground = _colour(rng, (0.04, 0.2), (0.0, 0.3)) if dark else _colour(rng, (0.9, 1.0), (0.0, 0.5))
    fill = _colour(rng, (0.25, 0.75), (0.0, 0.9)) if rng.random() < BUTTON else None
    behind = fill or ground
    while True:
        ink = _colour(rng, (0.0, 1.0), (0.0, 0.9))
        if contrast(ink, behind) >= MIN_CONTRAST:
            return ground, fill, ink


def _compose(ground: Colour, layers: list[tuple[Image.Image, Colour]], size: float, rng: Random) -> Image.Image:
    """The layers (square masks of one size, the outermost first) tilted together, scaled to size and put in place."""
    angle = rng.uniform(-TILT, TILT)
    turned = [(mask.rotate(angle, Image.Resampling.BILINEAR, expand=True), colour) for mask, colour in layers]
    box = turned[0][0].getbbox() or (0, 0, *turned[0][0].size)
    scale = size * SUPERSAMPLE / max(box[2] - box[0], box[3] - box[1])
    width, height = (max(1, round(scale * (box[i + 2] - box[i]))) for i in (0, 1))
    corner = (_offset(width, rng), _offset(height, rng))
    canvas = Image.new("RGB", (SIDE * SUPERSAMPLE, SIDE * SUPERSAMPLE), ground)
    for mask, colour in turned:
        canvas.paste(colour, corner, mask.resize((width, height), Image.Resampling.BOX, box))
    return canvas


def _offset(extent: int, rng: Random) -> int:
    free = (SIDE - 2 * MARGIN) * SUPERSAMPLE - extent
    return MARGIN * SUPERSAMPLE + int(rng.random() * (free + 1))


def _tile(glyph: Image.Image, share: float) -> Image.Image:
    """A square mask with the glyph in its middle; share: the glyph's longest side over the square's."""
    side = round(max(glyph.size) / share)
    tile = Image.new("L", (side, side))
    tile.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
    return tile


def _button(side: int, rng: Random) -> Image.Image:
    """A square mask: a disc, a rounded or an almost sharp square."""
    tile = Image.new("L", (side, side))
    radius = side * (0.5, 0.25, 0.1)[int(rng.random() * 3)]
    ImageDraw.Draw(tile).rounded_rectangle((0, 0, side - 1, side - 1), radius, fill=255)
    return tile


def _colour(rng: Random, lightness: tuple[float, float], saturation: tuple[float, float]) -> Colour:
    """A colour of any hue; half of them are greys, as in most themes."""
    grey = rng.random() < 0.5
    hue, light, strong = rng.random(), rng.uniform(*lightness), rng.uniform(*saturation)
    red, green, blue = colorsys.hls_to_rgb(hue, light, 0.0 if grey else strong)
    return round(255 * red), round(255 * green), round(255 * blue)


def _luminance(colour: Colour) -> float:
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# The data set

SAME = 0.001  # mean absolute difference of two thumbnails, 1 = black against white: one drawing
NEAR = 0.02  # likewise: near duplicates
MAX_TEST = 40  # test designs per class; a third of a class where that is less
CHOICE_VERSION = 2  # raise it when the choice of icons changes


def load(spec: DatasetSpec, *, root: Path | None, split_seed: int) -> Dataset:
    """Seeded split of the designs, stratified by class: a third is test, at most 40 per class.

    The first call draws the icons (seconds) and keeps them as a pack in root, the next ones read it.
    Raises DatasetError where the fonts are not installed or root cannot be written.
    """
    words = spec.classes or ()
    items, _ = open_or_make(f"icons-{_key(words)}", lambda facts: designs(words), root)
    groups = [item.split for item in items]
    train, test = split_items(items, test_size=lambda n: min(MAX_TEST, n // 3), seed=split_seed, groups=groups)
    protocol = f"{spec.protocol}-{split_seed}"
    return Dataset(spec.name, protocol, words, examples_of(train, words), examples_of(test, words))


def designs(words: Sequence[str]) -> Iterator[Item]:
    """The designs of FAMILIES whose first word is in words, drawn; in place of a split each has its group of near
    duplicates."""
    chosen = (icon for icon in read_icons() if icon.family in FAMILIES and first_word(icon) in words)
    drawings = list(inked(chosen))
    icons = [icon for icon, _ in drawings]
    for row, first in sift(icons, distances(thumbnails(glyph for _, glyph in drawings))).items():
        image = draw(*drawings[row])
        yield Item(icons[row].identity, icons[first].identity, first_word(icons[row]), image, content_key(image))


def first_word(icon: Icon) -> str:
    """The class of an icon, by definition."""
    return icon.name.split("-")[0]


def draw(icon: Icon, glyph: Image.Image) -> bytes:
    """The icon as PNG, seeded by its identity alone: the same whatever other icons are drawn."""
    return render(glyph, Random(f"icons/{icon.identity}"))


def distances(thumbnails: np.ndarray) -> np.ndarray:
    """thumbnails: (icons, pixels) uint8 → (icons, icons) mean absolute difference, 0 to 1."""
    from scipy.spatial.distance import pdist, squareform

    return squareform(pdist(thumbnails, "cityblock")) / (255 * thumbnails.shape[1])


def sift(icons: Sequence[Icon], distance: np.ndarray) -> dict[int, int]:
    """Which icons to keep: row of each design → first row of its group of near duplicates.

    distance: (icons, icons), as of `distances`. Of one drawing the first row is kept, or none if it is in two classes.
    """
    words = np.array([first_word(icon) for icon in icons])
    drawing, first = _components(distance <= SAME)
    kept = [int(row) for d, row in enumerate(first) if len(set(words[drawing == d])) == 1]
    titles = np.array([f"{icon.family}/{icon.name}" for icon in icons])
    redrawn = titles[:, None] == titles  # one name in one family, whatever the edition
    near = (distance <= NEAR) & (words[:, None] == words)
    group, first = _components((near | redrawn)[np.ix_(kept, kept)])
    return {row: kept[first[g]] for row, g in zip(kept, group, strict=True)}


def _components(linked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """linked: (n, n) symmetric → (n,) number of each row's connected component; first row of each component."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    number = connected_components(csr_array(linked), directed=False)[1]
    return number, np.unique(number, return_index=True)[1]


def _key(words: Sequence[str]) -> str:
    parts = (fingerprint(), DRAWING_VERSION, CHOICE_VERSION, *words)
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]
