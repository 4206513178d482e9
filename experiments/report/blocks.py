"""What a report is made of: a few kinds of blocks, said once and rendered twice (Markdown and HTML).

The blocks hold plain text as it came from the data; escaping and hiding of paths is the renderers' work.

TODO Blocks as GitHub-flavoured Markdown, without images of data sets. It does not know where they came from; every text
passes `_text`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from experiments.sweep.provenance import without_paths

# ---- What a report is made of: a few kinds of blocks, said once and rendered twice (Markdown and HTML).


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


# ---- Blocks as GitHub-flavoured Markdown, without images of data sets. It does not know where they came from;

# An underscore inside a word is no emphasis, so names like oxford_flowers102 stay readable.
_SPECIAL = re.compile(r"[\\`*\[\]|$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")

Shown = Heading | Paragraph | Notes | Table | Picture | Command


def markdown(blocks: Iterable[Block]) -> str:
    """The whole document, ending in one newline."""
    shown = (block for block in blocks if not isinstance(block, Gallery))
    return "\n\n".join(_block(block) for block in shown) + "\n"


def _block(block: Shown) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {_text(text)}"
        case Paragraph(text):
            return _text(text)
        case Notes(sentences):
            return "\n>\n".join(f"> **Note.** {_text(sentence)}" for sentence in sentences)
        case Picture(_, png, alt):
            return f"![{_text(alt)}]({png})"
        case Command(text):
            return _fenced(without_paths(text))
        case Table():
            return _table(block)


def _table(table: Table) -> str:
    # Numbers to the right.
    align = ["---:" if len(table.header) > 2 and not table.prose else "---"] * (len(table.header) - 1)
    rows = [map(_text, table.header), ["---", *align], *(map(_cell, row) for row in table.rows)]
    lines = [" | ".join(row) for row in rows]
    return "\n".join([f"{_text(table.caption)}\n", *(f"| {line} |" for line in lines)])


def _cell(cell: Cell) -> str:
    return f"**{_text(cell.text)}**" if cell.best else _text(cell.text)


def _text(text: str) -> str:
    line = " ".join(without_paths(text).split())
    tagless = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\g<0>", tagless)


def _fenced(code: str) -> str:
    longest = max((len(run) for run in re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}sh\n{code}\n{fence}"
