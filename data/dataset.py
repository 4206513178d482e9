"""What a data set is: labelled images as bytes, in train and test; and what the catalog states of each data set.

An image is encoded bytes in memory, or a Slice: where in a file its bytes are. They are read when they are needed, so a
data set of any size costs only its index.
"""

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, overload

from kshot.errors import DatasetError, listed


def content_key(image: bytes) -> str:
    """The identity of an image, whatever its source: the SHA-256 of its bytes, in hex."""
    return hashlib.sha256(image).hexdigest()


class Readable(Protocol):
    """Bytes that are not in memory: a Slice of a file, or spooled to a temporary file."""

    def read(self) -> bytes: ...


Stored = bytes | Readable

# What sources call the sides of a split, in any case; where there is no test side, the validation side is.
SIDES = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "val", "valid", "dev"),
}
SYSTEM_FILES = {"thumbs.db", "desktop.ini", "__macosx"}
NUMBER = re.compile(r"[+-]?(\d[\d,]*(\.\d+)?|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)  # as a class name


def stored_bytes(stored: Stored) -> bytes:
    """The bytes, wherever they are kept."""
    return stored if isinstance(stored, bytes) else stored.read()


@dataclass(frozen=True, slots=True)
class Slice:
    """`length` bytes of a file from `offset` on."""

    path: Path
    offset: int
    length: int

    def read(self) -> bytes:
        """The bytes. Raises DatasetError where the file is missing or has become shorter."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                content = file.read(self.length)
        except OSError as error:
            raise DatasetError(f"{self.path} cannot be read ({error.strerror}); get the data again") from error
        if len(content) != self.length:
            raise DatasetError(f"{self.path} ends before byte {self.offset + self.length}; get the data again")
        return content


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled image.

    key: `content_key` of the image as its source has it.
    stored: the encoded image (PNG, JPEG, ...), or where it is kept.
    label: index into the data set's classes.
    stored_mirrored: the same for the horizontally flipped image where training may use it, else None.
    """

    key: str
    stored: Stored
    label: int
    stored_mirrored: Stored | None = None

    @property
    def image(self) -> bytes:
        """The encoded image."""
        return stored_bytes(self.stored)

    @property
    def mirrored(self) -> bytes | None:
        """The encoded mirrored image, or None."""
        return None if self.stored_mirrored is None else stored_bytes(self.stored_mirrored)


class Images(Sequence[bytes]):
    """The images of examples, each read when it is accessed."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, n: int) -> bytes: ...
    @overload
    def __getitem__(self, n: slice) -> "Images": ...
    def __getitem__(self, n: int | slice) -> "bytes | Images":
        return Images(self._examples[n]) if isinstance(n, slice) else self._examples[n].image


@dataclass(frozen=True)
class Dataset:
    """A data set under one named protocol: class names (label → text), train and test.

    facts: where it came from and how it was verified, for the record; JSON values.
    """

    name: str
    protocol: str
    classes: tuple[str, ...]
    train: Sequence[Example]
    test: Sequence[Example]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Item:
    """One image as its source has it.

    path: its name in the source; split, label: the source's own words, "" where it has no split.
    """

    path: str
    split: str
    label: str
    stored: Stored
    key: str


def examples_of(items: Iterable[Item], classes: Sequence[str]) -> list[Example]:
    """The items as examples, their labels as indices into `classes`."""
    labels = {name: label for label, name in enumerate(classes)}
    return [Example(item.key, item.stored, labels[item.label]) for item in items]


def shared_images(train: Sequence[Item], test: Sequence[Item]) -> dict[str, int]:
    """For the record: how many images are in both train and test, and how many in two classes, if any."""
    shared = len({item.key for item in train} & {item.key for item in test})
    in_two = len(in_two_classes((*train, *test)))
    return {"shared": shared, **({"in_two_classes": in_two} if in_two else {})}


def in_two_classes(items: Iterable[Item | Example]) -> dict[str, set[Any]]:
    """Key → the labels of each image that has several."""
    labels = defaultdict[str, set[Any]](set)
    for item in items:
        labels[item.key].add(item.label)
    return {key: names for key, names in labels.items() if len(names) > 1}


def digest(lines: Iterable[Sequence[str]]) -> str:
    """64 hex digits for a set of lines of words; their order does not count."""
    return hashlib.sha256("\n".join(sorted("\0".join(line) for line in lines)).encode()).hexdigest()


def is_system_file(name: str) -> bool:
    """Whether an operating system or a file manager made the file of that name."""
    return name.startswith(".") or name.lower() in SYSTEM_FILES


def clean_name(name: str) -> str:
    """The class name as text: `_ . -` become spaces, lower case, single spaces, composed characters (NFC). A name that
    is a number keeps its sign and its point.

    Some file systems write é as two characters, tokenizers as one: an answer could then never equal its class.
    """
    if NUMBER.fullmatch(name.strip()):
        return name.strip()
    return unicodedata.normalize("NFC", " ".join(re.sub(r"[_.\-]", " ", name).lower().split()))


@dataclass(frozen=True)
class Access:
    """How a user gets a data set. source: "" is the set's first one that fits the protocol.

    root: folder of the original files, for the source archive. protocol: "" is the first one that the source allows.
    split_file: for a protocol that reads one. allow_modified: accept files that are not the published ones.
    label_column: of a set of the hub; "" is its usual one. allow_shared: accept a folder with the same image in two
    classes, or in train and test.
    """

    source: str = ""
    root: Path | None = None
    protocol: str = ""
    split_file: Path | None = None
    allow_modified: bool = False
    label_column: str = ""
    allow_shared: bool = False

    @property
    def kind(self) -> str:
        """The source that is asked for, with a root the archive; "" where none is."""
        return self.source or ("archive" if self.root else "")


Split = tuple[list[Item], list[Item]]  # train, test
SplitRule = Callable[[Sequence[Item], int, Path | None], Split]  # of items, split seed and the user's split file
# What one of the original files may be called, an archive or the folder that comes out of it: the first that exists
# counts; and the MD5 of the published file (32 hex digits), "" of a folder.
SourceNames = Mapping[str, str]


@dataclass(frozen=True)
class SplitProtocol:
    """A named way to use a benchmark.

    about: the rule in words. classes, train, test: the counts that it must give; 0 where none is published.
    sources: where its rule can be applied. splits: those of the hub's copy that it needs; () is all.
    seeded: whether it draws (its name in results then has the split seed).
    from_file: whether it reads a split file of the user's (its name in results then has the file's fingerprint).
    """

    name: str
    about: str
    rule: SplitRule
    classes: int
    train: int = 0
    test: int = 0
    sources: tuple[str, ...] = ("hub", "archive")
    splits: tuple[str, ...] = ()
    seeded: bool = False
    from_file: bool = False


@dataclass(frozen=True)
class DatasetSpec:
    """One data set of the catalog: what a reader, a trainer and a loader need to know of it.

    classes: class names as the source writes them, in label order; None where only the data tell.
    loader: "module:function"; called as function(spec, root=..., split_seed=...) it returns a Dataset; that of a set
        with choices is also given access=.
    protocol: name of the split; "seeded-split" is drawn from the split seed and is recorded with it.
    hflip: probability of a horizontal flip of an image in training; 0 where a mirrored image is another thing.
    location: what the loader reads: a folder, a hub identifier or an address; "" where it needs none.
    train, test: number of images, about; 0 where only the data tell.
    choices: names of the fields of Access that a user may give for it.
    sources: where it can be had, the usual one first; () where there is one alone.
    hub, revision: hub identifier and commit; "" is the newest, and the commit it resolved to is recorded.
    files: its original files. protocols: the named ways to use it, the usual one first.
    content: `digest` of (class, key) of its images as they were published, "" where it is not known.
    spellings: other ways in which sources write a class name → the one in `classes`.
    """

    name: str
    title: str
    licence: str
    loader: str
    citation: str = ""
    url: str = ""
    protocol: str = "seeded-split"
    hflip: float = 0.5
    classes: tuple[str, ...] | None = None
    location: str = ""
    train: int = 0
    test: int = 0
    choices: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    hub: str = ""
    revision: str = ""
    files: Mapping[str, SourceNames] = field(default_factory=dict)
    protocols: tuple[SplitProtocol, ...] = ()
    content: str = ""
    spellings: Mapping[str, str] = field(default_factory=dict)

    def has_protocol(self, name: str, source: str) -> bool:
        """Whether it has the protocol of that name, from this source where one is asked for."""
        return any(protocol.name == name and source in ("", *protocol.sources) for protocol in self.protocols)


def clean_classes(dataset: str, names: Sequence[str]) -> tuple[str, ...]:
    """The names as a model reads them. Raises DatasetError where names are empty, or the same."""
    if problems := name_problems(names):
        raise DatasetError(listed(dataset, problems))
    return tuple(map(clean_name, names))


def name_problems(names: Sequence[str]) -> list[str]:
    """A line for each class name that no model can tell from another one, or that is empty."""
    origin: dict[str, str] = {}
    problems = []
    for name in names:
        if not (cleaned := clean_name(name)):
            problems.append(f"class {name!r} has no letters left once cleaned; rename it")
        elif cleaned in origin:
            problems.append(f"classes {origin[cleaned]!r} and {name!r} both read {cleaned!r}; rename or merge them")
        origin.setdefault(cleaned, name)
    return problems
