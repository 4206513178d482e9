"""The icons: how many, which, how they look, and that no near duplicate stands on both sides of the split."""

import io
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data import catalog
from data.dataset import Dataset, content_key
from data.embedded import icons as icons_module
from data.embedded.icons import (
    MIN_CONTRAST,
    NEAR,
    SAME,
    SIDE,
    Icon,
    contrast,
    distances,
    first_word,
    inked,
    read_icons,
    render,
    sift,
    thumbnails,
)
from kshot.errors import DatasetError

ROW = catalog.DATASETS["icons"]


def test_counts(icons: Dataset) -> None:
    train, test = (Counter(icons.classes[e.label] for e in side) for side in (icons.train, icons.test))
    assert icons.classes == ROW.classes
    assert len(icons.classes) == 20
    total = train + test
    assert min(total, key=total.__getitem__) == "flag"
    assert min(total.values()) >= 24
    assert max(total.values()) <= 130
    assert min(train.values()) >= 16
    assert 8 <= min(test.values()) <= max(test.values()) <= 40


def test_every_icon_is_a_64x64_rgb_png_with_a_key_of_its_own(icons: Dataset) -> None:
    examples = [*icons.train, *icons.test]
    assert len({e.key for e in examples}) == len(examples)
    for example in examples:
        image = Image.open(io.BytesIO(example.image))
        image.load()
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 64))
        assert example.key == content_key(example.image)
        assert len(image.getcolors(4096) or ()) > 2


def test_no_near_duplicate_across_the_split_or_across_classes(icons: Dataset, cache: Path) -> None:
    """From the fonts anew: every design's drawing against every other."""
    (path,) = cache.glob("icons-*/index.parquet")
    table = pq.read_table(path).to_pydict()
    wanted = set(table["path"])
    families = {i.identity: i.family for i in read_icons()}
    assert {families[name] for name in wanted} == set(icons_module.FAMILIES)
    drawings = {i.identity: glyph for i, glyph in inked(i for i in read_icons() if i.identity in wanted)}
    distance = distances(thumbnails(drawings[name] for name in table["path"]))
    words = np.array(table["label"])
    in_test = {e.key for e in icons.test}
    test = np.array([key in in_test for key in table["key"]])
    off_diagonal = ~np.eye(len(words), dtype=bool)
    assert not ((distance <= SAME) & off_diagonal).any()
    assert not ((distance <= NEAR) & (test[:, None] != test)).any()
    assert not ((distance <= NEAR) & (words[:, None] != words)).any()


def test_split_seeds_share_the_drawings_and_differ_in_the_split(icons: Dataset) -> None:
    other = catalog.load("icons", split_seed=1)
    assert (icons.protocol, other.protocol) == ("seeded-split-0", "seeded-split-1")
    assert {e.key for e in (*icons.train, *icons.test)} == {e.key for e in (*other.train, *other.test)}
    assert {e.key for e in icons.test} != {e.key for e in other.test}


def test_two_builds_are_equal_and_an_icon_does_not_depend_on_the_others(icons: Dataset, tmp_path: Path) -> None:
    row = replace(ROW, classes=("car", "flag"))
    roots = [tmp_path / "one", tmp_path / "two"]
    one, _ = (icons_module.load(row, root=root, split_seed=0) for root in roots)
    files = [{path.relative_to(root): path.read_bytes() for path in root.glob("*/*")} for root in roots]
    assert len(files[0]) == 3
    assert files[0] == files[1]
    for name in ("car", "flag"):
        alone = [e.key for e in one.test if one.classes[e.label] == name]
        assert alone == [e.key for e in icons.test if icons.classes[e.label] == name]


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"cannot write .*KSHOT_CACHE"):
        icons_module.load(ROW, root=tmp_path / "file", split_seed=0)


def test_sift() -> None:
    named = (
        ("a", "A", "star"),
        ("b", "B", "star-alias"),  # the same drawing as the first
        ("b", "B", "moon"),  # the same drawing as the next, of another class: neither stays
        ("c", "C", "star-moon"),
        ("d", "D", "sun"),
        ("e", "E", "sun-up"),  # near the one before
        ("f", "E", "sun-up"),  # the same name in one family
    )
    distance = np.full((7, 7), 0.5)
    np.fill_diagonal(distance, 0)
    for i, j, value in ((0, 1, 0.0005), (2, 3, 0.0), (4, 5, 0.015), (0, 4, 0.015)):
        distance[i, j] = distance[j, i] = value
    assert sift([Icon(*each, Path(), 0) for each in named], distance) == {0: 0, 4: 4, 5: 4, 6: 4}


def test_the_fonts() -> None:
    icons = read_icons()
    assert 20_000 < len(icons) < 30_000
    assert len({i.identity for i in icons}) == len(icons)
    assert {i.font for i in icons} == set(icons_module.FONTS)
    plus = next(i for i in icons if i.identity == "materialdesignicons6-webfont/cart-plus")
    assert first_word(plus) == "cart"
    ((_, glyph),) = inked([plus])
    assert glyph.getbbox() == (0, 0, *glyph.size)
    blank = next(i for i in icons if i.identity == "codicon/blank")
    assert list(inked([blank])) == []


def test_missing_fonts_name_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(icons_module, "find_spec", lambda name: None)
    with pytest.raises(DatasetError, match="pip install 'qtawesome"):
        read_icons()


def test_drawn_whole_and_with_contrast() -> None:
    """Whatever the generator draws, the margin shows the ground only and the ink stands out from something."""
    glyph = Image.new("L", (200, 90), 255)
    for seed in range(40):
        pixels = np.asarray(Image.open(io.BytesIO(render(glyph, Random(seed)))))
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (border == border[0]).all()
        most = Counter(map(tuple, pixels.reshape(SIDE * SIDE, 3).tolist())).most_common(3)
        assert max(contrast(a, b) for a, _ in most for b, _ in most) >= MIN_CONTRAST


def test_contrast() -> None:
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast((119, 119, 119), (255, 255, 255)) == pytest.approx(4.48, abs=0.01)
