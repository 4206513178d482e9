"""The set `icons`: real icons of many designers, in 20 classes, drawn once each and kept in the user cache.

An icon's class is the first word of its name ("cart-plus" is a cart). The same drawing in two fonts or under two names
is one design; a drawing that stands in two classes is in neither, for its label would be a guess. Designs that are near
the same, or bear one name in two editions of one family (redrawn), are one group and lie on one side of the split.
Knows nothing of shots or models.
"""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from data import render
from data.core import Dataset, Example, content_key
from data.fewshot import stratified_split
from data.iconfonts import Icon, fingerprint, inked, read_icons, thumbnails
from data.sources import cached

if TYPE_CHECKING:
    import pyarrow as pa

    from data.catalog import Row

SAME = 0.001  # mean absolute difference of two thumbnails, 1 = black against white: one drawing
NEAR = 0.02  # likewise: near duplicates
MAX_TEST = 40  # test designs per class; a third of a class where that is less
VERSION = 1  # raise it when the choice of icons changes


def load(row: "Row", *, root: Path | None, split_seed: int) -> Dataset:
    """Seeded split of the designs, stratified by class: a third is test, at most 40 per class.

    The first call draws the icons (seconds) and keeps them as one file in root, the next ones read it.
    Raises DatasetError where the fonts are not installed or root cannot be written.
    """
    words = row.classes or ()
    table = _read(cached(f"icons-{_key(words)}.parquet", lambda: build(words), root))
    images, labels = table["image"].to_pylist(), table["word"].to_pylist()
    examples = [Example(content_key(i), i, words.index(w)) for i, w in zip(images, labels, strict=True)]
    train, test = stratified_split(
        table["identity"].to_pylist(),
        labels,
        test_size=lambda count: min(MAX_TEST, count // 3),
        seed=split_seed,
        groups=table["group"].to_pylist(),
    )
    protocol = f"{row.protocol}-{split_seed}"
    return Dataset(row.name, protocol, words, [examples[i] for i in train], [examples[i] for i in test])


def build(words: Sequence[str]) -> bytes:
    """Parquet bytes, one row per design whose first word is in words: identity, word, group, image (PNG)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    drawings = list(inked(icon for icon in read_icons() if first_word(icon) in words))
    icons = [icon for icon, _ in drawings]
    groups = sift(icons, distances(thumbnails(glyph for _, glyph in drawings)))
    kept = [icons[i] for i in groups]
    columns = {
        "identity": [icon.identity for icon in kept],
        "word": [first_word(icon) for icon in kept],
        "group": [icons[i].identity for i in groups.values()],
        "image": [draw(*drawings[i]) for i in groups],
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, compression="zstd")
    return buffer.getvalue()


def first_word(icon: Icon) -> str:
    """The class of an icon, by definition."""
    return icon.name.split("-")[0]


def draw(icon: Icon, glyph: Image.Image) -> bytes:
    """The icon as PNG, seeded by its identity alone: the same whatever other icons are drawn."""
    return render.render(glyph, Random(f"icons/{icon.identity}"))


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
    near = (distance <= NEAR) & (words[:, None] == words)
    group, first = _components((near | _redrawn(icons))[np.ix_(kept, kept)])
    return {row: kept[first[g]] for row, g in zip(kept, group, strict=True)}


def _redrawn(icons: Sequence[Icon]) -> np.ndarray:
    """(icons, icons): one name in one family, whatever the edition."""
    titles = np.array([f"{icon.font.family}/{icon.name}" for icon in icons])
    return titles[:, None] == titles


def _components(linked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """linked: (n, n) symmetric → (n,) number of each row's connected component; first row of each component."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    number = connected_components(csr_array(linked), directed=False)[1]
    return number, np.unique(number, return_index=True)[1]


def _key(words: Sequence[str]) -> str:
    parts = (fingerprint(), render.VERSION, VERSION, *words)
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


def _read(content: bytes) -> "pa.Table":
    import pyarrow.parquet as pq

    return pq.read_table(io.BytesIO(content))
