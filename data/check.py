"""Checks a data set: decodes and hashes every image anew, and looks for images that train and test share. A sweep
asks the same of every image, once.

Counts, checksums and class names are verified where a data set is loaded.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from PIL import Image, __version__

from data.dataset import Dataset, Example, content_key, digest, in_two_classes
from kshot.errors import DatasetError, ImageError, listed
from kshot.files import cache_folder
from kshot.images import open_image

SIDE, LOW = 32, 8  # pixels of the thumbnail; frequencies kept in each direction
NEAR = 6  # of the 64 bits of two perceptual hashes may differ: resized, recompressed or slightly cropped copies
BLOCK = 1 << 22  # pairs compared at a time
RULES = f"2-{__version__}"  # of what is an image: raise the number when `kshot.images` refuses more


@dataclass(frozen=True)
class CheckReport:
    """The result. broken: an error message each. exact, near: (row in train, row in test) of equal and similar images.

    duplicates: images that occur more than once within train or within test. two_classes: key → labels of an image that
    has several.
    """

    images: int
    broken: list[str]
    exact: list[tuple[int, int]]
    near: list[tuple[int, int]]
    duplicates: int
    two_classes: Mapping[str, set[int]]


def check(dataset: Dataset) -> CheckReport:
    """Read, hash and decode every image. Bad images are listed, not raised."""
    rows = [*dataset.train, *dataset.test]
    results = _opened(rows, perceptual_hash)
    hashes = np.array([result if isinstance(result, int) else 0 for result in results], np.uint64)
    bad = {n: result for n, result in enumerate(results) if isinstance(result, str)}
    split = len(dataset.train)
    trained = {example.key: n for n, example in enumerate(dataset.train)}
    exact = [(trained[example.key], n) for n, example in enumerate(dataset.test) if example.key in trained]
    near = [
        pair
        for pair in near_pairs(hashes[:split], hashes[split:])
        if pair not in {*exact} and pair[0] not in bad and split + pair[1] not in bad
    ]
    duplicates = sum(len(part) - len({example.key for example in part}) for part in (dataset.train, dataset.test))
    return CheckReport(len(rows), [*bad.values()], exact, near, duplicates, in_two_classes(rows))


def refuse_broken(dataset: Dataset) -> None:
    """Raise DatasetError with all images that are broken or that no model takes. A set without one is remembered in the
    cache, since decoding thousands takes minutes."""
    rows = [*dataset.train, *dataset.test]
    mark = cache_folder() / "checked" / f"{RULES}-{digest((example.key,) for example in rows)}"
    if mark.exists():
        return
    if broken := [line for line in _opened(rows, lambda image: 0) if isinstance(line, str)]:
        raise DatasetError(listed(dataset.name, broken))
    with suppress(OSError):  # a cache that cannot be written costs time alone
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def perceptual_hash(image: Image.Image) -> int:
    """64 bits that change little when an image is resized, recompressed or made darker: which of its lowest
    frequencies (a cosine transform of 32x32 grey pixels) are above their median. After pHash (Zauner 2010)."""
    from scipy.fft import dctn

    grey = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), np.float64)
    low = dctn(grey)[:LOW, :LOW].ravel()
    return int(np.packbits(low > np.median(low)).view(">u8")[0])


def near_pairs(one: np.ndarray, other: np.ndarray) -> list[tuple[int, int]]:
    """one: (N,) uint64, other: (M,) uint64 → pairs of rows whose hashes differ in at most NEAR bits."""
    step = max(1, BLOCK // max(1, len(other)))
    blocks = ((start, one[start : start + step]) for start in range(0, len(one), step))
    pairs = ((start, np.argwhere(np.bitwise_count(rows[:, None] ^ other) <= NEAR)) for start, rows in blocks)
    return [(start + int(i), int(j)) for start, block in pairs for i, j in block]


def _opened(rows: Sequence[Example], see: Callable[[Image.Image], int]) -> list[int | str]:
    """What `see` makes of each image, or a line on what is wrong with it."""

    def one(example: Example) -> int | str:
        name, content = f"image {example.key[:12]}", example.image
        if content_key(content) != example.key:
            return f"{name}: its bytes have changed; get the data again"
        try:
            return see(open_image(content, name))
        except ImageError as error:  # all that is asked of an image stands there
            return str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, rows))
