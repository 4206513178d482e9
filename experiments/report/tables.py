"""The tables of what came out: accuracy, answers in text, the other metrics. Cell records in, tables out.

It does not know Markdown or HTML, nor a results folder.

TODO The tables of what it cost: seconds of a cell, and all of the sweep by method. Cell records in, tables out.
TODO The tables of what was run: data sets, prompts, and the cells still missing.

Cell records and sweep.json in, tables out; it does not know what the numbers mean, nor Markdown or HTML.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from experiments.report.blocks import Cell, Table
from experiments.sweep.config import capped
from experiments.sweep.intervals import Score
from experiments.sweep.methods import METHODS
from experiments.sweep.metrics import scores, seeds_of
from experiments.sweep.provenance import name
from experiments.sweep.series import by_series, from_zero, method_of, ordered, style, zero_shot_of

# ---- The tables of what came out: accuracy, answers in text, the other metrics. Cell records in, tables out.

Record = Mapping[str, Any]
Scores = Mapping[str, Mapping[int, Score]]  # {series: {shots: score}}
NONE = "\N{EN DASH}"
TEXT = ("accuracy_constrained", "accuracy_strict", "unparseable")  # the metrics of answers in text

# metric: (header, factor, decimals, whether more is better)
METRICS = {
    "accuracy": ("accuracy %", 100, 1, True),
    "accuracy_constrained": ("constrained %", 100, 1, True),
    "accuracy_strict": ("strict %", 100, 1, True),
    "top5": ("top-5 %", 100, 1, True),
    "mean_per_class": ("mean per class %", 100, 1, True),
    "nll": ("NLL, nats", 1, 2, False),
    "ece": ("ECE %", 100, 1, False),
    "unparseable": ("unparseable %", 100, 1, False),
}


def percent(score: Score) -> str:
    """`45.2 ± 3.1` over seeds, `4.6 [3.1, 6.6]` over test images, or `45.2` where there is no interval."""
    if score.over_images is None:
        return _number(score, 100, 1)
    low, high = score.over_images
    return f"{100 * score.mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def accuracy_table(cells: Sequence[Record], dataset: str) -> Table:
    """Accuracy by method and shots; a mean over fewer seeds than others have says over how many."""
    measured = scores(cells, dataset)
    table = from_zero(measured)
    shots = sorted({k for row in table.values() for k in row})
    shown = [score for row in table.values() for score in row.values()]
    most = max(score.n for score in shown)
    columns = [_best({m: row[k].mean for m, row in table.items() if k in row}, more=True) for k in shots]
    rows = [
        (Cell(style(m).title), *(_field(table[m], k, m in best, most) for k, best in zip(shots, columns, strict=True)))
        for m in ordered(table)
    ]
    caption = f"Accuracy in percent by labelled examples per class: {_intervals(shown)}; the best of a column is bold."
    return Table(caption + _untuned(measured, table), ("method", *map(str, shots)), tuple(rows))


def text_table(cells: Sequence[Record], dataset: str) -> Table | None:
    """What the methods that answer in text wrote, at every shots; None where there is no such method.

    A zero-shot method that another one tunes has its row there, at 0.
    """
    measured = {metric: scores(cells, dataset, metric) for metric in TEXT}
    found = {metric: from_zero(table) for metric, table in measured.items()}
    constrained = found["accuracy_constrained"]
    tuned = {zero_shot_of(series) for series in constrained}
    rows = [
        (Cell(style(series).title), Cell(str(k)), *(_percent(found[metric].get(series, {}).get(k)) for metric in TEXT))
        for series in ordered(constrained)
        if series not in tuned
        for k in sorted(constrained[series])
    ]
    if not rows:
        return None
    shown = [score for table in measured.values() for row in table.values() for score in row.values()]
    calibrated = any(cell["settings"].get("calibration", "none") != "none" for cell in cells)
    limits = {cell["settings"]["answer_tokens"] for cell in cells if "answer_tokens" in cell["settings"]}
    limit = f", of at most {' or '.join(map(str, sorted(limits)))} tokens," if limits else ","
    caption = (
        f"Answers in text, in percent, by labelled examples per class (k): {_intervals(shown)}. Constrained: the model "
        f"restricted to the class names, by its exact posterior{' as calibrated' if calibrated else ''}, ties to the "
        f"lower label. Strict: the model's greedy free answer{limit} is the class name, after its last colon (the rule "
        "of the official recipe). Unparseable: the free answers that name no class."
    )
    caption += _untuned(measured["accuracy_constrained"], constrained)
    return Table(caption, ("method", "k", *(METRICS[metric][0] for metric in TEXT)), tuple(rows))


def metrics_table(cells: Sequence[Record], dataset: str) -> Table:
    """Every metric that has a value, at the largest shots, and of the zero-shot methods at 0."""
    largest = largest_shots(cells, dataset)
    last = [cell for cell in cells if cell["dataset"] == dataset and cell["shots"] in (0, largest)]
    found = {metric: {m: max(row.items())[1] for m, row in scores(last, dataset, metric).items()} for metric in METRICS}
    columns = {metric: column for metric, column in found.items() if column}
    best = {
        metric: _best({m: score.mean for m, score in column.items()}, more=METRICS[metric][3])
        for metric, column in columns.items()
    }
    rows = [
        (
            Cell(style(method).title),
            *(_metric_field(metric, column.get(method), method in best[metric]) for metric, column in columns.items()),
        )
        for method in ordered(cell["method"] for cell in last)
    ]
    caption = (
        f"All metrics at {largest} labelled examples per class (zero-shot: at none); the best of a column is bold."
    )
    return Table(
        f"{caption} {NONE}: no meaning or no value.",
        ("method", *(METRICS[metric][0] for metric in columns)),
        tuple(rows),
    )


def largest_shots(cells: Sequence[Record], dataset: str) -> int:
    """The most labelled examples per class that any cell of the data set had."""
    return max(cell["shots"] for cell in cells if cell["dataset"] == dataset)


def _field(row: Mapping[int, Score], shots: int, best: bool, most: int) -> Cell:
    if shots not in row:
        return Cell(NONE)
    few = f" (n={row[shots].n})" if shots and row[shots].n < most else ""
    return Cell(percent(row[shots]) + few, best)


def _percent(score: Score | None) -> Cell:
    return Cell(NONE if score is None else percent(score))


def _metric_field(metric: str, score: Score | None, best: bool) -> Cell:
    _, factor, decimals, _ = METRICS[metric]
    return Cell(NONE) if score is None else Cell(_number(score, factor, decimals), best)


def _intervals(shown: Sequence[Score]) -> str:
    """What a number of the table is, for its caption; of each kind of interval only where one is shown."""
    over_images = any(score.over_images for score in shown)
    over_seeds = any(score.half_width is not None for score in shown) or not over_images
    said = {
        "mean ± half-width of the 95% Student-t interval over seeds": over_seeds,
        "where there is a single run, in brackets the 95% Wilson score interval over test images": over_images,
    }
    return "; ".join(text for text, shows in said.items() if shows)


def _untuned(measured: Scores, table: Scores) -> str:
    """Which methods begin at 0 with the value of another, for a caption."""
    begun = {
        style(method_of(series)).title: style(method_of(untuned)).title
        for series in ordered(table)
        if 0 in table[series].keys() - measured[series].keys() and (untuned := zero_shot_of(series))
    }
    return "".join(f" {title} at 0 is {untuned}: the model before it is tuned." for title, untuned in begun.items())


def _number(score: Score, factor: int, decimals: int) -> str:
    mean = f"{factor * score.mean:.{decimals}f}"
    return mean if score.half_width is None else f"{mean} ± {factor * score.half_width:.{decimals}f}"


def _best(means: Mapping[str, float], *, more: bool) -> set[str]:
    """The methods at the top (ties included); nobody when there is nothing to tell apart."""
    if len(set(means.values())) < 2:
        return set()
    top = max(means.values()) if more else min(means.values())
    return {method for method, mean in means.items() if mean == top}


# ---- The tables of what it cost: seconds of a cell, and all of the sweep by method. Cell records in, tables out.

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


# ---- The tables of what was run: data sets, prompts, and the cells still missing.

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
