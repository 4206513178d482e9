"""Lines, progress, tables and paths as the terminal shows them. Names come from outside: nothing in them steers it."""

import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.status import Status
from rich.table import Table
from rich.text import Text

from kshot.errors import shown

if TYPE_CHECKING:
    from rich.progress import Progress


class Terminal(Console):
    """A console on which every text is shown as it is: neither what steers a terminal nor what rich would read as
    markup has an effect, and what cannot be written in its encoding is escaped."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(self._writable(segment.text), segment.style)

    def status(self, status: RenderableType, **options: Any) -> Status:
        return super().status(Text(status) if isinstance(status, str) else status, **options)

    def _writable(self, text: str) -> str:
        return shown(text).encode(self.encoding, "backslashreplace").decode(self.encoding)


out = Terminal(soft_wrap=True, markup=False, emoji=False, highlight=False)
err = Terminal(stderr=True, soft_wrap=True, markup=False, emoji=False, highlight=False)


def fail(message: str, status: int) -> NoReturn:
    """End the program with one line on stderr, and one for each problem that the message lists."""
    lines = (line[: -len(line.lstrip())] + " ".join(line.split()) for line in message.splitlines() if line.strip())
    err.print("kshot: " + "\n".join(lines), style="red")
    sys.exit(status)


def progress_bar(name: str, count: str, *end: str) -> "Progress":
    """A bar that fits into 80 columns, with texts before it, behind it and at its end; none in a log file."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    times = TimeElapsedColumn(), TimeRemainingColumn()
    plain = partial(TextColumn, markup=False)  # what is described has names from outside
    columns = TextColumn(name), BarColumn(16), TextColumn(count), *times, *map(plain, end)
    return Progress(*columns, console=err, disable=not err.is_terminal)


def plain_table(columns: list[str]) -> Table:
    """A table in which only the last words of a row may wrap, never the name it begins with."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for n, column in enumerate(columns):
        table.add_column(column, no_wrap=n == 0)
    return table


def print_paths(paths: list[Path]) -> None:
    """What was written."""
    for path in paths:
        out.print(f"wrote {path}")
