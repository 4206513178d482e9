"""Original files that are missing, broken, hostile or of another set: a line each, never another set. And packs: whole
or made anew, checked image by image, and what killed readers leave."""

import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from data.preparation import prepare_all
from kshot.errors import DatasetError
from tests.data import published
from tests.data.published import SMALL, load, row


def test_files_that_are_missing_broken_or_of_another_set(root: Path) -> None:
    home = root / "flowers"
    (home / "setid.mat").rename(home / "elsewhere")
    with pytest.raises(DatasetError, match=r"there is no setid.mat in .*flowers; --root names"):
        load(row("flowers"), home)
    (home / "setid.mat").write_bytes(b"x" * 200)
    with pytest.raises(DatasetError, match=r"the \.mat file with trnid is broken"):
        load(row("flowers"), home)
    (home / "elsewhere").rename(home / "setid.mat")
    whole = (home / "102flowers.tgz").read_bytes()
    (home / "102flowers.tgz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatasetError, match=r"102flowers.tgz is broken .*download it again"):
        load(row("flowers"), home)
    published.tar(home / "102flowers.tgz", {"jpg/image_00001.jpg": published.picture(1)})
    with pytest.raises(DatasetError, match=r"102flowers.tgz lacks image_00002.jpg and 4 more"):
        load(row("flowers"), home)


@pytest.mark.parametrize("name", ["cat/notes.txt", "../../../evil/image_0001.jpg"])
def test_a_file_in_the_archive_that_nobody_knows(root: Path, tmp_path: Path, name: str) -> None:
    """Members are read, never unpacked: a name that climbs is just a name."""
    members = {f"101_ObjectCategories/{name}": published.picture(1)}
    published.tar(root / "caltech101/101_ObjectCategories.tar.gz", members)
    with pytest.raises(DatasetError, match=f"{name} is neither an image nor known"):
        load(row("caltech101"), root / "caltech101")
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("number", [0, 103])
def test_a_class_number_that_is_none(root: Path, number: int) -> None:
    savemat(root / "flowers/imagelabels.mat", {"labels": np.array([[1, 1, 2, 2, number, 102]], np.uint8)})
    with pytest.raises(DatasetError, match=f"imagelabels.mat has a class {number}, but classes go from 1 to 102"):
        load(row("flowers"), root / "flowers")


def test_an_image_that_stands_there_twice(root: Path) -> None:
    members = {f"jpg/image_{n:05d}.jpg": published.picture(n) for n in range(1, 7)}
    published.tar(root / "flowers/102flowers.tgz", {"backup/image_00001.jpg": published.picture(9), **members})
    with pytest.raises(DatasetError, match=r"has image_00001.jpg twice, the second time as jpg/image_00001.jpg"):
        load(row("flowers"), root / "flowers")


def test_a_header_that_would_fill_the_memory(root: Path) -> None:
    path = root / "caltech101/101_ObjectCategories.tar.gz"
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x" * (2 << 20)}):
        pass
    with pytest.raises(DatasetError, match=r"is broken \(a header of 2,\d+,\d+ bytes\); download it again"):
        load(row("caltech101"), root / "caltech101")


def test_a_name_that_is_not_utf8(root: Path) -> None:
    members = {**published.caltech_members(), "101_ObjectCategories/wild_cat/image_9\udce9.jpg": published.picture(77)}
    published.tar(root / "caltech101/101_ObjectCategories.tar.gz", members)
    small = replace(SMALL["caltech101"], test=4)
    assert len(load(replace(row("caltech101"), protocols=(small,)), root / "caltech101").test) == 4


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
