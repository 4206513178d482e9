"""Folders of images, good and bad, and the cache."""

import io
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from data import catalog
from data.dataset import Dataset
from data.embedded.icons import cached
from kshot.errors import DatasetError, ImageError


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (number % 256, number // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def fill(root: Path, *classes: str, images: int = 10, start: int = 0) -> None:
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(images):
            (root / name / f"{i}.png").write_bytes(picture(start + c * images + i))


def load(root: Path, split_seed: int = 0) -> Dataset:
    return catalog.load(f"folder:{root}", split_seed=split_seed)


def given_split(root: Path) -> None:
    fill(root / "train", "cat", "dog")
    fill(root / "test", "cat", "dog", images=3, start=100)


def test_a_given_split(tmp_path: Path) -> None:
    given_split(tmp_path)
    dataset = load(tmp_path)
    assert dataset.classes == ("cat", "dog")
    assert re.fullmatch(r"given-split-[0-9a-f]{12}", dataset.protocol)
    assert (len(dataset.train), len(dataset.test)) == (20, 6)
    assert dataset.test[0].image == picture(100)
    assert load(tmp_path, split_seed=1) == dataset


def test_a_seeded_split(tmp_path: Path) -> None:
    fill(tmp_path, "Great_Dane", "cat")
    dataset = load(tmp_path)
    assert dataset.classes == ("great dane", "cat")
    assert re.fullmatch(r"seeded-split-0-[0-9a-f]{12}", dataset.protocol)
    assert [e.label for e in dataset.test] == [0, 0, 1, 1]
    assert not {e.key for e in dataset.train} & {e.key for e in dataset.test}
    assert load(tmp_path) == dataset
    assert {e.key for e in load(tmp_path, split_seed=1).test} != {e.key for e in dataset.test}


def test_a_folder_goes_by_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "café <b>|", "cat", "dog")
    (tmp_path / "x").mkdir()
    here = load(tmp_path / "café <b>|")
    assert here.name == "folder:café <b>|"
    assert load(tmp_path / "x" / ".." / "café <b>|") == here
    monkeypatch.chdir(tmp_path / "café <b>|")
    assert load(Path(".")) == here


def test_a_protocol_is_of_the_content(tmp_path: Path) -> None:
    for side in "abcd":
        fill(tmp_path / side / "photos", "cat", "dog")
    (tmp_path / "b/photos/cat/0.png").rename(tmp_path / "b/photos/cat/zero.png")
    (tmp_path / "c/photos/cat/0.png").rename(tmp_path / "c/photos/dog/zero.png")
    (tmp_path / "d/photos/cat/0.png").write_bytes(picture(999))
    a, b, c, d = (load(tmp_path / side / "photos") for side in "abcd")
    assert a.name == b.name == c.name == d.name == "folder:photos"
    assert a.protocol == b.protocol
    assert len({a.protocol, c.protocol, d.protocol}) == 3


def test_classes_may_be_called_train_and_test(tmp_path: Path) -> None:
    fill(tmp_path, "train", "test", "plane")
    assert load(tmp_path).classes == ("plane", "test", "train")


def test_the_systems_files_are_ignored(tmp_path: Path) -> None:
    fill(tmp_path, "cat", "dog")
    expected = load(tmp_path)
    for path in (".DS_Store", "cat/.DS_Store", "cat/Thumbs.db", "dog/desktop.ini", "dog/.hidden.png"):
        (tmp_path / path).write_bytes(b"not an image")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / ".git").mkdir()
    assert load(tmp_path) == expected


def test_a_link_inside_the_folder_is_fine(tmp_path: Path) -> None:
    fill(tmp_path, "cat", "dog")
    (tmp_path / "dog" / "again.png").symlink_to(tmp_path / "dog" / "0.png")
    dataset = load(tmp_path)
    assert len(dataset.train) + len(dataset.test) == 21
    assert not {e.key for e in dataset.train} & {e.key for e in dataset.test}


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {  # what is done to a good folder, and what is said of it
    "one class": (lambda root: shutil.rmtree(root / "dog"), r"one class \('cat'\)"),
    "empty class": (lambda root: (root / "eel").mkdir(), "eel is empty"),
    "stray file": (
        lambda root: (root / "labels.csv").write_text("0.png,cat"),
        "labels.csv is a file where class",
    ),
    "nested": (lambda root: fill(root / "cat", "kitten", start=500), "cat/kitten is a folder where images"),
    "one image twice": (
        lambda root: shutil.copy(root / "cat/0.png", root / "dog/copy.png"),
        r"cat/0.png and dog/copy.png are the same image in two classes",
    ),
    "one distinct image": (
        lambda root: (fill(root, "eel", images=1, start=500), shutil.copy(root / "eel/0.png", root / "eel/copy.png")),
        "'eel' has one distinct image",
    ),
    "same clean name": (
        lambda root: fill(root, "CAT_", start=500),
        "'CAT_' and 'cat' both read 'cat'",
    ),
    "no letters": (lambda root: fill(root, "_", start=500), "'_' has no letters"),
    "link out": (lambda root: (root / "dog/out.png").symlink_to(__file__), "out.png leads out of"),
    "class link out": (lambda root: (root / "out").symlink_to(Path(__file__).parent), "out leads out of"),
    "broken link": (
        lambda root: (root / "dog/gone.png").symlink_to(root / "nowhere.png"),
        "gone.png leads out of .* or nowhere",
    ),
    "looping link": (
        lambda root: (root / "dog/loop.png").symlink_to(root / "dog/loop.png"),
        "loop.png leads out of .* or nowhere",
    ),
    "gone": (shutil.rmtree, "is not a folder"),
    "emptied": (lambda root: (shutil.rmtree(root), root.mkdir()), "has no class folders"),
}
SPOILT_SPLIT: dict[str, tuple[Callable[[Path], object], str]] = {  # the same of one with train and test
    "one image in both": (
        lambda root: shutil.copy(root / "train/cat/4.png", root / "test/cat/x.png"),
        r"train/cat/4.png and test/cat/x.png are the same image in train and test",
    ),
    "a class in train only": (
        lambda root: fill(root / "train", "eel", start=500),
        "'eel' is in one of train and test only",
    ),
    "a folder beside": (lambda root: fill(root, "val", start=500), "val stands beside train and test"),
}


@pytest.mark.parametrize("what", [*SPOILT, *SPOILT_SPLIT])
def test_a_folder_that_cannot_be_used(tmp_path: Path, what: str) -> None:
    root = tmp_path / "set"
    given_split(root) if what in SPOILT_SPLIT else fill(root, "cat", "dog")
    spoil, message = (SPOILT | SPOILT_SPLIT)[what]
    spoil(root)
    with pytest.raises(DatasetError, match=message):
        load(root)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"hello", "not an image"), (b"", "empty"), (picture(1)[:40], "broken|not an image")],
)
def test_a_file_that_is_no_image_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    fill(tmp_path, "cat", "dog")
    (tmp_path / "dog" / "seven.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=f"dog/seven.jpg: .*({message})"):
        load(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    fill(tmp_path, "cat", "dog")
    os.mkfifo(tmp_path / "dog" / "pipe.png")
    with pytest.raises(ImageError, match=r"pipe.png is not a regular file"):
        load(tmp_path)


def test_cached_builds_once_and_again_when_damaged(tmp_path: Path) -> None:
    built: list[int] = []

    def build() -> bytes:
        built.append(1)
        return b"content"

    root = tmp_path / "new" / "folder"
    assert [cached("x", build, root) for _ in range(3)] == [b"content"] * 3
    assert len(built) == 1
    good = (root / "x").read_bytes()
    for bad in (b"", good[:-1], good[:10], good + b"!", bytes([good[0] ^ 1]) + good[1:], good[:-1] + b"T"):
        (root / "x").write_bytes(bad)
        assert cached("x", build, root) == b"content"
        assert (root / "x").read_bytes() == good
    assert [path.name for path in root.iterdir()] == ["x"]


def test_cached_from_many_threads(tmp_path: Path) -> None:
    found: list[bytes] = []
    content = os.urandom(200_000)
    threads = [threading.Thread(target=lambda: found.append(cached("x", lambda: content, tmp_path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [content] * 8
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"cannot write .*KSHOT_CACHE"):
        cached("x", lambda: b"content", tmp_path / "file")
