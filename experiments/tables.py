"""The tables of what came out: accuracy, the other metrics, paired differences. Cell records in, tables out.

It does not know Markdown or HTML, and of the results folder only where predictions lie.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.metrics import Difference, Score, bootstrap_difference, scores
from experiments.plot import ordered, style
from experiments.report_blocks import Cell, Table

Record = Mapping[str, Any]
NONE = "\N{EN DASH}"

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
    """`45.2 ± 3.1`, or `45.2` where there is no interval."""
    return _number(score, 100, 1)


def accuracy_table(cells: Sequence[Record], dataset: str) -> Table:
    """Accuracy by method and shots; a mean over fewer seeds than others have says over how many."""
    table = scores(cells, dataset)
    shots = sorted({k for row in table.values() for k in row})
    most = max(score.n for row in table.values() for score in row.values())
    columns = [_best({m: row[k].mean for m, row in table.items() if k in row}, more=True) for k in shots]
    rows = [
        (Cell(style(m).title), *(_field(table[m], k, m in best, most) for k, best in zip(shots, columns, strict=True)))
        for m in ordered(table)
    ]
    caption = "Accuracy in percent by labelled examples per class: mean ± half-width of the 95% Student-t interval"
    return Table(f"{caption} over seeds; the best of a column is bold.", ("method", *map(str, shots)), tuple(rows))


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


def differences_table(folder: Path, cells: Sequence[Record], dataset: str) -> Table | None:
    """The leader at the largest shots against the others: paired bootstrap over test images, on the first common seed.

    None when fewer than two methods have predictions in the folder. Raises ResultsError when their images differ.
    """
    largest = largest_shots(cells, dataset)
    runs: dict[str, dict[int, Path]] = defaultdict(dict)
    for cell in cells:
        path = folder / "predictions" / f"{cell['key']}.parquet"
        if cell["dataset"] == dataset and cell["shots"] == largest and path.exists():
            runs[cell["method"]][cell["seed"]] = path
    if len(runs) < 2:
        return None
    means = {m: row[largest].mean for m, row in scores(cells, dataset).items() if m in runs}
    leader = max(ordered(means), key=means.__getitem__)
    rows = [_difference_row(m, runs[leader], runs[m]) for m in ordered(runs) if m != leader]
    caption = (
        f"{style(leader).title} minus each other method at {largest} labelled examples per class, in points of "
        "accuracy: paired bootstrap over the test images of one seed, not corrected for the number of comparisons."
    )
    return Table(caption, ("method", "seed", "difference", "95% interval", "p"), tuple(rows))


def largest_shots(cells: Sequence[Record], dataset: str) -> int:
    """The most labelled examples per class that any cell of the data set had."""
    return max(cell["shots"] for cell in cells if cell["dataset"] == dataset)


def _field(row: Mapping[int, Score], shots: int, best: bool, most: int) -> Cell:
    if shots not in row:
        return Cell(NONE)
    few = f" (n={row[shots].n})" if shots and row[shots].n < most else ""
    return Cell(percent(row[shots]) + few, best)


def _metric_field(metric: str, score: Score | None, best: bool) -> Cell:
    _, factor, decimals, _ = METRICS[metric]
    return Cell(NONE) if score is None else Cell(_number(score, factor, decimals), best)


def _number(score: Score, factor: int, decimals: int) -> str:
    mean = f"{factor * score.mean:.{decimals}f}"
    return mean if score.half_width is None else f"{mean} ± {factor * score.half_width:.{decimals}f}"


def _best(means: Mapping[str, float], *, more: bool) -> set[str]:
    """The methods at the top (ties included); nobody when there is nothing to tell apart."""
    if len(set(means.values())) < 2:
        return set()
    top = max(means.values()) if more else min(means.values())
    return {method for method, mean in means.items() if mean == top}


def _difference_row(method: str, leader: Mapping[int, Path], other: Mapping[int, Path]) -> tuple[Cell, ...]:
    common = sorted(leader.keys() & other.keys())
    if not common:
        return (Cell(style(method).title), *[Cell(NONE)] * 4)
    found = _difference(leader[common[0]], other[common[0]])
    interval = f"{100 * found.low:+.1f} to {100 * found.high:+.1f}"
    p = f"{found.p:.3f}" if found.p >= 0.001 else "<0.001"
    texts = (style(method).title, str(common[0]), f"{100 * found.difference:+.1f}", interval, p)
    return tuple(map(Cell, texts))


def _difference(path_a: Path, path_b: Path) -> Difference:
    from pyarrow import parquet

    columns = ["key", "label", "prediction"]
    table_a, table_b = (parquet.read_table(path, columns=columns) for path in (path_a, path_b))
    return bootstrap_difference(table_a, table_b, seed=0)
