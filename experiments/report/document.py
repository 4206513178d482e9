"""A report as a list of blocks, and the two documents made of them: report.md and report.html.

The blocks hold plain text as it came from the data. The templates escape it and cut absolute paths: both happen to
every value that a template shows, so none is forgotten.
"""

import re
from base64 import b64encode
from collections.abc import Callable, Sequence
from hashlib import sha256
from importlib.resources import files
from typing import Any, NamedTuple, get_args

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from experiments.sweep.provenance import without_paths
from kshot.errors import shown


class Best(str):
    """A field of a table that is the best of its column; it is set in bold."""


class Heading(NamedTuple):
    """A heading of level 2 or 3; the title of the document is the only one of level 1."""

    level: int
    text: str


class Paragraph(NamedTuple):
    """Running text."""

    text: str


class Notes(NamedTuple):
    """Sentences that stand out."""

    sentences: tuple[str, ...]


class Table(NamedTuple):
    """A caption, one header per column, rows of as many fields; the first field of a row is its header.

    prose: the fields hold words that may be many, not numbers; so do those of every table of two columns.
    """

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    prose: bool = False

    @property
    def wraps(self) -> bool:
        """Whether long fields are broken into lines and set to the left, as words are."""
        return self.prose or len(self.header) == 2

    @property
    def words(self) -> tuple[bool, ...]:
        """Of each column behind the first, whether its fields are words, which are set so in any table."""
        columns = list(zip(*self.rows, strict=True))[1:] if self.rows else [()] * (len(self.header) - 1)
        return tuple(self.wraps or any(map(_WORD.search, column)) for column in columns)


_WORD = re.compile(r"[^\W\d_]{3}")  # three letters; a number's own may be "e" or "to"


class Picture(NamedTuple):
    """A figure: the SVG's bytes (for the page that stands alone), the PNG's path from the report, a description."""

    svg: bytes
    png: str
    alt: str


class Photo(NamedTuple):
    """A small image of a data set as JPEG, its description, and the label written below it."""

    jpeg: bytes
    alt: str
    label: str


class Gallery(NamedTuple):
    """Images of a data set under a caption, in report.html alone: report.md is kept in repositories."""

    caption: str
    photos: tuple[Photo, ...]


class Command(NamedTuple):
    """What to type in a shell; on the page with a button that copies it. title: above it, "" for none."""

    text: str
    title: str = ""


Block = Heading | Paragraph | Notes | Table | Picture | Gallery | Command

# An underscore inside a word is no emphasis, so names like oxford_flowers102 stay readable.
_SPECIAL = re.compile(r"[\\`*\[\]|$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def markdown(title: str, blocks: Sequence[Block]) -> str:
    """The report in GitHub-flavoured Markdown, without images of data sets."""
    return _render("report.md.jinja", title, blocks, _markdown_text)


def html(title: str, blocks: Sequence[Block]) -> str:
    """The report as one HTML page that stands alone: style, images and a short script inside, nothing fetched. The
    script copies commands and says where there is more to the side; the page does without it."""
    return _render("report.html.jinja", title, blocks, without_paths)


def _render(template: str, title: str, blocks: Sequence[Block], show: Callable[[str], str]) -> str:
    """show: what is done to every text before the template's own escaping; what is marked safe stays as it is. What
    would steer the terminal that a report is read in is escaped."""

    def finalize(value: Any) -> Any:
        return show(shown(value)) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        loader=PackageLoader("experiments.report"),
        autoescape=template.endswith(".html.jinja"),
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.tests |= {kind.__name__.lower(): kind.__instancecheck__ for kind in (Best, *get_args(Block))}
    filters: dict[str, Callable[..., Any]] = {"fenced": _fenced, "dark": darkened}
    environment.filters |= filters | {"base64": lambda data: b64encode(data).decode()}
    script = files("experiments.report").joinpath("templates/report.js").read_text("utf-8")
    digest = b64encode(sha256(script.encode()).digest()).decode()
    environment.globals |= {"script": Markup(script), "digest": Markup(digest)}  # noqa: S704 - it is ours
    return environment.get_template(template).render(title=title, blocks=blocks)


_COLOUR = re.compile(rb"#([0-9a-f]{6})\b", re.IGNORECASE)
PAPER, INK = (0x14, 0x17, 0x1B), (0xE6, 0xE9, 0xED)  # of the page in the dark: greys are turned round between them
DARK = 0.45  # mean of a colour's parts, of 1, below which it is moved towards white on dark ground


def darkened(svg: bytes) -> bytes:
    """A figure for dark ground: greys turned round, dark colours made lighter. What has no colour of its own is black
    in SVG, so the whole gets one."""

    def changed(found: re.Match[bytes]) -> bytes:
        parts = [int(found[1][n : n + 2], 16) for n in (0, 2, 4)]
        if max(parts) - min(parts) <= 2:
            ends = zip(parts, PAPER, INK, strict=True)
            parts = [round(paper + (255 - part) / 255 * (ink - paper)) for part, paper, ink in ends]
        elif (mean := sum(parts) / 765) < DARK:
            parts = [round(part + (255 - part) * (DARK - mean) / (1 - mean)) for part in parts]
        return b"#" + bytes(parts).hex().encode()

    return _COLOUR.sub(changed, svg).replace(b"<svg ", f'<svg fill="#{bytes(INK).hex()}" '.encode(), 1)


def _markdown_text(text: str) -> str:
    """On one line, and nothing in it is taken for Markdown or for a tag."""
    line = " ".join(without_paths(text).split())
    tagless = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\g<0>", tagless)


def _fenced(text: str) -> str:
    """A block of code; its fence is longer than any run of backticks inside."""
    code = shown(without_paths(text))
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return f"{fence}sh\n{code}\n{fence}"
