"""The real Caltech-101, and all Flowers images at 64 pixels, where they lie beside the checkout."""

import os
from pathlib import Path

import pytest

from data import catalog
from data.dataset import Access, Dataset, content_key
from data.fewshot import k_shot
from kshot.errors import DatasetError, TooFewImagesError

SHARED = Path(__file__).parents[3] / "shared/data"
CALTECH, FLOWERS = SHARED / "caltech101", SHARED / "flowers102-64px"


def load(name: str, root: Path, **access: object) -> Dataset:
    return catalog.load(name, access=Access("archive", root, **access))  # type: ignore[arg-type]


@pytest.mark.skipif(not CALTECH.is_dir(), reason="Caltech-101 does not lie beside the checkout")
def test_caltech101() -> None:
    whole = load("caltech101", CALTECH)
    assert (len(whole.classes), len(whole.train), len(whole.test)) == (102, 3060, 6084)
    assert whole.protocol == "official-0"  # by their content the photographs are the published ones
    facts = whole.facts
    assert (facts["images"], facts["labels"], facts["ignored"]) == (9144, 102, ["BACKGROUND_Google/tmp"])
    assert {"accordion", "faces easy", "background google", "yin yang"} <= set(whole.classes)
    assert all(sum(e.label == label for e in whole.train) == 30 for label in range(102))
    assert len({e.key for e in (*whole.train, *whole.test)}) == 9144
    assert all(content_key(e.image) == e.key for e in whole.test[::500])
    assert not any(isinstance(e.stored, bytes) for e in (*whole.train, *whole.test))  # none is in memory
    images = next(Path(os.environ["KSHOT_CACHE"]).glob("caltech101-archive-*/images.bin"))
    before = images.stat().st_mtime_ns
    load("caltech101", CALTECH)
    assert images.stat().st_mtime_ns == before  # nothing is read a second time


@pytest.mark.skipif(not FLOWERS.is_dir(), reason="Flowers-102 does not lie beside the checkout")
def test_flowers_at_64_pixels() -> None:
    with pytest.raises(
        DatasetError, match=r"checksum of 102flowers.tgz is not that of the published files; .*--allow-m"
    ):
        load("flowers", FLOWERS)
    small = load("flowers", FLOWERS, allow_modified=True)
    assert (len(small.classes), len(small.train), len(small.test)) == (102, 1020, 6149)
    assert small.protocol.startswith("official-modified-")
    assert small.facts["modified"] == ["102flowers.tgz"]  # the labels and the split are the authors' own
    assert small.facts["splits"] == {"test": 6149, "train": 1020, "validation": 1020}
    assert {"pink primrose", "hard leaved pocket orchid", "blackberry lily"} <= set(small.classes)
    with pytest.raises(TooFewImagesError, match="has 10 distinct train images, 16 shots asked for"):
        k_shot(small.train, small.classes, 16, 0)
    assert len(k_shot(small.train, small.classes, 10, 0)) == 1020
