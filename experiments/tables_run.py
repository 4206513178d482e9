"""The tables of what was run: data sets, prompts, and the cells still missing.

Cell records and sweep.json in, tables out; it does not know what the numbers mean, nor Markdown or HTML.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from experiments.config import capped
from experiments.display import name
from experiments.methods import METHODS
from experiments.metrics import seeds_of
from experiments.report_blocks import Cell, Table
from experiments.series import by_series, method_of
from experiments.styles import style
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


def missing_table(
    planned: Iterable[Planned], cells: Sequence[Record], failures: Mapping[Planned, str] | None = None
) -> Table | None:
    """The planned cells that are not there, one row per (data set, method, seed) and error; None when all are.

    failures: the error of those that were tried and failed, by the method's plain name, whatever is compared.
    """
    failures = failures or {}
    there = {(cell["dataset"], cell["method"], cell["shots"], cell["seed"]) for cell in cells}
    gaps: dict[tuple[str, str, int, str], list[int]] = defaultdict(list)
    for dataset, method, shots, seed in planned:
        if (dataset, method, shots, seed) not in there:
            gaps[dataset, method, seed, failures.get((dataset, method_of(method), shots, seed), "")].append(shots)
    errors = [error for *_, error in gaps]
    rows = [
        (Cell(name(dataset)), Cell(style(method).title), Cell(str(seed)), Cell(", ".join(map(str, sorted(shots)))))
        for (dataset, method, seed, _), shots in gaps.items()
    ]
    caption = f"Cells not run yet: {sum(map(len, gaps.values()))}."
    table = Table(caption, ("data set", "method", "seed", "shots"), tuple(rows))
    if not any(errors):
        return table if rows else None
    failed = sum(len(shots) for (*_, error), shots in gaps.items() if error)
    return Table(
        f"{caption} Of them {failed} failed, with the error that is shown; {NONE}: not tried.",
        (*table.header, "error"),
        tuple((*row, Cell(error or NONE)) for row, error in zip(rows, errors, strict=True)),
        prose=True,
    )


def all_planned(sweep: Record, cells: Sequence[Record]) -> list[Planned]:
    """The full grid of the sweep, a method with each combination of what is compared and it reads. A zero-shot method
    counts once a data set and series: under the seed it ran with, else 0."""
    sweep, cells = by_series(sweep, cells)
    plan: list[Planned] = []
    for dataset in sweep["datasets"]:
        shots = capped(sweep["shots"], sweep.get("most_shots", {}).get(dataset))
        for method in sweep["methods"]:
            if method_of(method) in ZERO_SHOT:
                run = [c["seed"] for c in cells if c["dataset"] == dataset and c["method"] == method]
                plan.append((dataset, method, 0, min(run, default=0)))
            else:
                plan += [(dataset, method, k, seed) for k in shots if k for seed in sweep["seeds"]]
    return plan
