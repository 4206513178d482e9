"""Data efficiency: how many labelled examples a class a method needs to reach an accuracy.

It does not know records or predictions: mean accuracies by shots in, a table out. Shots are what was measured; between
two that were, a curve is taken to be straight in log2(shots), as the figure draws it. Nothing is extrapolated.

TODO The tables of paired differences, and the stored predictions that they need.

Cell records and a results folder in, tables out; where the folder has no predictions, as committed results, there are
none. It does not know Markdown or HTML.
TODO What is taken for what: the most frequent confusions, and images of the worst of them.

Cell records, a results folder and a way to get images in, blocks out; where the folder has no predictions there are
none. It does not know Markdown or HTML, nor where images come from.
"""

import io
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data.preparation import decode
from experiments.report.blocks import Block, Cell, Gallery, Photo, Table
from experiments.report.tables import NONE, Record, largest_shots
from experiments.sweep.intervals import bootstrap_difference
from experiments.sweep.metrics import Confusion, confusions, scores
from experiments.sweep.series import from_zero, main_pairs, ordered, style
from kshot.errors import ResultsError

if TYPE_CHECKING:
    import pyarrow as pa

# ---- Data efficiency: how many labelled examples a class a method needs to reach an accuracy.

Curve = Mapping[int, float]  # {shots: mean accuracy}, a fraction
MOST = 5  # targets
CLOSE = 1e-9  # a mean that is a target but for rounding reaches it
STEPS = (10, 20, 5, 2, 1)  # percent between targets: the first that gives as many as are wanted


class Needed(NamedTuple):
    """measured: the least shots of those measured at which a target is reached; shots: where the curve crosses it.

    at_most: nothing smaller was measured from which to draw the curve, so fewer may do.
    """

    measured: int
    shots: float
    at_most: bool = False


def needed(curve: Curve, target: float) -> Needed | None:
    """What a method needs to reach `target` (a fraction), by its mean accuracies; None where it never does.

    The first crossing, if the curve falls again. 0 shots have no logarithm: from there on the curve is not drawn.
    """
    below: int | None = None
    for shots in sorted(curve):
        if curve[shots] >= target - CLOSE:
            return Needed(shots, *_crossing(curve, below, shots, target))
        below = shots
    return None


def targets(curves: Sequence[Curve]) -> list[int]:
    """Accuracies in percent, at most MOST, in order: the multiples of a step from the lowest mean with any labelled
    example to the highest.

    The step is 10, more where that gives too many, less where it gives fewer than two.
    """
    means = [mean for curve in curves for shots, mean in curve.items() if shots]
    found = [_multiples(step, min(means), max(means)) for step in STEPS]
    return next((each for each in found if 2 <= len(each) <= MOST), found[0][-MOST:])


def efficiency_table(cells: Sequence[Mapping[str, Any]], dataset: str) -> Table | None:
    """The shots that each method needs of a data set; None where no method learns or nothing is reached."""
    means = {s: {k: score.mean for k, score in row.items()} for s, row in from_zero(scores(cells, dataset)).items()}
    curves = {series: means[series] for series in ordered(means) if max(means[series]) > 0}
    wanted = targets([*curves.values()]) if curves else []
    if not wanted:
        return None
    found = {series: [needed(curve, target / 100) for target in wanted] for series, curve in curves.items()}
    pairs = main_pairs(curves)
    rows = [(Cell(style(series).title), *(Cell(_said(each)) for each in row)) for series, row in found.items()]
    rows += [(Cell(_title(a, b)), *map(_ratio, found[a], found[b])) for a, b in pairs]
    caption = (
        "Labelled examples per class needed for a mean accuracy: the least of those measured that reaches it, and in "
        "brackets where a line that is straight in log2 of the examples, between the two measured points around it, "
        f"crosses it. ≤: none fewer was measured to draw that line from. {NONE}: not reached."
    )
    if pairs:
        caption += " The ratio is of the numbers in brackets: below 1, the first method needs fewer."
    return Table(caption, ("method", *(f"{target} %" for target in wanted)), tuple(rows))


def _crossing(curve: Curve, below: int | None, shots: int, target: float) -> tuple[float, bool]:
    """(where the curve crosses the target, whether that is only known as at most)."""
    if curve[shots] <= target + CLOSE or shots <= 1:
        return float(shots), False
    if not below:
        return float(shots), True
    share = (target - curve[below]) / (curve[shots] - curve[below])
    return min(float(shots), below * (shots / below) ** share), False


def _multiples(step: int, low: float, high: float) -> list[int]:
    """The multiples of a step in percent from `low` to `high`; 0 is none."""
    first, last = math.ceil(100 * (low - CLOSE) / step), math.floor(100 * (high + CLOSE) / step)
    return [step * n for n in range(max(1, first), last + 1)]


def _said(each: Needed | None) -> str:
    if each is None:
        return NONE
    if each.at_most:
        return f"≤ {each.measured}"
    return f"{each.measured}" if each.shots == each.measured else f"{each.measured} ({each.shots:.1f})"


def _title(a: str, b: str) -> str:
    return f"ratio of {style(a).title} to {style(b).title}"


def _ratio(a: Needed | None, b: Needed | None) -> Cell:
    """Of shots, where both have some; a bound where one of them is."""
    if a is None or b is None or not a.shots or not b.shots or (a.at_most and b.at_most):
        return Cell(NONE)
    bound = "≤ " if a.at_most else "≥ " if b.at_most else ""
    return Cell(f"{bound}{a.shots / b.shots:.2f}")


# ---- The tables of paired differences, and the stored predictions that they need.

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


# ---- What is taken for what: the most frequent confusions, and images of the worst of them.

WORST = 10  # confusions shown of a method
PICTURED = 4  # of them with images
PICTURES = 3  # confused test images of each
SIDE = 96  # pixels of an image's longest side

Pictures = Callable[[str, str], bytes | None]  # (data set, key of a test image) -> the encoded image
Training = Callable[[str, int], bytes | None]  # (data set, label) -> an encoded training image of that class


class Album(NamedTuple):
    """Where images of a data set come from, None for one that cannot be had. training: to see beside the others an
    image of the class that was answered; None where there are none of them."""

    pictures: Pictures
    training: Training | None = None


def confusion_blocks(
    folder: Path, cells: Sequence[Record], dataset: str, classes: Sequence[str], album: Album | None = None
) -> Iterator[Block]:
    """The most frequent confusions at the largest shots, summed over seeds: of the best series, and of the best that
    answers in text; a table each, and images of the worst where there is an album. Nothing of a series without
    predictions in the folder or without a confusion.

    classes: the names, by label. Raises ResultsError where a prediction is none of them, ImageError for a picture that
    is no image.
    """
    import pyarrow as pa

    shots = largest_shots(cells, dataset)
    runs = runs_of(folder, cells, dataset, shots)
    texts = scores(cells, dataset, "accuracy_constrained")
    groups = runs, {series: row for series, row in runs.items() if series in texts}
    for series in dict.fromkeys(best_of(cells, dataset, shots, group) for group in groups if group):
        every = pa.concat_tables(runs[series].values())
        found = confusions(every, WORST)
        if found:
            yield _table(series, shots, len(runs[series]), found, classes)
        if album:
            for confusion in found[:PICTURED]:
                yield from _gallery(style(series).title, confusion, every, dataset, classes, album)


def _table(series: str, shots: int, seeds: int, found: Sequence[Confusion], classes: Sequence[str]) -> Table:
    caption = (
        f"{style(series).title} at k = {shots}: the most frequent confusions, in test images "
        f"over {'one seed' if seeds == 1 else f'{seeds} seeds'} and in percent of the images of the class."
    )
    rows = tuple(_row(confusion, classes) for confusion in found)
    return Table(caption, ("class", "taken for", "images", "% of the class"), rows)


def _row(confusion: Confusion, classes: Sequence[str]) -> tuple[Cell, ...]:
    label, prediction, images, share = confusion
    if not 0 <= min(label, prediction) <= max(label, prediction) < len(classes):
        raise ResultsError(f"predictions hold class {max(label, prediction)}, but there are {len(classes)} class names")
    return tuple(map(Cell, (classes[label], classes[prediction], str(images), f"{100 * share:.1f}")))


def _gallery(
    title: str, confusion: Confusion, every: "pa.Table", dataset: str, classes: Sequence[str], album: Album
) -> Iterator[Gallery]:
    """The confused test images that can be had, and after them one to compare with; nothing where there are none."""
    label, prediction = classes[confusion.label], classes[confusion.prediction]
    images = [(key, album.pictures(dataset, key)) for key in _keys(confusion, every)]
    taken = f"test image of {label}, taken for {prediction}"
    photos = [Photo(_thumbnail(image, key), taken, "test") for key, image in images if image is not None]
    if photos and album.training and (image := album.training(dataset, confusion.prediction)) is not None:
        shown = f"training image of {prediction}"
        photos.append(Photo(_thumbnail(image, prediction), shown, shown))
    if photos:
        yield Gallery(f"{title}: {label} taken for {prediction}", tuple(photos))


def _keys(confusion: Confusion, every: "pa.Table") -> list[str]:
    """The test images so confused, those first that most seeds confuse, then by key: PICTURES at most."""
    columns = (every[name].to_pylist() for name in ("key", "label", "prediction"))
    wanted = (confusion.label, confusion.prediction)
    counts = Counter(key for key, *pair in zip(*columns, strict=True) if tuple(pair) == wanted)
    return sorted(counts, key=lambda key: (-counts[key], key))[:PICTURES]


def _thumbnail(image: bytes, what: str) -> bytes:
    """A small JPEG without whatever the original says about itself."""
    small, buffer = decode(image, max_side=SIDE, name=f"image {what[:12]}"), io.BytesIO()
    small.info.clear()
    small.save(buffer, "JPEG")
    return buffer.getvalue()
