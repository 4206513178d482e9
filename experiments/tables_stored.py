"""The tables that need stored predictions: paired differences, and what is taken for what.

Cell records and a results folder in, tables out; where the folder has no predictions, as committed results, there are
none. It does not know Markdown or HTML.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.intervals import bootstrap_difference
from experiments.metrics import Confusion, confusions, scores
from experiments.report_blocks import Cell, Table
from experiments.styles import ordered, style
from experiments.tables import NONE, Record, largest_shots
from kshot_errors import ResultsError

if TYPE_CHECKING:
    import pyarrow as pa

WORST = 10  # confusions shown of a method

Runs = Mapping[str, Mapping[int, "pa.Table"]]  # {series: {seed: predictions}}


def differences_table(folder: Path, cells: Sequence[Record], dataset: str) -> Table | None:
    """At the smallest and the largest shots, the best series against each other: paired bootstrap over test images of
    the mean over all seeds they have in common.

    None when fewer than two series have predictions in the folder. Raises ResultsError when their images differ.
    """
    leaders: dict[int, str] = {}
    rows: list[tuple[Cell, ...]] = []
    for shots in _ends(cells, dataset):
        runs = _runs(folder, cells, dataset, shots)
        if len(runs) > 1:
            leaders[shots] = leader = _best(cells, dataset, shots, runs)
            rows += [_difference_row(m, shots, runs[leader], runs[m]) for m in ordered(runs) if m != leader]
    if not rows:
        return None
    caption = (
        f"The best method at k labelled examples per class ({_named(leaders)}) minus each other, in points of "
        "accuracy: paired bootstrap over test images of the mean over the seeds that both have. The seeds are taken as "
        "they are; not corrected for the number of comparisons."
    )
    return Table(caption, ("method", "k", "seeds", "difference", "95% interval", "p"), tuple(rows))


def confusion_tables(folder: Path, cells: Sequence[Record], dataset: str, classes: Sequence[str]) -> list[Table]:
    """The most frequent confusions at the largest shots, summed over seeds: of the best series, and of the best that
    answers in text. None of a series without predictions in the folder or without a confusion.

    classes: the names, by label. Raises ResultsError where a prediction is none of them.
    """
    shots = largest_shots(cells, dataset)
    runs = _runs(folder, cells, dataset, shots)
    texts = scores(cells, dataset, "accuracy_constrained")
    groups = runs, {series: row for series, row in runs.items() if series in texts}
    best = dict.fromkeys(_best(cells, dataset, shots, group) for group in groups if group)
    tables = (_confusion_table(series, shots, runs[series], classes) for series in best)
    return [table for table in tables if table]


def _ends(cells: Sequence[Record], dataset: str) -> list[int]:
    """The smallest and the largest shots; 0 only where there is nothing else."""
    shots = {cell["shots"] for cell in cells if cell["dataset"] == dataset}
    drawn = sorted(shots - {0} or shots)
    return list(dict.fromkeys([drawn[0], drawn[-1]]))


def _runs(folder: Path, cells: Sequence[Record], dataset: str, shots: int) -> Runs:
    """The predictions that are there."""
    from pyarrow import parquet

    runs: dict[str, dict[int, pa.Table]] = defaultdict(dict)
    for cell in cells:
        path = folder / "predictions" / f"{cell['key']}.parquet"
        if cell["dataset"] == dataset and cell["shots"] == shots and path.exists():
            runs[cell["method"]][cell["seed"]] = parquet.read_table(path, columns=["key", "label", "prediction"])
    return dict(runs)


def _best(cells: Sequence[Record], dataset: str, shots: int, among: Mapping[str, object]) -> str:
    """The series of the highest mean accuracy; of several, the first in order."""
    means = {series: row[shots].mean for series, row in scores(cells, dataset).items() if series in among}
    return max(ordered(means), key=means.__getitem__)


def _named(leaders: Mapping[int, str]) -> str:
    titles = {shots: style(series).title for shots, series in leaders.items()}
    if len(set(titles.values())) == 1:
        return next(iter(titles.values()))
    return ", ".join(f"{title} at {shots}" for shots, title in titles.items())


def _difference_row(
    series: str, shots: int, leader: Mapping[int, "pa.Table"], other: Mapping[int, "pa.Table"]
) -> tuple[Cell, ...]:
    common = sorted(leader.keys() & other.keys())
    if not common:
        return Cell(style(series).title), Cell(str(shots)), Cell("0"), *[Cell(NONE)] * 3
    found = bootstrap_difference([leader[s] for s in common], [other[s] for s in common], seed=0)
    interval = f"{100 * found.low:+.1f} to {100 * found.high:+.1f}"
    p = f"{found.p:.3f}" if found.p >= 0.001 else "<0.001"
    texts = (style(series).title, str(shots), str(len(common)), f"{100 * found.difference:+.1f}", interval, p)
    return tuple(map(Cell, texts))


def _confusion_table(series: str, shots: int, runs: Mapping[int, "pa.Table"], classes: Sequence[str]) -> Table | None:
    import pyarrow as pa

    found = confusions(pa.concat_tables(runs.values()), WORST)
    if not found:
        return None
    seeds = "one seed" if len(runs) == 1 else f"{len(runs)} seeds"
    caption = (
        f"{style(series).title} at k = {shots}: the most frequent confusions, in test images "
        f"over {seeds} and in percent of the images of the class."
    )
    rows = tuple(_confusion_row(confusion, classes) for confusion in found)
    return Table(caption, ("class", "taken for", "images", "% of the class"), rows)


def _confusion_row(confusion: Confusion, classes: Sequence[str]) -> tuple[Cell, ...]:
    label, prediction, images, share = confusion
    if not 0 <= min(label, prediction) <= max(label, prediction) < len(classes):
        raise ResultsError(f"predictions hold class {max(label, prediction)}, but there are {len(classes)} class names")
    return tuple(map(Cell, (classes[label], classes[prediction], str(images), f"{100 * share:.1f}")))
