"""Loads a data set from the user's folder of images. The rules of a folder:

* PATH/train/<class>/<image> and PATH/test/<class>/<image> is a given split; PATH/<class>/<image> is split by seed.
* Names that begin with a dot, Thumbs.db, desktop.ini and __MACOSX are system files and are ignored. Everything else
  must be a folder of a class or an image that decodes. Nothing is skipped.
* A link may point anywhere inside PATH and nowhere else.
* The same image (byte for byte) may occur in one class several times; not in two classes, not in train and in test.
"""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data.dataset import Dataset, DatasetSpec, Item, Slice, Split, content_key, digest, examples_of
from data.fewshot import one_in_five, split_items
from kshot.errors import DatasetError, ImageError
from kshot.images import open_image

SPLITS = ("train", "test")
SYSTEM_FILES = {"thumbs.db", "desktop.ini", "__macosx"}


def load_folder(spec: DatasetSpec, *, root: Path | None, split_seed: int) -> Dataset:
    """The data set in the folder spec.location, by the rules above; root is not used: nothing is built.

    Raises DatasetError for a layout that is not one of the two, ImageError for a file that is no readable image.
    """
    home = Path(spec.location).expanduser()
    if not home.is_dir():
        raise DatasetError(f"{home} is not a folder; give folder:PATH with one sub-folder of images per class")
    files = _read_folder(home)
    _refuse_duplicates(home, files)
    classes = tuple(sorted({file.label for file in files}))
    if len(classes) < 2:
        raise DatasetError(f"{home} has one class ({classes[0]!r}); classification needs two or more class folders")
    has_split = files[0].split != ""
    train, test = _given_split(home, files) if has_split else _seeded_split(home, files, split_seed)
    split = "given-split" if has_split else f"{spec.protocol}-{split_seed}"
    # Results are shared with others: they have the folder's own name, not its path, and a fingerprint of its images.
    name = f"folder:{Path(os.path.abspath(home)).name}"
    fingerprint = digest((file.split, file.label, file.key) for file in files)[:12]
    return Dataset(name, f"{split}-{fingerprint}", classes, examples_of(train, classes), examples_of(test, classes))


def _read_folder(home: Path) -> list[Item]:
    """Every image of the folder, decoded once to be sure of it, by split, class and file name."""
    entries = {entry.name: entry for entry in _visible(home, home)}
    has_split = all(s in entries and any(e.is_dir() for e in _visible(home, entries[s])) for s in SPLITS)
    if has_split and (others := sorted(entries.keys() - set(SPLITS))):
        raise DatasetError(f"{home / others[0]} stands beside train and test; move it elsewhere")
    splits = {split: entries[split] for split in SPLITS} if has_split else {"": home}
    files = [(s, folder.name, path) for s, top in splits.items() for folder, path in _class_files(home, top)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda file: _read_image(home, *file), files))


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
    """What is in a folder, by name, without system files. A link that leads out of home is an error."""
    if not folder.is_dir():
        return []
    try:
        entries = sorted(entry for entry in folder.iterdir() if not is_system_file(entry.name))
    except OSError as error:
        raise DatasetError(f"{folder} cannot be read ({error.strerror}); check its permissions") from error
    for entry in entries:
        if entry.is_symlink() and not _leads_into(home, entry):
            raise DatasetError(f"the link {entry} leads out of {home} or nowhere; put the image itself there")
    return entries


def is_system_file(name: str) -> bool:
    """Whether an operating system or a file manager made the file of that name."""
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


def _refuse_duplicates(home: Path, files: Sequence[Item]) -> None:
    first: dict[str, Item] = {}
    for file in files:
        twin = first.setdefault(file.key, file)
        if (twin.split, twin.label) != (file.split, file.label):
            places = "two classes" if twin.label != file.label else "train and test"
            raise DatasetError(f"{home}: {twin.path} and {file.path} are the same image in {places}; remove one")


def _given_split(home: Path, files: Sequence[Item]) -> Split:
    train, test = ([file for file in files if file.split == split] for split in SPLITS)
    if odd := sorted({f.label for f in train} ^ {f.label for f in test}):
        raise DatasetError(f"{home}: class {odd[0]!r} is in one of train and test only; add its images or remove it")
    return train, test


def _seeded_split(home: Path, files: Sequence[Item], seed: int) -> Split:
    for label in sorted({file.label for file in files}):
        if len({file.key for file in files if file.label == label}) < 2:
            raise DatasetError(f"{home}: class {label!r} has one distinct image; a split into train and test needs two")
    return split_items(files, test_size=one_in_five, seed=seed)
