"""The tables of what it cost: seconds of a cell, and all of the sweep by method. Cell records in, tables out."""

from collections.abc import Sequence
from statistics import median

from experiments.report_blocks import Cell, Table
from experiments.styles import ordered, style
from experiments.tables import NONE, Record

PHASES = ("fit", "predict", "answer")
WORK = {"vision_forwards": "vision forwards", "train_tokens": "training tokens"}  # what a record may count


def timings_table(cells: Sequence[Record]) -> Table:
    """Median seconds per cell to fit and to predict, by method."""
    rows = [
        (Cell(style(method).title), *(Cell(_median(cells, method, phase)) for phase in ("fit", "predict")))
        for method in ordered(cell["method"] for cell in cells)
    ]
    return Table(
        "Median seconds per cell. What an earlier cell has loaded, or an earlier cell or sweep has encoded, costs "
        "nothing again.",
        ("method", "fit", "predict"),
        tuple(rows),
    )


def cost_table(cells: Sequence[Record]) -> Table:
    """What all cells of each method took, and below them those of the sweep."""
    counted = [kind for kind in WORK if any(kind in cell.get("work", {}) for cell in cells)]
    of_methods = {
        style(method).title: [cell for cell in cells if cell["method"] == method]
        for method in ordered(cell["method"] for cell in cells)
    }
    rows = [_row(title, group, counted) for title, group in {**of_methods, "the whole sweep": cells}.items()]
    caption = (
        "Cost: seconds that the cells took, summed, and in hours of a core; a cell has one core, or on a GPU the hours "
        "are those of that GPU. What another cell or sweep has loaded or encoded before costs nothing again."
    )
    if counted:
        caption += (
            " Counts are of the cells that recorded any: images that the vision tower saw, and tokens trained on."
        )
    header = ("method", "cells", *PHASES, "all seconds", "per cell", "core-hours", *(WORK[kind] for kind in counted))
    return Table(caption, header, tuple(rows))


def _row(title: str, cells: Sequence[Record], counted: Sequence[str]) -> tuple[Cell, ...]:
    times = [[cell["timings"].get(f"{phase}_seconds") for cell in cells] for phase in PHASES]
    whole = _sum([second for column in times for second in column])
    texts = [
        str(len(cells)),
        *(NONE if (of_phase := _sum(column)) is None else f"{of_phase:,.1f}" for column in times),
        *([NONE] * 3 if whole is None else [f"{whole:,.1f}", f"{whole / len(cells):,.2f}", f"{whole / 3600:,.3f}"]),
    ]
    for kind in counted:
        count = _sum([cell.get("work", {}).get(kind) for cell in cells])
        texts.append(NONE if count is None else f"{count:,}")
    return tuple(map(Cell, (title, *texts)))


def _sum(values: Sequence[float | None]) -> float | None:
    """Of those that are known; None where none is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _median(cells: Sequence[Record], method: str, phase: str) -> str:
    times = [cell["timings"].get(f"{phase}_seconds") for cell in cells if cell["method"] == method]
    known = [time for time in times if time is not None]
    return f"{median(known):.2f}" if known else NONE
