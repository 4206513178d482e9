"""Packs: whole or made anew, checked image by image, and what killed readers leave."""

import os
import shutil
from pathlib import Path

import pytest

from data.preparation import prepare_all
from kshot.errors import DatasetError
from tests.data.published import load, row


@pytest.mark.parametrize("file", ["images.bin", "index.parquet", "facts.json"])
@pytest.mark.parametrize("damage", ["gone", "empty", "short"])
def test_a_damaged_pack_is_made_anew(root: Path, tmp_path: Path, file: str, damage: str) -> None:
    before = load(row("pets"), root / "pets")
    (path,) = (tmp_path / "cache").glob(f"pets-archive-*/{file}")
    whole = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(whole[: len(whole) // 2] if damage == "short" else b"")
    after = load(row("pets"), root / "pets")
    assert path.read_bytes() == whole
    assert [e.image for e in after.train] == [e.image for e in before.train]


def test_an_image_that_has_changed_in_the_pack_is_not_used(root: Path, tmp_path: Path) -> None:
    dataset = load(row("pets"), root / "pets")
    (path,) = (tmp_path / "cache").glob("pets-archive-*/images.bin")
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DatasetError, match=rf"in {path} has changed; delete that file"):
        prepare_all(dataset.train, hflip=False)


def test_what_killed_readers_left_is_taken_away(root: Path, tmp_path: Path) -> None:
    load(row("pets"), root / "pets")
    (pack,) = (tmp_path / "cache").glob("pets-archive-*")
    old, young = (pack.with_name(f".{pack.name}.{n}.tmp") for n in (1, 2))
    for left in (old, young):
        left.mkdir()
        (left / "images.bin").write_bytes(b"x")
    for path in (old / "images.bin", old):
        os.utime(path, (0, 0))
    shutil.rmtree(pack)
    load(row("pets"), root / "pets")
    assert (old.exists(), young.exists()) == (False, True)
