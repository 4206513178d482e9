"""Loads a data set from the user's folder of images. The rules of a folder:

* PATH/train/<class>/<image> and PATH/test/<class>/<image> is a given split; `SIDES` has the other names of both sides,
  and validation is the test side where there is no other. PATH/<class>/<image> is split by seed.
* What begins like an image, or has the ending of one, must be an image that decodes. Other files, and hidden ones, are
  skipped and counted.
* A link may point anywhere inside PATH and nowhere else.
* The same image (byte for byte) may occur in one class several times; in two classes, or in train and in test, only
  where the user allows it.

One error lists all the problems of a folder.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from data.dataset import (
    SIDES,
    Access,
    Dataset,
    DatasetSpec,
    Item,
    Slice,
    content_key,
    digest,
    examples_of,
    is_system_file,
    name_problems,
    shared_images,
)
from data.fewshot import given_sides, one_in_five, split_items
from kshot.errors import DatasetError, ImageError, listed_by_kind, shown
from kshot.images import HEAD, HEIF_ENDINGS, begins_like_image, open_image

MAX_BYTES = 256 << 20  # of a file of an image
SHOWN = 5  # endings of files that are skipped
ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".dib", ".webp", ".tif", ".tiff", ".ico"),
    *(".pbm", ".pgm", ".ppm", ".pnm", ".pfm", ".tga", ".jp2", ".j2k", ".jxl", ".psd", ".svg", ".qoi", ".dds"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", *HEIF_ENDINGS),
)

LAYOUT = "use PATH/<class>/<image>, or PATH/train/<class>/<image> and PATH/test/<class>/<image>"
UNREADABLE = "files that cannot be read as images"
LINK = "a link that leads out of the folder or nowhere; put the image itself there"
CLOSED = "a folder that cannot be read; check its permissions"
ENCODING = "a name that is not UTF-8; rename it"
STRAY = "an image where class folders are expected; move it into one or elsewhere"
BESIDE = "images beside the sides of the split; move them elsewhere"
NESTED = f"a folder where images are expected; {LAYOUT}"
EMPTY = "a class folder without images; add images or remove it"
ONE_SIDE = "a class in one of train and test only; add its images or remove it"
ONE_IMAGE = "a class with one distinct image, and a split into train and test needs two; add images or remove it"
KEEP = "remove one, or keep both with --allow-shared"
TWO_CLASSES = f"the same image in two classes (no answer is right for both); {KEEP}"
TWO_SIDES = f"the same image in train and test (it may be seen before the test); {KEEP}"
CLASSES = "classes"


class _File(NamedTuple):
    """A file that must be an image. side: train, test, or "" where the folder has no split."""

    side: str
    label: str
    path: Path


def load_folder(spec: DatasetSpec, *, root: Path | None, split_seed: int, access: Access) -> Dataset:
    """The data set in the folder spec.location, by the rules above; root is not used: nothing is built.

    Raises DatasetError with all that is wrong with the folder.
    """
    home = Path(spec.location).expanduser()
    if not _is_utf8(str(home.resolve())):
        raise DatasetError(f"the folder {shown(str(home))} has {ENCODING}")  # results are called after it
    if not home.is_dir():
        raise DatasetError(f"{home} is not a folder; give folder:PATH with one sub-folder of images per class")
    folder = _Folder(home)
    files = list(folder.files())
    items = folder.read(files)
    folder.check_classes(files, items)
    twins = _twins(items)
    if not access.allow_shared:
        folder.problems |= twins
    if problems := {kind: lines for kind, lines in folder.problems.items() if lines}:
        raise DatasetError(listed_by_kind(spec.name, problems))
    return _dataset(spec, folder, items, split_seed, kept=any(twins.values()))


def _dataset(spec: DatasetSpec, folder: "_Folder", items: Sequence[Item], split_seed: int, *, kept: bool) -> Dataset:
    """The folder without problems as a data set. kept: whether images stand in two places."""
    classes = tuple(sorted({item.label for item in items}))
    split, (train, test) = f"{spec.protocol}-{split_seed}", split_items(items, test_size=one_in_five, seed=split_seed)
    if folder.sides:
        train, test = ([item for item in items if item.split == side] for side in ("train", "test"))
        split = f"given-split-{folder.validation}" if folder.validation else "given-split"
    facts: dict[str, Any] = {"notes": folder.notes()} if folder.notes() else {}
    if kept:
        facts |= shared_images(train, test) | {"allow_shared": True}
    # Results are shared with others: they have the folder's own name, not its path, and a fingerprint of its images.
    name = f"folder:{Path(os.path.abspath(folder.home)).name}"
    fingerprint = digest((item.split, item.label, item.key) for item in items)[:12]
    return Dataset(
        name, f"{split}-{fingerprint}", classes, examples_of(train, classes), examples_of(test, classes), facts
    )


class _Folder:
    """A folder while it is read. problems: by kind. skipped: how many files of an ending, or of a name without one, are
    no images. sides: train and test → their folders; none where the folder has no split. validation: the test side's
    name in lower case, where it is a folder for validation."""

    def __init__(self, home: Path) -> None:
        self.home, self.problems, self.skipped = home, defaultdict[str, list[str]](list), Counter[str]()
        self.entries = cache(self._entries)  # what is wrong is noted once
        self.sides, self._unused = self._find_sides()
        test = self.sides["test"].name.lower() if self.sides else ""
        self.validation = test if test in SIDES["validation"] else ""

    def notes(self) -> list[str]:
        """What a user must know of how the folder was read."""
        notes = [f"{self.sides['test'].name} is the test side, since there is no other"] if self.validation else []
        notes += (f"{each.name} takes no part, since {self.sides['test'].name} is there" for each in self._unused)
        if self.skipped:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.skipped.most_common(SHOWN))
            more = ", ..." if len(self.skipped) > SHOWN else ""
            notes.append(f"skipped, since they are no images: {self.skipped.total():,} ({kinds}{more})")
        return notes

    def files(self) -> Iterator[_File]:
        """Every file that must be an image, by side, class and name."""
        for side, top in (self.sides or {"": self.home}).items():
            entries = self.entries(top)
            if not any(entry.is_dir() for entry in entries):
                self.problems[CLASSES].append(f"{self.shown(top)} has no class folders; {LAYOUT}")
            for entry in entries:
                if entry.is_dir():
                    yield from self._of_class(side, entry)
                else:
                    self._misplaced(entry, STRAY)

    def read(self, files: Sequence[_File]) -> list[Item]:
        """The images of these files, each decoded once to be sure of it."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = list(pool.map(self._read, files))
        self.problems[UNREADABLE] += (result for result in results if isinstance(result, str))
        return [result for result in results if isinstance(result, Item)]

    def check_classes(self, files: Sequence[_File], items: Sequence[Item]) -> None:
        """Note what is wrong with the classes; a broken file counts as an image that was mended."""
        sides, images = defaultdict[str, set[str]](set), defaultdict[str, set[str]](set)
        keys = {item.path: item.key for item in items}
        for file in files:
            path = file.path.relative_to(self.home).as_posix()
            sides[file.label].add(file.side)
            images[file.label].add(keys.get(path, path))
        for label in sorted(sides):
            if self.sides and len(sides[label]) == 1:
                self.problems[ONE_SIDE].append(f"{label!r} ({sides[label].pop()})")
            elif len(images[label]) == 1 and not self.sides:
                self.problems[ONE_IMAGE].append(repr(label))
        if len(sides) == 1:
            self.problems[CLASSES].append(f"there is one class ({next(iter(sides))!r}), and classification needs two")
        self.problems[CLASSES] += name_problems(sorted(sides))

    def shown(self, path: Path) -> str:
        """A path within the folder as a terminal shows it, in one line."""
        name = path.relative_to(self.home).as_posix() if path != self.home else str(path)
        return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)

    def _find_sides(self) -> tuple[dict[str, Path], list[Path]]:
        """The sides where the folder has both, each with folders in it; and those for validation that take no part."""
        entries, names = self.entries(self.home), {name for names in SIDES.values() for name in names}
        tops = [entry for entry in entries if entry.name.lower() in names and entry.is_dir()]
        found = {top.name: top for top in tops if any(entry.is_dir() for entry in self.entries(top))}
        if not (given := given_sides(found)):
            if found and len(tops) == sum(entry.is_dir() for entry in entries):  # no class is called so
                self._one_side(next(iter(found.values())), [top for top in tops if top.name not in found])
            return {}, []
        sides = {"train": found[given[0]], "test": found[given[1]]}
        unused = [top for top in found.values() if top.name.lower() in SIDES["validation"]]
        if sides["test"] in unused:
            unused = []
        for entry in entries:
            if entry not in (*sides.values(), *unused):
                self._misplaced(entry, BESIDE)
        return sides, unused

    def _one_side(self, side: Path, flat: Sequence[Path]) -> None:
        """Raise DatasetError for a folder with one side of classes. flat: other sides, which have none."""
        one = f"{self.home} has class folders in {side.name} alone"
        other = flat[0].name if flat else "train" if side.name.lower() in SIDES["test"] else "test"
        why = f", and nothing says what the images in {other} show" if flat else ""
        way_out = f"put them into {other}/<class>" if flat else f"put some of each class into {other}/<class>"
        raise DatasetError(f"{one}{why}; {way_out}, or give {side}, of which one image in five is for testing")

    def _of_class(self, side: str, folder: Path) -> Iterator[_File]:
        fine, misplaced = 0, False
        for entry in self.entries(folder):
            if entry.is_dir():
                misplaced |= self._misplaced(entry, NESTED)
            elif not self._skip(entry):
                fine += 1
                yield _File(side, folder.name, entry)
        if not fine and not misplaced:
            self.problems[EMPTY].append(self.shown(folder))

    def _misplaced(self, entry: Path, kind: str) -> bool:
        """Note an image, or a folder with images, in the wrong place; others are skipped."""
        if entry.is_dir():
            inside = (Path(top, name) for top, _, names in os.walk(entry) for name in names)
            wrong = any(not is_system_file(file.name) and is_image_file(file) for file in inside)
            self.skipped[f"{entry.name}/"] += not wrong
        else:
            wrong = not self._skip(entry)
        if wrong:
            self.problems[kind].append(self.shown(entry))
        return wrong

    def _skip(self, file: Path) -> bool:
        """Count a file that is no image."""
        if is_image_file(file):
            return False
        self.skipped[file.suffix.lower() or file.name] += 1
        return True

    def _entries(self, folder: Path) -> list[Path]:
        """What is in a folder, by name, without system files, which are counted, and what cannot be used."""
        entries = []
        try:
            for entry in sorted(folder.iterdir()):
                if is_system_file(entry.name):
                    hidden = entry.name.startswith(".") and entry.suffix
                    self.skipped[f"hidden {entry.suffix}" if hidden else entry.name] += 1
                elif entry.is_symlink() and not self._leads_inside(entry):
                    self.problems[LINK].append(self.shown(entry))
                elif _is_utf8(entry.name):
                    entries.append(entry)
                else:
                    self.problems[ENCODING].append(self.shown(entry))
        except OSError as error:
            self.problems[CLOSED].append(f"{self.shown(folder)} ({error.strerror})")
        return entries

    def _leads_inside(self, link: Path) -> bool:
        try:
            return link.resolve(strict=True).is_relative_to(self.home.resolve())
        except (OSError, RuntimeError):  # broken, or a loop: RuntimeError before Python 3.13
            return False

    def _read(self, file: _File) -> Item | str:
        """The image, or in a line what is wrong with the file."""
        path, name = file.path, self.shown(file.path)
        try:
            if not path.is_file():
                return f"{name} is not a regular file; remove it"  # a pipe would be read for ever
            if path.stat().st_size > MAX_BYTES:
                return f"{name} has more than {MAX_BYTES:,} bytes; make it smaller"
            image = path.read_bytes()
            open_image(image, name)
        except OSError as error:
            return f"{name}: cannot be read ({error.strerror}); replace or remove it"
        except ImageError as error:  # all that is asked of an image stands there
            return str(error)
        stored = Slice(path.resolve(), 0, len(image))  # read again when it is wanted
        return Item(path.relative_to(self.home).as_posix(), file.side, file.label, stored, content_key(image))


def is_image_file(file: Path) -> bool:
    """Whether a file has an image's ending or begins like one; or is none that can be read, of which that is said
    later."""
    if file.suffix.lower() in ENDINGS or not file.is_file():
        return True
    try:
        with file.open("rb") as opened:
            return begins_like_image(opened.read(HEAD))
    except OSError:
        return True


def _is_utf8(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def _twins(items: Sequence[Item]) -> dict[str, list[str]]:
    """The same images in two classes, and in train and test: by kind, a line each."""
    places = defaultdict[str, dict[tuple[str, str], str]](dict)
    for item in items:
        places[item.key].setdefault((item.split, item.label), item.path)
    twins: dict[str, list[str]] = {TWO_CLASSES: [], TWO_SIDES: []}
    for at in places.values():
        for kind, names in zip((TWO_SIDES, TWO_CLASSES), zip(*at, strict=True), strict=True):
            if len(set(names)) > 1:
                twins[kind].append(" and ".join(at.values()))
    return twins
