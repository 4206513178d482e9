"""The tables of how it was run: data sets, prompts, times, settings, versions, and the cells still missing.

Cell records and sweep.json in, tables out; it does not know what the numbers mean, nor Markdown or HTML.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from experiments.display import name
from experiments.methods import METHODS
from experiments.metrics import seeds_of
from experiments.report_blocks import Cell, Table
from experiments.series import by_series, method_of
from experiments.styles import ordered, style
from experiments.tables import NONE, Record

Planned = tuple[str, str, int, int]  # dataset, method or series, shots, seed
ZERO_SHOT = {name for name, row in METHODS.items() if not row.learns}  # planned once, at 0 shots, whatever the seeds


def facts_table(
    sweep: Record, cells: Sequence[Record], n_images: Mapping[str, int], n_classes: Mapping[str, int]
) -> Table:
    """Per data set: classes, test images, seeds, cells."""
    rows = [
        (
            Cell(name(dataset)),
            Cell(str(n_classes.get(dataset, NONE))),
            Cell(str(n_images.get(dataset, NONE))),
            Cell(str(len(seeds_of(cells, dataset)))),
            Cell(str(sum(cell["dataset"] == dataset for cell in cells))),
        )
        for dataset in sweep["datasets"]
    ]
    return Table("What was run.", ("data set", "classes", "test images", "seeds", "cells"), tuple(rows))


def prompts_table(sweep: Record) -> Table | None:
    """The prompts by the numbers that name them; None where there are not several."""
    prompts = sweep.get("prompts", ())
    rows = [(Cell(str(number)), Cell(text)) for number, text in enumerate(prompts, 1)]
    return Table("Prompts.", ("prompt", "text"), tuple(rows)) if len(rows) > 1 else None


def timings_table(cells: Sequence[Record]) -> Table:
    """Median seconds per cell to fit and to predict, by method."""
    rows = [
        (Cell(style(method).title), *(Cell(_seconds(cells, method, what)) for what in ("fit", "predict")))
        for method in ordered(cell["method"] for cell in cells)
    ]
    return Table(
        "Median seconds per cell. What an earlier cell has loaded, or an earlier cell or sweep has encoded, costs "
        "nothing again.",
        ("method", "fit", "predict"),
        tuple(rows),
    )


def settings_table(caption: str, header: str, *records: Record) -> Table:
    """Nested settings, one row per leaf in order of name; records that differ show every value."""
    leaves: dict[str, set[str]] = defaultdict(set)
    for record in records:
        for key, value in _leaves(record):
            leaves[key].add(value)
    rows = [(Cell(name(key)), Cell("; ".join(sorted(values)))) for key, values in sorted(leaves.items())]
    return Table(caption, (header, "value"), tuple(rows))


def missing_table(planned: Iterable[Planned], cells: Sequence[Record]) -> Table | None:
    """The planned cells that are not there, one row per (data set, method, seed); None when all are."""
    there = {(cell["dataset"], cell["method"], cell["shots"], cell["seed"]) for cell in cells}
    gaps: dict[tuple[str, str, int], list[int]] = defaultdict(list)
    for dataset, method, shots, seed in planned:
        if (dataset, method, shots, seed) not in there:
            gaps[dataset, method, seed].append(shots)
    rows = [
        (Cell(name(dataset)), Cell(style(method).title), Cell(str(seed)), Cell(", ".join(map(str, sorted(shots)))))
        for (dataset, method, seed), shots in gaps.items()
    ]
    caption = f"Cells not run yet: {sum(map(len, gaps.values()))}."
    return Table(caption, ("data set", "method", "seed", "shots"), tuple(rows)) if rows else None


def all_planned(sweep: Record, cells: Sequence[Record]) -> list[Planned]:
    """The full grid of the sweep, a method with each combination of what is compared and it reads. A zero-shot method
    counts once a data set and series: under the seed it ran with, else 0."""
    sweep, cells = by_series(sweep, cells)
    plan: list[Planned] = []
    for dataset in sweep["datasets"]:
        for method in sweep["methods"]:
            if method_of(method) in ZERO_SHOT:
                run = [c["seed"] for c in cells if c["dataset"] == dataset and c["method"] == method]
                plan.append((dataset, method, 0, min(run, default=0)))
            else:
                plan += [(dataset, method, k, seed) for k in sweep["shots"] if k for seed in sweep["seeds"]]
    return plan


def _seconds(cells: Sequence[Record], method: str, what: str) -> str:
    times = [cell["timings"].get(f"{what}_seconds") for cell in cells if cell["method"] == method]
    known = [time for time in times if time is not None]
    return f"{median(known):.2f}" if known else NONE


def _leaves(record: Record, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _value(value)


def _value(value: Any) -> str:
    if isinstance(value, str):
        return name(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value))
    return json.dumps(value, sort_keys=True)
