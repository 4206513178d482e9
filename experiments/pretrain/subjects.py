"""What the nano pair learns from: drawings of icons and of the glyphs of text fonts, each with a short name.

The icons are of the families that the data set `icons` does not have, the demo's names included: the pair has met them
on drawings by other designers. A drawing that looks like one of the demo's, or of the validation words', is left out,
whatever its name. The words of VALIDATION have the demo's place when a choice is made: they are met in the same way,
and their pictures are of the same families as the demo's. Digits are left out, since `digits` is a data set of its own.
"""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

from data.catalog import DATASETS
from data.embedded import icons
from data.embedded.icons import inked, inked_text, read_icons, thumbnails

SIDE = 64  # pixels; the longest side of a drawing
# Mean absolute difference of thumbnails. Nearer pairs look like one drawing, or one with thicker strokes or longer
# parts; between 0.06 and 0.08 most pairs are two drawings of one thing. Seen on pairs of the validation words.
SIMILAR = 0.06
SAME = 0.001  # likewise: one drawing twice
EM = 128  # pixels; the size at which text is drawn

VALIDATION = (
    *("briefcase", "lightbulb", "pencil", "eye", "truck", "airplane", "thermometer", "clipboard", "table", "image"),
    *("tag", "video", "link", "sun", "speaker", "archive", "database", "chart", "microphone", "comment"),
)
NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("number", "numeric", "digit", "counter", "numbers", "superscript", "subscript", "decimal"),
)
CLASSES = (*(DATASETS["icons"].classes or ()), *VALIDATION)  # whose pictures test what was learnt
FAMILIES = tuple(dict.fromkeys(f for f in icons.FONTS.values() if f not in icons.FAMILIES))  # that are learnt from
TEXT_FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono-Oblique", "STIXGeneral")
SCRIPTS = ("LATIN", "GREEK", "CYRILLIC")


@dataclass(frozen=True)
class Subjects:
    """N drawings. masks: (N, 64, 64) uint8, 255 = ink, the longest side touching. names: what each shows. sources:
    where each is from, "font/name". small: (N, 576) uint8 thumbnails."""

    masks: np.ndarray
    names: tuple[str, ...]
    sources: tuple[str, ...]
    small: np.ndarray

    def __len__(self) -> int:
        return len(self.names)


def subjects() -> Subjects:
    """Every drawing that may be learnt from, each once. Raises DatasetError where the icon fonts are not installed."""
    drawn = [*_icons(), *_glyphs()]
    images = [image for _, _, image in drawn]
    small = thumbnails(images)
    keep = first_of_each(small) & (nearest(small, mirrored_too(held_out()[1]))[0] > SIMILAR)
    masks = thumbnails(compress(images, keep), SIDE).reshape(-1, SIDE, SIDE)
    kept = list(compress(drawn, keep))
    names, sources = tuple(name for _, name, _ in kept), tuple(source for source, _, _ in kept)
    return Subjects(masks, names, sources, small[keep])


def allowed(name: str) -> bool:
    """Whether an icon of this name ("cart-plus") may be learnt from: one with a number in it may not."""
    return not any(char.isdigit() for char in name) and set(name.split("-")).isdisjoint(NUMBERS)


def _icons() -> Iterator[tuple[str, str, Image.Image]]:
    for icon, image in inked(icon for icon in read_icons() if icon.family in FAMILIES and allowed(icon.name)):
        yield icon.identity, icons.first_word(icon), image


def held_out(words: tuple[str, ...] = CLASSES) -> tuple[list[str], np.ndarray]:
    """Identities and thumbnails of every icon of these words in the families of the data set `icons`."""
    drawn = inked(i for i in read_icons() if i.family in icons.FAMILIES and icons.first_word(i) in words)
    found = [(icon.identity, image) for icon, image in drawn]
    return [identity for identity, _ in found], thumbnails(image for _, image in found)


def _glyphs() -> Iterator[tuple[str, str, Image.Image]]:
    """Letters of three scripts and symbols, from the text fonts that matplotlib ships."""
    import matplotlib
    from fontTools.ttLib import TTFont

    for font in TEXT_FONTS:
        path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{font}.ttf")
        face = ImageFont.truetype(path, EM, layout_engine=ImageFont.Layout.BASIC)
        for code in sorted(TTFont(path).getBestCmap()):
            if (name := glyph_name(chr(code))) and (image := inked_text(face, chr(code))):
                yield f"{font}/U+{code:04X}", name, image


def glyph_name(char: str) -> str | None:
    """ "A" → "letter a", "∑" → "n ary summation"; None for what is no letter of SCRIPTS and no symbol, or
    has a number in its name."""
    words = unicodedata.name(char, "").replace("-", " ").split()
    if not words or not allowed("-".join(words).lower()):
        return None
    if words[0] in SCRIPTS and len(words) == 4 and words[2] == "LETTER":
        return f"letter {words[3].lower()}"
    return " ".join(words).lower() if unicodedata.category(char).startswith("S") and len(words) <= 4 else None


def mirrored_too(small: np.ndarray) -> np.ndarray:
    """(N, 576) thumbnails → (2N, 576): theirs, then their mirror images'. What is learnt is learnt both ways."""
    square = small.reshape(-1, icons.THUMBNAIL, icons.THUMBNAIL)
    return np.concatenate([square, square[:, :, ::-1]]).reshape(-1, small.shape[1])


def nearest(small: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) mean absolute difference, 0 to 1, of each thumbnail to the nearest of the others, and (N,) its row there."""
    import torch

    one, other = (torch.from_numpy(rows).float() for rows in (small, others))
    found = [torch.cdist(part, other, p=1).min(1) for part in one.split(256)]
    distance = torch.cat([part.values for part in found]) / (255 * small.shape[1])
    return distance.numpy(), torch.cat([part.indices for part in found]).numpy()


def first_of_each(small: np.ndarray) -> np.ndarray:
    """(N,) bool: the first of every drawing that is there more than once.

    Drawings that are the same have nearly the same amount of ink, so each is compared with its neighbours in that.
    """
    limit, ink = SAME * 255 * small.shape[1], small.sum(1, dtype=np.int64)
    order, keep = np.argsort(ink, kind="stable"), np.ones(len(small), bool)
    for shift in range(1, len(order)):
        left, right = order[:-shift], order[shift:]
        near = np.flatnonzero(ink[right] - ink[left] <= limit)
        if not len(near):
            break
        left, right = left[near], right[near]
        same = np.abs(small[left].astype(np.int16) - small[right]).sum(1) <= limit
        keep[np.maximum(left, right)[same]] = False
    return keep
