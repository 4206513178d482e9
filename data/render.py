"""Draws a glyph as an interface shows it: 64x64, its own size, place, tilt and colours, at times on a button.

Knows neither fonts nor classes. Every choice comes from the generator it is given.
"""

import colorsys
import io
from random import Random

from PIL import Image, ImageDraw

VERSION = 1  # raise it when a drawing changes: caches of drawings are named by it
SIDE = 64
SUPERSAMPLE = 4
MARGIN = 2  # pixels free on every side
TILT = 12.0  # degrees, either way
DARK = 0.4  # share of dark themes
BUTTON = 0.3  # share of icons on a button
MIN_CONTRAST = 4.5  # what WCAG 2.1 asks of text; black or white has it on any fill

Colour = tuple[int, int, int]


def render(glyph: Image.Image, rng: Random) -> bytes:
    """glyph: ink as greyscale, cropped to it → PNG bytes, 64x64 RGB; what is drawn is 28 to 60 pixels long."""
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
    corner = (_place(width, rng), _place(height, rng))
    canvas = Image.new("RGB", (SIDE * SUPERSAMPLE, SIDE * SUPERSAMPLE), ground)
    for mask, colour in turned:
        canvas.paste(colour, corner, mask.resize((width, height), Image.Resampling.BOX, box))
    return canvas


def _place(extent: int, rng: Random) -> int:
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
