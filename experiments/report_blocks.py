"""What a report is made of: a few kinds of blocks, said once and rendered twice (Markdown and HTML).

The blocks hold plain text as it came from the data; escaping and hiding of paths is the renderers' work.
"""

from dataclasses import dataclass
from typing import NamedTuple


class Cell(NamedTuple):
    """One field of a table; the best of its column is set in bold."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Heading:
    """A heading of level 1 (the title), 2 or 3."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str


@dataclass(frozen=True)
class Notes:
    """Sentences that must not be overlooked."""

    sentences: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A caption, one header per column, rows of as many cells; the first cell of a row is its header.

    prose: the cells hold words that may be many, not numbers; so do those of every table of two columns.
    """

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    prose: bool = False


@dataclass(frozen=True)
class Picture:
    """A figure: the SVG's bytes (for the page that stands alone), the PNG's path from the report, a description."""

    svg: bytes
    png: str
    alt: str


class Photo(NamedTuple):
    """A small image of a data set as JPEG, what it is, and what of that is written below it."""

    jpeg: bytes
    alt: str
    tag: str


@dataclass(frozen=True)
class Gallery:
    """Images of a data set under a caption. They are in the page alone: what a repository keeps has none."""

    caption: str
    photos: tuple[Photo, ...]


@dataclass(frozen=True)
class Command:
    """What to type in a shell."""

    text: str


Block = Heading | Paragraph | Notes | Table | Picture | Gallery | Command
