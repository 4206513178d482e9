"""What the catalog says of a data set: one Row each. Imports the standard library only."""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.archives import Part
from data.protocols import Protocol
from kshot_errors import DatasetError


def clean_name(name: str) -> str:
    """The class name as text: `_ . -` become spaces, lower case, single spaces, composed characters (NFC).

    Some file systems write é as two characters, tokenizers as one: an answer could then never equal its class.
    """
    return unicodedata.normalize("NFC", " ".join(re.sub(r"[_.\-]", " ", name).lower().split()))


@dataclass(frozen=True)
class Access:
    """How a user gets at a set; none of it is in a row. source: "" is the set's first that fits the protocol.

    root: folder of the original files, for the source archive. protocol: "" is the first one that the source allows.
    split_file: for a protocol that reads one. allow_modified: take files that are not what was published.
    """

    source: str = ""
    root: Path | None = None
    protocol: str = ""
    split_file: Path | None = None
    allow_modified: bool = False


@dataclass(frozen=True)
class Row:
    """One data set: what a reader, a trainer and a loader need to know of it.

    classes: class names as the source writes them, in label order; None where only the data tell.
    protocol: name of the split; "seeded-split" is drawn from the split seed and is recorded with it.
    hflip: probability of a horizontal flip of an image in training; 0 where a mirrored image is another thing.
    loader: "module:function"; called as function(row, root=..., split_seed=...) it returns a Dataset; that of a set
        with sources is also given access=.
    location: what the loader reads: a folder, a hub identifier or an address; "" where it needs none.
    train, test: number of images, about; 0 where only the data tell.
    clean: class name as its source writes it → as a model reads it.
    sources: where it can be had, the usual one first; () where it comes with kshot or is the user's folder.
    hub, revision: hub identifier and commit; "" is the newest, and the commit it resolved to is recorded.
    parts: its original files. protocols: the named ways to use it, the usual one first.
    content: `core.digest` of (class, key) of its images as they were published, "" where it is not known.
    spellings: other ways in which sources write a class name → the one in `classes`.
    """

    name: str
    title: str
    licence: str
    citation: str
    url: str
    protocol: str
    hflip: float
    loader: str
    classes: tuple[str, ...] | None = None
    location: str = ""
    train: int = 0
    test: int = 0
    clean: Callable[[str], str] = clean_name
    sources: tuple[str, ...] = ()
    hub: str = ""
    revision: str = ""
    parts: Mapping[str, Part] = field(default_factory=dict)
    protocols: tuple[Protocol, ...] = ()
    content: str = ""
    spellings: Mapping[str, str] = field(default_factory=dict)


def clean_classes(row: Row, names: Sequence[str]) -> tuple[str, ...]:
    """The names as a model reads them. Raises DatasetError where one is empty, or two are the same."""
    origin: dict[str, str] = {}
    for name in names:
        cleaned = row.clean(name)
        if not cleaned:
            raise DatasetError(f"{row.name}: class {name!r} has no letters left once cleaned; rename it")
        if cleaned in origin:
            both = f"{origin[cleaned]!r} and {name!r}"
            raise DatasetError(f"{row.name}: classes {both} both read {cleaned!r}; rename or merge them")
        origin[cleaned] = name
    return tuple(origin)
