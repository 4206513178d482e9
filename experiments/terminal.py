"""What a person sees in the terminal: progress, tables, paths. Knows no command and computes nothing."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from rich.progress import Progress

    from experiments.intervals import Score

out, err = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)


def progress_bar() -> "Progress":
    """A bar that fits into 80 columns; a log file gets a line a cell instead."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    texts = (TextColumn(text, style=style) for text, style in (("left", "none"), ("{task.description}", "dim")))
    columns = TextColumn("cells"), BarColumn(16), TextColumn("{task.fields[count]}"), TimeElapsedColumn()
    return Progress(*columns, TimeRemainingColumn(), *texts, console=err, disable=not err.is_terminal)


def print_summary(content: dict[str, Any], cells: list[dict[str, Any]]) -> None:
    """Accuracy by method (and what is compared) and shots for each data set, and what must be said of the models."""
    from experiments.metrics import scores
    from experiments.series import by_series, from_zero, method_of

    sweep, records = by_series(content, cells)
    numbers = _numbers(sweep["methods"])
    for dataset in content["datasets"]:
        found = from_zero(scores(records, dataset))
        shots = sorted({k for row in found.values() for k in row})
        table = plain_table(["method", *(f"k={k}" for k in shots)])
        for series in sweep["methods"]:
            under = _under(series)
            title = method_of(series) + (f" #{numbers[under]}" if under else "")  # 80 columns are few
            table.add_row(title, *(_mean(found.get(series, {}).get(k)) for k in shots))
        out.print(f"{dataset}: accuracy in %, ± 95% over seeds", style="bold", markup=False, highlight=False)
        out.print(table, soft_wrap=False)
        out.print()
    for under, number in numbers.items():
        out.print(f"#{number}: {under}", markup=False, highlight=False)
    for note in content["notes"]:
        out.print(note, style="yellow", markup=False, highlight=False)


def _numbers(methods: Iterable[str]) -> dict[str, int]:
    """What series are run under → the number that stands for it, from 1: prompts first, as they are numbered."""
    from experiments.series import PROMPT, choices_of

    series = sorted(methods, key=lambda each: PROMPT not in {choice.setting for choice in choices_of(each)})
    found = dict.fromkeys(under for each in series if (under := _under(each)))
    return {under: number for number, under in enumerate(found, 1)}


def _under(series: str) -> str:
    """What a series is run under of what is compared, a prompt with its words."""
    from experiments.series import PROMPT, choices_of
    from experiments.styles import said

    return ", ".join(f"prompt {c.value}" if c.setting == PROMPT else said(c) for c in choices_of(series))


def plain_table(columns: list[str]) -> Table:
    """A table in which only the last words of a row may wrap, never the name it begins with."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for n, column in enumerate(columns):
        table.add_column(column, no_wrap=n == 0)
    return table


def _mean(score: "Score | None") -> str:
    if score is None:
        return ""
    half = "" if score.half_width is None else f"±{100 * score.half_width:.1f}"
    return f"{100 * score.mean:.1f}{half}"


def print_paths(paths: list[Path]) -> None:
    """What was written."""
    for path in paths:
        out.print(f"wrote {path}", markup=False, highlight=False)
