"""The tables of paired differences, and the stored predictions that they need.

Cell records and a results folder in, tables out; where the folder has no predictions, as committed results, there are
none. It does not know Markdown or HTML.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.intervals import bootstrap_difference
from experiments.metrics import scores
from experiments.report_blocks import Cell, Table
from experiments.series import main_pairs
from experiments.styles import ordered, style
from experiments.tables import NONE, Record

if TYPE_CHECKING:
    import pyarrow as pa

Runs = Mapping[str, Mapping[int, "pa.Table"]]  # {series: {seed: predictions}}


def differences_table(folder: Path, cells: Sequence[Record], dataset: str) -> Table | None:
    """At the smallest and the largest shots, the best series against each other: paired bootstrap over test images of
    the mean over all seeds they have in common.

    None when fewer than two series have predictions in the folder. Raises ResultsError when their images differ.
    """
    leaders: dict[int, str] = {}
    rows: list[tuple[Cell, ...]] = []
    for shots in _ends(cells, dataset):
        runs = runs_of(folder, cells, dataset, shots)
        if len(runs) > 1:
            leaders[shots] = leader = best_of(cells, dataset, shots, runs)
            rows += [_difference_row(m, shots, runs[leader], runs[m]) for m in ordered(runs) if m != leader]
    if not rows:
        return None
    caption = (
        f"The best method at k labelled examples per class ({_named(leaders)}) minus each other, in points of "
        "accuracy: paired bootstrap over test images of the mean over the seeds that both have. The seeds are taken as "
        "they are; not corrected for the number of comparisons."
    )
    return Table(caption, ("method", "k", "seeds", "difference", "95% interval", "p"), tuple(rows))


def main_differences_table(folder: Path, cells: Sequence[Record], dataset: str) -> Table | None:
    """The two methods that the comparison is about against each other, at every shots at which both have predictions;
    of the same test as `differences_table`. None where there are none. Raises as that does.
    """
    pairs = main_pairs(ordered(cell["method"] for cell in cells))
    rows: list[tuple[Cell, ...]] = []
    for shots in sorted({cell["shots"] for cell in cells if cell["dataset"] == dataset}) if pairs else ():
        runs = runs_of(folder, cells, dataset, shots)
        rows += [
            (Cell(f"{style(a).title} minus {style(b).title}"), *_difference_row(b, shots, runs[a], runs[b])[1:])
            for a, b in pairs
            if a in runs and b in runs
        ]
    if not rows:
        return None
    caption = (
        "The two tuned models against each other at every k, in points of accuracy: the same paired bootstrap over "
        "test images. One test a row; the rows are not corrected for their number."
    )
    return Table(caption, ("methods", "k", "seeds", "difference", "95% interval", "p"), tuple(rows))


def _ends(cells: Sequence[Record], dataset: str) -> list[int]:
    """The smallest and the largest shots; 0 only where there is nothing else."""
    shots = {cell["shots"] for cell in cells if cell["dataset"] == dataset}
    drawn = sorted(shots - {0} or shots)
    return list(dict.fromkeys([drawn[0], drawn[-1]]))


def runs_of(folder: Path, cells: Sequence[Record], dataset: str, shots: int) -> Runs:
    """The predictions that are there, of the data set at these shots."""
    from pyarrow import parquet

    runs: dict[str, dict[int, pa.Table]] = defaultdict(dict)
    for cell in cells:
        path = folder / "predictions" / f"{cell['key']}.parquet"
        if cell["dataset"] == dataset and cell["shots"] == shots and path.exists():
            runs[cell["method"]][cell["seed"]] = parquet.read_table(path, columns=["key", "label", "prediction"])
    return dict(runs)


def best_of(cells: Sequence[Record], dataset: str, shots: int, among: Mapping[str, object]) -> str:
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
