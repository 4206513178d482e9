"""Where data sets come from: folders of images, and the user cache for what is built or downloaded once.

Knows files; knows nothing of class-name clean-up, of shots or of models. The rules of a folder:

* PATH/train/<class>/<image> and PATH/test/<class>/<image> is a given split; PATH/<class>/<image> is split by seed.
* Names that begin with a dot, Thumbs.db, desktop.ini and __MACOSX are the system's and are ignored. Everything else
  must be what its place says: a folder of a class, or an image that decodes. Nothing is skipped.
* A link may point anywhere inside PATH and nowhere else.
* The same image (byte for byte) may stand in one class several times; not in two classes, not in train and in test.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from data.dataset import Dataset, Example, Item, Slice, content_key
from data.fewshot import stratified_split
from kshot.errors import DatasetError, ImageError
from kshot.files import cache_folder, write_file
from kshot.images import open_image

if TYPE_CHECKING:
    from data.catalog import DatasetSpec

SPLITS = ("train", "test")
SYSTEM_FILES = {"thumbs.db", "desktop.ini", "__macosx"}
TEST_SHARE = 5  # one image of five goes to test, at least one per class


def cached(name: str, build: Callable[[], bytes], root: Path | None = None) -> bytes:
    """What `build` returned once, kept as the file root/name (root: default the user's cache).

    The file begins with the SHA-256 of the rest: a damaged one is built anew. It is written under another name and
    renamed, so processes may race: each reads or writes a complete file.
    Raises DatasetError if the folder cannot be written.
    """
    path = (root or cache_folder()) / name
    content = _read_checked(path)
    if content is None:
        content = build()
        _write_checked(path, content)
    return content


def load_folder(row: "DatasetSpec", *, root: Path | None, split_seed: int) -> Dataset:
    """The data set in the folder row.location, by the rules above; root is not used, for nothing is built.

    Raises DatasetError for a layout that is not one of the two, ImageError for a file that is no readable image.
    """
    home = Path(row.location).expanduser()
    if not home.is_dir():
        raise DatasetError(f"{home} is not a folder; give folder:PATH with one sub-folder of images per class")
    files = _read_folder(home)
    _refuse_twins(home, files)
    classes = tuple(sorted({file.label for file in files}))
    if len(classes) < 2:
        raise DatasetError(f"{home} has one class ({classes[0]!r}); classification needs two or more class folders")
    given = files[0].split != ""
    train, test = _given_split(home, files) if given else _seeded_split(home, files, split_seed)
    split = "given-split" if given else f"{row.protocol}-{split_seed}"
    # Results may travel: they call the folder by its own name and tell it from namesakes by what is in it.
    name, protocol = f"folder:{Path(os.path.abspath(home)).name}", f"{split}-{_fingerprint(files)}"
    return Dataset(name, protocol, classes, _examples(train, classes), _examples(test, classes))


def _read_folder(home: Path) -> list[Item]:
    """Every image of the folder, decoded once to be sure of it, by split, class and file name."""
    parts = {entry.name: entry for entry in _visible(home, home)}
    given = all(s in parts and any(e.is_dir() for e in _visible(home, parts[s])) for s in SPLITS)
    if given and (others := sorted(parts.keys() - set(SPLITS))):
        raise DatasetError(f"{home / others[0]} stands beside train and test; move it elsewhere")
    sides = {split: parts[split] for split in SPLITS} if given else {"": home}
    places = [(s, entry.name, path) for s, top in sides.items() for entry, path in _class_files(home, top)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda place: _read_image(home, *place), places))


def _class_files(home: Path, top: Path) -> Iterable[tuple[Path, Path]]:
    """(class folder, image file) of each image below top."""
    folders = _visible(home, top)
    if not folders:
        raise DatasetError(f"{top} has no class folders; put the images of each class into a folder of its name")
    for folder in folders:
        if not folder.is_dir():
            raise DatasetError(f"{folder} is a file where class folders are expected; move it into one or elsewhere")
        files = _visible(home, folder)
        if not files:
            raise DatasetError(f"class folder {folder} is empty; add images or remove it")
        for file in files:
            if file.is_dir():
                raise DatasetError(
                    f"{file} is a folder where images are expected; use PATH/<class>/<image> "
                    "or both PATH/train/<class>/<image> and PATH/test/<class>/<image>"
                )
            yield folder, file


def _visible(home: Path, folder: Path) -> list[Path]:
    """What is in a folder, by name, less the system's files. A link that leads out of home is an error."""
    if not folder.is_dir():
        return []
    try:
        entries = sorted(entry for entry in folder.iterdir() if not _of_the_system(entry.name))
    except OSError as error:
        raise DatasetError(f"{folder} cannot be read ({error.strerror}); check its permissions") from error
    for entry in entries:
        if entry.is_symlink() and not _leads_into(home, entry):
            raise DatasetError(f"the link {entry} leads out of {home} or nowhere; put the image itself there")
    return entries


def _of_the_system(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_FILES


def _leads_into(home: Path, link: Path) -> bool:
    try:
        return link.resolve(strict=True).is_relative_to(home.resolve())
    except (OSError, RuntimeError):  # broken, or a loop: RuntimeError before Python 3.13
        return False


def _read_image(home: Path, split: str, label: str, path: Path) -> Item:
    if not path.is_file():
        raise ImageError(f"{path} is not a regular file; remove it")  # a pipe would be read for ever
    try:
        image = path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror}); replace or remove it") from error
    open_image(image, str(path))
    stored = Slice(path.resolve(), 0, len(image))  # read again when it is wanted
    return Item(path.relative_to(home).as_posix(), split, label, stored, content_key(image))


def _fingerprint(files: Sequence[Item]) -> str:
    """Of the images, their classes and their split; not of where the folder lies or what its files are called."""
    lines = sorted(f"{file.split}\0{file.label}\0{file.key}" for file in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def _refuse_twins(home: Path, files: Sequence[Item]) -> None:
    first: dict[str, Item] = {}
    for file in files:
        twin = first.setdefault(file.key, file)
        if (twin.split, twin.label) != (file.split, file.label):
            places = "two classes" if twin.label != file.label else "train and test"
            raise DatasetError(f"{home}: {twin.path} and {file.path} are the same image in {places}; remove one")


def _given_split(home: Path, files: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    train, test = ([file for file in files if file.split == split] for split in SPLITS)
    if odd := sorted({f.label for f in train} ^ {f.label for f in test}):
        raise DatasetError(f"{home}: class {odd[0]!r} is in one of train and test only; add its images or remove it")
    return train, test


def _seeded_split(home: Path, files: Sequence[Item], seed: int) -> tuple[list[Item], list[Item]]:
    keys, labels = [file.key for file in files], [file.label for file in files]
    for label in sorted(set(labels)):
        if len({file.key for file in files if file.label == label}) < 2:
            raise DatasetError(f"{home}: class {label!r} has one distinct image; a split into train and test needs two")
    train, test = stratified_split(keys, labels, test_size=lambda count: max(1, count // TEST_SHARE), seed=seed)
    return [files[i] for i in train], [files[i] for i in test]


def _examples(files: Iterable[Item], classes: tuple[str, ...]) -> list[Example]:
    labels = {name: label for label, name in enumerate(classes)}
    return [Example(file.key, file.stored, labels[file.label]) for file in files]


def _read_checked(path: Path) -> bytes | None:
    try:
        stored = path.read_bytes()
    except OSError:
        return None  # not there yet; where it cannot be read, writing it will say why
    digest, content = stored[:32], stored[32:]
    return content if hashlib.sha256(content).digest() == digest else None


def _write_checked(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, hashlib.sha256(content).digest() + content)
    except OSError as error:
        raise DatasetError(
            f"cannot write {path} ({error.strerror}); set KSHOT_CACHE to a folder that can be written"
        ) from error
