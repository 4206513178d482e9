"""Original files that are missing, broken, hostile or of another set: a line each, never another set. And packs: whole
or made anew, checked image by image, and what killed readers leave."""

import io
import os
import shutil
import struct
import tarfile
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from data.benchmarks import archives, matlab
from data.preparation import prepare_all
from kshot.errors import DatasetError
from tests.data import published
from tests.data.published import SMALL, load, row
from tests.traced import traced


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


def sparse(path: Path, size: int) -> None:
    """A file of nothing but a hole, as GNU tar writes it with --sparse: no data, and the size it would unpack to."""
    pax = {"GNU.sparse.map": f"{size},0", "GNU.sparse.size": str(size), "GNU.sparse.numblocks": "1"}
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("101_ObjectCategories/wild_cat/image_0001.jpg")
        info.pax_headers = pax
        archive.addfile(info)


@pytest.mark.parametrize("size", [1 << 20, 200 << 20])
def test_a_sparse_archive_leaves_nothing_in_the_cache(root: Path, tmp_path: Path, size: int) -> None:
    path = root / "caltech101/101_ObjectCategories.tar.gz"
    sparse(path, size)
    assert path.stat().st_size < 400
    with (
        traced(16 << 20),
        pytest.raises(DatasetError, match=r"is a sparse file|unpacks to more than 10 times its own size"),
    ):
        load(row("caltech101"), root / "caltech101")
    assert not [*(tmp_path / "cache").iterdir()]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_that_is_far_larger_unpacked(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(archives, "BESIDES", 1 << 20)
    home, name = root / "caltech101", "101_ObjectCategories/wild_cat/image_{}.jpg"
    (home / "101_ObjectCategories.tar.gz").unlink()
    if kind == "zip":
        with zipfile.ZipFile(home / "caltech-101.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for n in range(4):
                archive.writestr(name.format(n), bytes(1 << 20))
    else:
        published.tar(home / "101_ObjectCategories.tar.gz", {name.format(n): bytes(1 << 20) for n in range(4)})
    with pytest.raises(DatasetError, match=r"unpacks to more than 10 times its own size and 1,048,576 bytes; get the"):
        load(row("caltech101"), home)
    assert not [*(tmp_path / "cache").iterdir()]


def test_an_archive_of_too_many_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MEMBERS", 5)
    with pytest.raises(DatasetError, match=r"unpacks to more than .* members; get the original"):
        load(row("caltech101"), root / "caltech101")


def test_checksums_come_before_unpacking(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "tarfile", None)
    with pytest.raises(DatasetError, match=r"checksum of 102flowers\.tgz"):
        load(row("flowers"), root / "flowers", allow_modified=False)
    assert not [*(tmp_path / "cache").iterdir()]


def element(kind: int, body: bytes) -> bytes:
    return struct.pack("<II", kind, len(body)) + body + bytes(-len(body) % 8)


def matrix(kind: int, rows: int, *parts: bytes) -> bytes:
    flags, dimensions = struct.pack("<II", kind, 0), struct.pack("<ii", 1, rows)
    return element(14, element(6, flags) + element(5, dimensions) + element(1, b"labels") + b"".join(parts))


HEADER = b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM"
NUMBER = matrix(9, 1, element(2, b"\x01"))
BOMBS = {
    "cells": (matrix(1, 200_000_000), "says that a matrix holds 200,000,000 others, which has 0"),
    "cells in cells": (matrix(1, 1, matrix(1, 200_000_000)), "says that a matrix holds 200,000,000 others"),
    "fields": (
        matrix(2, 1_000, element(5, struct.pack("<i", 1)), element(1, b"x" * 1_000), NUMBER),
        "says that a matrix holds 1,000,000 others, which has 1",
    ),
}


@pytest.mark.parametrize("what", BOMBS)
def test_a_mat_file_that_promises_gigabytes(what: str) -> None:
    content, message = BOMBS[what]
    with traced(3 * matlab.INFLATED), pytest.raises(DatasetError, match=message):
        matlab.variable(HEADER + content, "labels")


def test_a_mat_file_that_unpacks_to_more_than_is_allowed() -> None:
    large = zlib.compress(matrix(9, 64 << 20, element(2, bytes(64 << 20))))
    content = struct.pack("<II", 15, len(large)) + large
    with traced(3 * matlab.INFLATED), pytest.raises(DatasetError, match="unpacks to more than"):
        matlab.variable(HEADER + content, "labels")


def test_mat_files_as_they_are_written() -> None:
    people = np.array([("a", 1), ("bc", 2)], [("name", object), ("age", object)])
    for compressed in (False, True):
        file = io.BytesIO()
        savemat(file, {"people": people, "names": np.array(["x", "yz"], object)}, do_compression=compressed)
        assert [str(row["name"]) for row in matlab.variable(file.getvalue(), "people")] == ["a", "bc"]
        assert [str(name) for name in matlab.variable(file.getvalue(), "names")] == ["x", "yz"]


@pytest.mark.parametrize("values", ["", "text"])
def test_a_mat_file_with_fewer_values_than_it_says(values: str) -> None:
    """Of a text without bytes scipy makes one of spaces, as long as the file says."""
    file = io.BytesIO()
    savemat(file, {"labels": np.array([values or "x"])})
    content = file.getvalue()
    dimensions = struct.pack("<IIii", 5, 8, 1, len(values) or 1)
    assert content.count(dimensions) == 1
    content = content.replace(dimensions, struct.pack("<IIii", 5, 8, 1, 30_000_000))
    if not values:
        content = content.replace(struct.pack("<HH", 16, 1) + b"x\0\0\0", struct.pack("<II", 16, 0))
    with traced(1 << 20), pytest.raises(DatasetError, match="says that a matrix has 30,000,000 values"):
        matlab.variable(content, "labels")


def test_a_zip_with_a_long_list_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number in range(10):
            archive.writestr(f"{number}.jpg", b"")
    files = archives.SourceFiles(tmp_path, {"a": {"a.zip": ""}}, "https://host")
    assert len([*files.members("a")]) == 10
    monkeypatch.setattr(archives, "DIRECTORY", 46 * 10)
    with pytest.raises(DatasetError, match=r"a\.zip has more than 1,048,576 members; get the original archive"):
        next(files.members("a"))


def test_a_name_that_is_not_utf8(root: Path) -> None:
    members = {**published.caltech_members(), "101_ObjectCategories/wild_cat/image_9\udce9.jpg": published.picture(77)}
    published.tar(root / "caltech101/101_ObjectCategories.tar.gz", members)
    small = replace(SMALL["caltech101"], test=4)
    assert len(load(replace(row("caltech101"), protocols=(small,)), root / "caltech101").test) == 4


@pytest.mark.parametrize("file", ["images.bin", "index.parquet", "facts.json"])
@pytest.mark.parametrize("damage", ["gone", "empty", "short"])
def test_a_damaged_pack_is_made_anew_and_said(
    root: Path, tmp_path: Path, file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = load(row("pets"), root / "pets")
    (path,) = (tmp_path / "cache").glob(f"pets-archive-*/{file}")
    whole = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(whole[: len(whole) // 2] if damage == "short" else b"")
    after = load(row("pets"), root / "pets")
    assert path.read_bytes() == whole
    assert [e.image for e in after.train] == [e.image for e in before.train]
    assert f"{path.parent} is damaged; its data set is read again" in caplog.text
    assert not [*path.parents[1].glob(".*"), *path.parents[1].glob("*.damaged")]


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
