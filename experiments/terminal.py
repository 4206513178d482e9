"""Progress, tables and paths as the terminal shows them."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from rich.progress import Progress


out, err = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)


def progress_bar() -> "Progress":
    """A bar that fits into 80 columns; a log file gets a line a cell instead."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    texts = (TextColumn(text, style=style) for text, style in (("left", "none"), ("{task.description}", "dim")))
    columns = TextColumn("cells"), BarColumn(16), TextColumn("{task.fields[count]}"), TimeElapsedColumn()
    return Progress(*columns, TimeRemainingColumn(), *texts, console=err, disable=not err.is_terminal)


def plain_table(columns: list[str]) -> Table:
    """A table in which only the last words of a row may wrap, never the name it begins with."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for n, column in enumerate(columns):
        table.add_column(column, no_wrap=n == 0)
    return table


def print_paths(paths: list[Path]) -> None:
    """What was written."""
    for path in paths:
        out.print(f"wrote {path}", markup=False, highlight=False)
