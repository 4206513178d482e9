"""What the nano pair learns from: drawings of icons and of the glyphs of text fonts, each with a short name.

Nothing that the demo's classes stand for is among them: neither under their names, nor under another word for the same
thing, nor as a drawing that looks like one of theirs. Digits are left out as well, since `digits` is a data set of its
own. The words of VALIDATION are left out by the same rule: every choice in the recipe is made on them.
"""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, compress
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

from data.catalog import DATASETS
from data.embedded import icons
from data.embedded.icons import inked, inked_text, read_icons, thumbnails

SIDE = 64  # pixels; the longest side of a drawing
SIMILAR = 0.03  # mean absolute difference of thumbnails: what is nearer to a held-out drawing shows the same thing
SAME = 0.001  # likewise: one drawing twice
EM = 128  # pixels; the size at which text is drawn

# Other words for what the demo's classes show, by class.
SYNONYMS = {
    "star": ("favorite", "favourite", "grade"),
    "camera": ("photo", "aperture", "webcam"),
    "cloud": ("weather",),
    "heart": ("love", "like", "cardio"),
    "lock": ("private", "encryption", "https"),
    "key": ("password",),
    "clock": ("alarm", "watch", "time", "timer", "history", "schedule"),
    "bell": ("alarm", "notification"),
    "phone": ("call", "dialpad", "mobile"),
    "book": ("read", "library", "bible", "islam", "judaism"),
    "car": ("automobile", "auto", "vehicle", "taxi", "suv", "van"),
    "home": ("house", "residential", "cottage"),
    "train": ("rail", "railway", "subway", "metro", "tram", "locomotive"),
    "flag": ("pennant", "banner"),
    "folder": ("directory",),
    "battery": ("accumulator",),
    "calendar": ("event", "date"),
    "cart": ("trolley", "shopping"),
    "music": ("note", "song"),
    "shield": ("security",),
}
VALIDATION = (
    *("briefcase", "lightbulb", "printer", "flask", "truck", "robot", "thermometer", "gamepad", "airplane"),
    *("microphone", "pencil", "eye", "database", "hourglass", "movie", "cookie", "globe", "umbrella", "flower", "cup"),
)
NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("number", "numeric", "digit", "counter", "numbers", "superscript", "subscript", "decimal"),
)
CLASSES = (*(DATASETS["icons"].classes or ()), *VALIDATION)  # held out: those of the demo, and of validation
TEXT_FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono-Oblique", "STIXGeneral")
SCRIPTS = ("LATIN", "GREEK", "CYRILLIC")


@dataclass(frozen=True)
class Subjects:
    """N drawings. masks: (N, 64, 64) uint8, 255 = ink, the longest side touching. names: what each shows."""

    masks: np.ndarray
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)


def subjects() -> Subjects:
    """Every drawing that may be learnt from, each once. Raises DatasetError where the icon fonts are not installed."""
    drawn = [*_icons(), *_glyphs()]
    names, images = [name for name, _ in drawn], [image for _, image in drawn]
    small = thumbnails(images)
    keep = first_of_each(small) & ~near_any(small, held_out_thumbnails())
    masks = thumbnails(compress(images, keep), SIDE).reshape(-1, SIDE, SIDE)
    return Subjects(masks, tuple(compress(names, keep)))


def allowed(name: str) -> bool:
    """Whether an icon of this name ("cart-plus") may be learnt from: no held-out word anywhere, nor a number.

    A class of the demo or of VALIDATION counts wherever its letters stand ("unlock"), unless it is as short as "car",
    which is in "card" by accident; the other words count as whole words.
    """
    words = name.split("-")
    if any(char.isdigit() for char in name) or not set(words).isdisjoint(NUMBERS):
        return False
    parts = {*words, *(word.removesuffix("s") for word in words)}
    if not parts.isdisjoint((*CLASSES, *chain.from_iterable(SYNONYMS.values()))):
        return False
    return not any(word in name for word in CLASSES if len(word) > 3)


def _icons() -> Iterator[tuple[str, Image.Image]]:
    for icon, image in inked(icon for icon in read_icons() if allowed(icon.name)):
        yield icons.first_word(icon), image


def held_out_thumbnails() -> np.ndarray:
    """Thumbnails of every drawing of the demo's classes and of the validation words."""
    return thumbnails(image for _, image in inked(icon for icon in read_icons() if icons.first_word(icon) in CLASSES))


def _glyphs() -> Iterator[tuple[str, Image.Image]]:
    """Letters of three scripts and symbols, from the text fonts that matplotlib ships."""
    import matplotlib
    from fontTools.ttLib import TTFont

    for font in TEXT_FONTS:
        path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{font}.ttf")
        face = ImageFont.truetype(path, EM, layout_engine=ImageFont.Layout.BASIC)
        for code in sorted(TTFont(path).getBestCmap()):
            if (name := glyph_name(chr(code))) and (image := inked_text(face, chr(code))):
                yield name, image


def glyph_name(char: str) -> str | None:
    """ "A" → "letter a", "∑" → "n ary summation"; None for what is no letter of SCRIPTS, no symbol, or held out."""
    words = unicodedata.name(char, "").replace("-", " ").split()
    if not words or not allowed("-".join(words).lower()):
        return None
    if words[0] in SCRIPTS and len(words) == 4 and words[2] == "LETTER":
        return f"letter {words[3].lower()}"
    return " ".join(words).lower() if unicodedata.category(char).startswith("S") and len(words) <= 4 else None


def near_any(small: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(N,) bool: which drawings are near one of the others."""
    import torch

    one, other = (torch.from_numpy(rows).float() for rows in (small, others))
    nearest = [torch.cdist(part, other, p=1).amin(1) for part in one.split(256)]
    return torch.cat(nearest).numpy() <= SIMILAR * 255 * small.shape[1]


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
