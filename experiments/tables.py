"""The tables of what came out: accuracy, answers in text, the other metrics. Cell records in, tables out.

It does not know Markdown or HTML, nor a results folder.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.intervals import Score
from experiments.metrics import scores
from experiments.report_blocks import Cell, Table
from experiments.series import from_zero, method_of, zero_shot_of
from experiments.styles import ordered, style

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
