"""What a data set is: examples of image bytes with a label. Knows no archive, no protocol, no shots and no models.

An image is encoded bytes in memory, or a Slice: where in a file its bytes lie. They are read when they are asked for,
so a set of any size costs its index.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, overload

from kshot_errors import DatasetError


def content_key(image: bytes) -> str:
    """The identity of an image wherever it came from: the SHA-256 of its bytes, in hex."""
    return hashlib.sha256(image).hexdigest()


@dataclass(frozen=True, slots=True)
class Slice:
    """`length` bytes of a file from `offset` on."""

    path: Path
    offset: int
    length: int

    def read(self) -> bytes:
        """The bytes. Raises DatasetError where the file is gone or has become shorter."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                content = file.read(self.length)
        except OSError as error:
            raise DatasetError(f"{self.path} cannot be read ({error.strerror}); get the data again") from error
        if len(content) != self.length:
            raise DatasetError(f"{self.path} ends before byte {self.offset + self.length}; get the data again")
        return content


class Readable(Protocol):
    """Bytes that lie somewhere else: a Slice, or one of the spool's."""

    def read(self) -> bytes: ...


Stored = bytes | Readable


def content(stored: Stored) -> bytes:
    """The bytes, wherever they are kept."""
    return stored if isinstance(stored, bytes) else stored.read()


def digest(lines: Iterable[Sequence[str]]) -> str:
    """64 hex digits for these lines of words, in whatever order they come."""
    return hashlib.sha256("\n".join(sorted("\0".join(line) for line in lines)).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Item:
    """One image as its source holds it.

    path: its name in the source; split, label: the source's own words, "" where it has no split.
    """

    path: str
    split: str
    label: str
    stored: Stored
    key: str


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled image.

    key: `content_key` of the image as it came from its source.
    stored: the encoded image (PNG, JPEG, ...), or where it lies.
    label: index into the data set's classes.
    stored_mirrored: likewise the horizontally flipped image where training may use it, else None.
    """

    key: str
    stored: Stored
    label: int
    stored_mirrored: Stored | None = None

    @property
    def image(self) -> bytes:
        """The encoded image."""
        return content(self.stored)

    @property
    def mirrored(self) -> bytes | None:
        """The encoded mirrored image, or None."""
        return None if self.stored_mirrored is None else content(self.stored_mirrored)


class Images(Sequence[bytes]):
    """The images of examples, each read when it is asked for."""

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
    """A data set under one named protocol: class names (label → text) and its two splits.

    facts: where it came from and how it was verified, for the record; JSON values.
    """

    name: str
    protocol: str
    classes: tuple[str, ...]
    train: Sequence[Example]
    test: Sequence[Example]
    facts: Mapping[str, Any] = field(default_factory=dict)
