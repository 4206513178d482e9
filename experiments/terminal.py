"""Lines, progress, tables and paths as the terminal shows them."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from rich.progress import Progress


# text is shown as it is: names and paths may hold what rich would read as markup
out = Console(soft_wrap=True, markup=False, emoji=False, highlight=False)
err = Console(stderr=True, soft_wrap=True, markup=False, emoji=False, highlight=False)


def fail(message: str, status: int) -> NoReturn:
    """End the program with one line on stderr, and one for each problem that the message lists."""
    lines = (line[: -len(line.lstrip())] + " ".join(line.split()) for line in message.splitlines() if line.strip())
    err.print("kshot: " + "\n".join(lines), style="red")
    sys.exit(status)


def progress_bar(name: str, count: str, *end: str) -> "Progress":
    """A bar that fits into 80 columns, with texts before it, behind it and at its end; none in a log file."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    times = TimeElapsedColumn(), TimeRemainingColumn()
    columns = TextColumn(name), BarColumn(16), TextColumn(count), *times, *map(TextColumn, end)
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
