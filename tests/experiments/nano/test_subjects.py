"""What the nano pair may learn from: by name, by drawing, once each; and that what it is tested on is not there."""

import re
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from fontTools.ttLib import TTFont
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFont
from scipy.spatial.distance import cdist

from data.catalog import DATASETS
from data.embedded import icons as iconfonts
from data.embedded.icons import first_word, inked, inked_text, read_icons, thumbnails
from experiments.pretrain import subjects as module
from experiments.pretrain.subjects import (
    NUMBERS,
    SAME,
    SIMILAR,
    SYNONYMS,
    TEXT_FONTS,
    VALIDATION,
    allowed,
    first_of_each,
    glyph_name,
    held_out_thumbnails,
    near_any,
    subjects,
)
from kshot.errors import DatasetError
from tests.experiments.nano.drawn import NAMES, icon

DEMO = DATASETS["icons"].classes or ()
PIXELS = 24 * 24  # of a thumbnail

# The rule once more, as patterns: whole words, in the plural too, and anywhere for classes longer than "car".
WORDS = "|".join(chain(DEMO, VALIDATION, chain.from_iterable(SYNONYMS.values())))
LONG = "|".join(word for word in (*DEMO, *VALIDATION) if len(word) > 3)
KEPT_OUT = re.compile(rf"\b({WORDS})s?\b|{LONG}|\b({'|'.join(NUMBERS)})\b|\d")


def characters(fonts: tuple[str, ...]) -> Iterator[str]:
    for font in fonts:
        yield from map(chr, TTFont(Path(matplotlib.get_data_path(), "fonts/ttf", f"{font}.ttf")).getBestCmap())


@pytest.mark.parametrize("name", ["card", "monkey", "keyboard", "teacup", "caret-down", "bone", "digital", "network"])
def test_short_words_are_in_others_by_accident(name: str) -> None:
    assert allowed(name)


@pytest.mark.parametrize(
    "name",
    [
        *("cart", "cart-plus", "plus-cart", "carts", "car-side", "key", "keys", "house-key"),  # a class, or many
        *("unlock", "stars", "starfish", "headphones", "bookmark", "smartphone", "doorbell"),  # a class, inside
        *("house", "houses", "photo-film", "love-letter", "notification"),  # another word for a class
        *("robot", "airplanes", "teacup-cup", "eyes", "globes"),  # a word of validation
        *("numeric-3-box", "dice-d6", "box-4", "dice-one", "ten-k", "counter", "numeric", "roman-numeral-²"),
    ],
)
def test_what_is_kept_out_by_name(name: str) -> None:
    assert not allowed(name)


def test_every_class_of_the_demo_has_other_words() -> None:
    assert SYNONYMS.keys() == set(DEMO)
    assert not set(VALIDATION) & set(DEMO)


def test_the_rule_holds_for_the_name_of_every_icon() -> None:
    names = {i.name for i in read_icons()}
    assert {n for n in names if allowed(n)} == {n for n in names if not KEPT_OUT.search(n)}


def test_the_rule_holds_for_what_every_glyph_is_called() -> None:
    """A glyph's own name may be longer than the one it is learnt by: both hold nothing that is kept out."""
    named = {char: name for char in characters(TEXT_FONTS) if (name := glyph_name(char))}
    assert len(named) > 1000
    wrong = [(char, name) for char, name in named.items() if KEPT_OUT.search(name)]
    assert wrong + [char for char in named if KEPT_OUT.search(unicodedata.name(char).lower())] == []


def test_no_glyph_that_stands_for_a_number() -> None:
    """Nothing in all of Unicode that has a value, and nothing in the fonts that is made of digits."""
    valued = [char for char in map(chr, range(sys.maxunicode)) if unicodedata.numeric(char, None) is not None]
    made = [char for char in characters(TEXT_FONTS) if re.search(r"\d", unicodedata.normalize("NFKD", char))]
    assert len(valued) > 1000
    assert len(made) > 100
    assert [char for char in (*valued, *made) if glyph_name(char)] == []


@pytest.mark.parametrize(
    ("char", "name"),
    [
        *(("A", "letter a"), ("a", "letter a"), ("Ω", "letter omega"), ("ж", "letter zhe")),
        *(("∑", "n ary summation"), ("+", "plus sign"), ("♞", "black chess knight")),
        *(("é", None), ("ª", None), ("א", None)),  # an accent, no plain letter, a fourth script
        *(("7", None), ("②", None), ("½", None), ("Ⅳ", None), ("⚂", None)),
        *(("★", None), ("☎", None), ("♥", None), ("♪", None), ("✈", None)),  # what is held out, in Unicode's words
        *(("!", None), (" ", None), ("\n", None), ("\ue000", None)),  # punctuation, blanks and what has no name
    ],
)
def test_glyph_names(char: str, name: str | None) -> None:
    assert glyph_name(char) == name


def test_the_drawings_come_once_each_and_none_that_looks_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this order: the icons, then the letters and symbols of a font, each under its name."""
    comet = replace(icon("star"), name="comet")  # a star under another name
    again = replace(icon("anchor"), name="grapnel")  # drawn already
    chosen = [icon(name) for name in (*NAMES, "star", "unlock", "house", "cart-plus")]
    monkeypatch.setattr(module, "read_icons", lambda: [*chosen, comet, again])
    monkeypatch.setattr(module, "TEXT_FONTS", ("cmr10",))
    drawn = subjects()
    icons, glyphs = drawn.names[: len(NAMES)], drawn.names[len(NAMES) :]
    assert icons == NAMES
    assert {f"letter {chr(code)}" for code in range(ord("a"), ord("z") + 1)} <= set(glyphs)
    assert set(glyphs) <= {glyph_name(char) for char in characters(("cmr10",))}
    assert drawn.masks.shape == (len(drawn), 64, 64)
    assert drawn.masks.dtype == np.uint8


def test_drawings_of_the_held_out_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those whose first word is a class or a word of validation, and no other."""
    held_out = [icon(name) for name in ("star", "star-half", "robot")]
    monkeypatch.setattr(module, "read_icons", lambda: [icon("anchor"), *held_out, icon("house")])
    expected = thumbnails(image for _, image in inked(held_out))
    assert np.array_equal(held_out_thumbnails(), expected)


def test_missing_fonts_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iconfonts, "find_spec", lambda name: None)
    with pytest.raises(DatasetError, match="qtawesome"):
        subjects()


def drawings(seed: int, count: int) -> np.ndarray:
    """Thumbnails of three kinds, each some grey steps away from the first of its kind."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 200, (3, PIXELS))
    rows = kinds[rng.integers(0, 3, count)]
    for row in rows:
        row[rng.choice(PIXELS, 50, replace=False)] += rng.integers(0, 5)
    return rows.astype(np.uint8)


@given(seed=st.integers(0, 10**6), count=st.integers(1, 40))
def test_of_one_drawing_the_first_stays(seed: int, count: int) -> None:
    small = drawings(seed, count)
    same = cdist(small, small, "cityblock") / (255 * PIXELS) <= SAME
    expected = [not same[i, :i].any() for i in range(count)]
    assert first_of_each(small).tolist() == expected


@given(seed=st.integers(0, 10**6), count=st.integers(1, 300), offset=st.integers(0, 16))
def test_what_is_near_a_held_out_drawing(seed: int, count: int, offset: int) -> None:
    small, others = drawings(seed, count) // 2, drawings(seed + 1, 3) // 2
    others[0] = small[0] + offset  # 0.03 lies at 7.65 grey steps
    expected = (cdist(small, others, "cityblock") / (255 * PIXELS)).min(1) <= SIMILAR
    assert near_any(small, others).tolist() == expected.tolist()


@given(width=st.integers(1, 300), height=st.integers(1, 300))
def test_a_mask_is_the_drawing_in_the_middle_of_a_square(width: int, height: int) -> None:
    mask = thumbnails([Image.new("L", (width, height), 255)], 64).reshape(64, 64)
    assert mask.dtype == np.uint8
    longest = max(width, height)
    assert abs(mask.mean() / 255 - width * height / longest**2) <= 1 / 64
    across, along = (mask, mask.T) if width >= height else (mask.T, mask)
    assert across[:, 0].any()
    assert across[:, -1].any()
    middle = (along.astype(float).sum(0) @ (np.arange(64) + 0.5)) / along.sum()
    assert abs(middle - 32) < 32 / longest + 0.5  # half a pixel of the drawing, and rounding


def test_the_ink_of_every_drawing_of_a_font_touches_two_opposite_edges() -> None:
    drawn = [image for _, image in inked(i for i in read_icons() if i.font == "codicon")]
    inks = thumbnails(drawn, 64).reshape(-1, 64, 64) > 0
    touches = (inks[:, :, 0].any(1) & inks[:, :, -1].any(1)) | (inks[:, 0].any(1) & inks[:, -1].any(1))
    assert len(touches) > 400
    assert touches.all()


def test_text_is_cropped_to_its_ink() -> None:
    path = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
    face = ImageFont.truetype(path, 128, layout_engine=ImageFont.Layout.BASIC)
    image = inked_text(face, "g")
    assert image is not None
    assert image.getbbox() == (0, 0, *image.size)
    # DejaVu's "g" in font units of 1/2048 em: 1040 wide, 1546 high, by its glyph table.
    glyph = TTFont(path)["glyf"]["g"]
    size = (glyph.xMax - glyph.xMin, glyph.yMax - glyph.yMin)
    assert np.allclose(image.size, np.array(size) * 128 / 2048, atol=2)
    assert inked_text(face, " ") is None


@pytest.mark.slow
def test_all_subjects() -> None:
    drawn = subjects()
    assert len(drawn) == len(drawn.masks) > 15_000
    inks = drawn.masks > 0
    assert ((inks[:, :, 0].any(1) & inks[:, :, -1].any(1)) | (inks[:, 0].any(1) & inks[:, -1].any(1))).all()
    assert [name for name in set(drawn.names) if KEPT_OUT.search(name)] == []
    assert len(np.unique(drawn.masks.reshape(len(drawn), -1), axis=0)) == len(drawn)
    held_out = [i for i in read_icons() if first_word(i) in DEMO]
    thumbs = np.stack([np.asarray(Image.fromarray(m).resize((24, 24), Image.Resampling.BOX)) for m in drawn.masks])
    small = thumbnails(image for _, image in inked(held_out))
    nearest = cdist(thumbs.reshape(len(drawn), -1)[::20], small, "cityblock").min(1) / (255 * PIXELS)
    assert nearest.min() > 0.8 * SIMILAR  # the mask has been shrunk twice here, which moves it a little
