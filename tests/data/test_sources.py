"""Folders of images, good and bad."""

import io
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from data import catalog
from data.dataset import Access, Dataset
from kshot.errors import DatasetError


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (number % 256, number // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def fill(root: Path, *classes: str, images: int = 10, start: int = 0) -> None:
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(images):
            (root / name / f"{i}.png").write_bytes(picture(start + c * images + i))


def load(root: Path, split_seed: int = 0, *, allow_shared: bool = False) -> Dataset:
    return catalog.load(f"folder:{root}", split_seed=split_seed, access=Access(allow_shared=allow_shared))


def problems(root: Path) -> list[str]:
    """The lines of the error that a folder gives."""
    with pytest.raises(DatasetError) as raised:
        load(root)
    return str(raised.value).removeprefix(f"folder:{root}: ").splitlines()


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
    assert load(tmp_path, split_seed=1) == load(tmp_path, allow_shared=True) == dataset


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


def test_classes_may_be_called_train_and_test_and_by_numbers(tmp_path: Path) -> None:
    fill(tmp_path, "train", "test", "plane", "-1", "1", "1.5")
    assert load(tmp_path).classes == ("-1", "1", "1.5", "plane", "test", "train")


def test_files_that_are_no_images_are_skipped_and_counted(tmp_path: Path) -> None:
    fill(tmp_path, "cat", "dog")
    expected = load(tmp_path)
    assert "notes" not in expected.facts
    for path in (".DS_Store", "cat/.DS_Store", "cat/Thumbs.db", "dog/.hidden.png", "README", "dog/0.xml", "cat/0.XML"):
        (tmp_path / path).write_bytes(b"P1 is no bitmap")
    (tmp_path / "cat/.gitkeep").touch()
    (tmp_path / "dog/notes.txt").touch()
    fill(tmp_path / "cat", "masks", images=0)
    (tmp_path / "__MACOSX").mkdir()
    found = load(tmp_path)
    assert replace(found, facts=expected.facts) == expected
    (note,) = found.facts["notes"]
    assert note == (
        "skipped, since they are no images: 11 (2 .DS_Store, 2 .xml, 1 __MACOSX, 1 README, 1 .gitkeep, ...)"
    )


@pytest.mark.parametrize("name", ["0001", "photo.dat", "photo.txt", "photo.HEIC"])
def test_what_begins_like_an_image_is_one_whatever_its_name(tmp_path: Path, name: str) -> None:
    fill(tmp_path, "cat", "dog")
    for n, kind in enumerate(("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")):
        Image.new("RGB", (5, 5), (9, 9, n)).save(tmp_path / "cat" / f"{n}{name}", kind)
    dataset = load(tmp_path)
    assert (len(dataset.train) + len(dataset.test), dict(dataset.facts)) == (27, {})


@pytest.mark.parametrize(
    ("train", "others", "side", "protocol", "said"),
    [
        ("Train", ("TEST",), "TEST", "given-split", []),
        ("training", ("Testing", "README.md"), "Testing", "given-split", ["1 .md"]),
        ("train", ("Val",), "Val", "given-split-val", ["Val is the test side"]),
        ("train", ("valid",), "valid", "given-split-valid", ["valid is the test side"]),
        ("train", ("dev", "test"), "test", "given-split", ["dev takes no part"]),
    ],
)
def test_other_names_of_the_sides(
    tmp_path: Path, train: str, others: tuple[str, ...], side: str, protocol: str, said: list[str]
) -> None:
    fill(tmp_path / train, "cat", "dog")
    for n, name in enumerate(others, 1):
        (tmp_path / name).write_text("text") if "." in name else fill(tmp_path / name, "cat", "dog", start=100 * n)
    dataset = load(tmp_path)
    assert (len(dataset.train), dataset.classes) == (20, ("cat", "dog"))
    assert {e.image for e in dataset.test} == {path.read_bytes() for path in (tmp_path / side).rglob("*.png")}
    assert re.fullmatch(protocol + "-[0-9a-f]{12}", dataset.protocol)
    notes = dataset.facts.get("notes", [])
    assert len(notes) == len(said)
    assert all(part in note for part, note in zip(said, notes, strict=True))


def test_a_link_inside_the_folder_is_fine(tmp_path: Path) -> None:
    fill(tmp_path, "cat", "dog")
    (tmp_path / "dog" / "again.png").symlink_to(tmp_path / "dog" / "0.png")
    dataset = load(tmp_path)
    assert len(dataset.train) + len(dataset.test) == 21
    assert not {e.key for e in dataset.train} & {e.key for e in dataset.test}


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {  # what is done to a good folder, and what is said of it
    "one class": (lambda root: shutil.rmtree(root / "dog"), r"there is one class \('cat'\)"),
    "empty class": (lambda root: (root / "eel").mkdir(), "a class folder without images; .*: eel"),
    "stray image": (lambda root: (root / "0").write_bytes(picture(500)), "an image where class folders are .*: 0$"),
    "nested": (lambda root: fill(root / "cat", "kitten", start=500), "a folder where images are .*: cat/kitten"),
    "one image twice": (
        lambda root: shutil.copy(root / "cat/0.png", root / "dog/copy.png"),
        r"the same image in two classes .* --allow-shared: cat/0.png and dog/copy.png",
    ),
    "one distinct image": (
        lambda root: (fill(root, "eel", images=1, start=500), shutil.copy(root / "eel/0.png", root / "eel/copy.png")),
        "a class with one distinct image, .*: 'eel'",
    ),
    "same clean name": (
        lambda root: fill(root, "CAT_", start=500),
        "'CAT_' and 'cat' both read 'cat'",
    ),
    "no letters": (lambda root: fill(root, "_", start=500), "'_' has no letters"),
    "link out": (lambda root: (root / "dog/out.png").symlink_to(__file__), "leads out of the folder .*: dog/out.png"),
    "class link out": (lambda root: (root / "out").symlink_to(Path(__file__).parent), "leads out of .*: out$"),
    "broken link": (
        lambda root: (root / "dog/gone.png").symlink_to(root / "nowhere.png"),
        "leads out of the folder or nowhere; .*: dog/gone.png",
    ),
    "looping link": (
        lambda root: (root / "dog/loop.png").symlink_to(root / "dog/loop.png"),
        "leads out of the folder or nowhere; .*: dog/loop.png",
    ),
    "gone": (shutil.rmtree, "is not a folder"),
    "emptied": (lambda root: (shutil.rmtree(root), root.mkdir()), "has no class folders"),
}
SPOILT_SPLIT: dict[str, tuple[Callable[[Path], object], str]] = {  # the same of one with train and test
    "one image in both": (
        lambda root: shutil.copy(root / "train/cat/4.png", root / "test/cat/x.png"),
        "the same image in train and test .* --allow-shared: train/cat/4.png and test/cat/x.png",
    ),
    "a class in train only": (
        lambda root: fill(root / "train", "eel", start=500),
        r"a class in one of train and test only; .*: 'eel' \(train\)",
    ),
    "a folder beside": (lambda root: fill(root, "more", start=500), "images beside the sides of the split; .*: more"),
    "no test": (
        lambda root: shutil.rmtree(root / "test"),
        "class folders in train alone; put some of each class into test/<class>, or give .*/train, of which",
    ),
    "no train": (
        lambda root: shutil.rmtree(root / "train"),
        "in test alone; put some of each class into train/<class>",
    ),
    "a test side without classes": (
        lambda root: (
            shutil.rmtree(root / "test"),
            (root / "test").mkdir(),
            (root / "test/0.png").write_bytes(picture(500)),
        ),
        "in train alone, and nothing says what the images in test show; put them into test/<class>, or give .*/train",
    ),
}


@pytest.mark.parametrize("what", [*SPOILT, *SPOILT_SPLIT])
def test_a_folder_that_cannot_be_used(tmp_path: Path, what: str) -> None:
    root = tmp_path / "set"
    given_split(root) if what in SPOILT_SPLIT else fill(root, "cat", "dog")
    spoil, message = (SPOILT | SPOILT_SPLIT)[what]
    spoil(root)
    with pytest.raises(DatasetError, match=message):
        load(root)


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("seven.jpg", b"hello", "not an image"),
        ("seven.webp", b"", "empty"),
        ("seven", picture(1)[:40], "broken|not an image"),
        ("seven.JPG", HEIC, "HEIC, HEIF or AVIF, which cannot be read here; convert it to JPEG or PNG"),
        ("seven", HEIC, "convert it to JPEG or PNG"),
        ("seven.heif", b"hello", "convert it to JPEG or PNG"),
    ],
)
def test_a_file_that_is_no_image_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    fill(tmp_path, "cat", "dog")
    (tmp_path / "dog" / name).write_bytes(content)
    with pytest.raises(DatasetError, match=f"dog/{name}: .*({message})"):
        load(tmp_path)


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    fill(tmp_path, "cat", "dog", "eel", "Eel")
    for n in range(25):
        (tmp_path / "cat" / f"x{n:02}.jpg").write_bytes(b"")
    for n in (3, 4):
        shutil.copy(tmp_path / f"cat/{n}.png", tmp_path / f"dog/{n}.png")
    (tmp_path / "dog/out.png").symlink_to(__file__)
    (tmp_path / "stray.png").write_bytes(picture(999))
    fill(tmp_path, "fox", images=1, start=500)
    fill(tmp_path, "gnu", images=0)
    fill(tmp_path / "dog", "hen", start=600)
    lines = problems(tmp_path)
    assert lines[0] == "33 problems"
    texts = [line for line in lines[1:] if not line.startswith("    ")]
    assert [re.split(" ?[:;,(]", text.strip())[0] for text in texts] == [
        "a link that leads out of the folder or nowhere",
        "a folder where images are expected",
        "a class folder without images",
        "an image where class folders are expected",
        "files that cannot be read as images",
        "a class with one distinct image",
        "classes",
        "the same image in two classes",
    ]
    empty = [f"    cat/x{n:02}.jpg: the file is empty; replace or remove it" for n in range(20)]
    start = lines.index("  files that cannot be read as images: 25 problems")
    assert lines[start + 1 : start + 22] == [*empty, "    ... and 5 more"]
    assert lines[-2:] == [f"    cat/{n}.png and dog/{n}.png" for n in (3, 4)]


def test_broken_files_bring_no_further_problems(tmp_path: Path) -> None:
    """A class whose files are all broken is there, and files alike are no twins where they are no images."""
    given_split(tmp_path)
    for n in range(3):
        (tmp_path / f"test/dog/{n}.png").write_bytes(b"")
    (tmp_path / "train/cat/0.png").write_bytes(b"")
    assert problems(tmp_path)[0] == "files that cannot be read as images: 4 problems"


def test_an_image_in_two_places_may_be_kept(tmp_path: Path) -> None:
    given_split(tmp_path)
    shutil.copy(tmp_path / "train/cat/4.png", tmp_path / "test/cat/x.png")
    shutil.copy(tmp_path / "train/cat/5.png", tmp_path / "train/dog/y.png")
    shutil.copy(tmp_path / "train/cat/6.png", tmp_path / "test/dog/z.png")
    keep = "remove one, or keep both with --allow-shared: 2 problems"
    assert problems(tmp_path) == [
        "4 problems",
        f"  the same image in two classes (no answer is right for both); {keep}",
        "    train/cat/5.png and train/dog/y.png",
        "    train/cat/6.png and test/dog/z.png",
        f"  the same image in train and test (it may be seen before the test); {keep}",
        "    train/cat/4.png and test/cat/x.png",
        "    train/cat/6.png and test/dog/z.png",
    ]
    kept = load(tmp_path, allow_shared=True)
    assert (len(kept.train), len(kept.test)) == (21, 8)
    assert kept.facts == {"shared": 2, "in_two_classes": 2, "allow_shared": True}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    fill(tmp_path, "cat", "dog")
    os.mkfifo(tmp_path / "dog" / "pipe.png")
    with pytest.raises(DatasetError, match=r"pipe.png is not a regular file"):
        load(tmp_path)
