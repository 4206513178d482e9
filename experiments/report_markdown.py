"""Blocks as GitHub-flavoured Markdown, without images of data sets. It does not know where they came from; every text
passes `_text`."""

import re
from collections.abc import Iterable

from experiments.display import without_paths
from experiments.report_blocks import Block, Cell, Command, Gallery, Heading, Notes, Paragraph, Picture, Table

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
