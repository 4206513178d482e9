"""Comparisons of methods: examples needed for an accuracy, paired differences, and the most frequent confusions.

Paired differences and confusions need the stored predictions of the results folder; where they are missing, as in
committed results, these parts are missing.
"""

import io
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from data.preparation import decode
from experiments.report.document import Block, Gallery, Photo, Table
from experiments.report.tables import NONE, Record, largest_shots
from experiments.sweep.intervals import Difference, bootstrap_difference
from experiments.sweep.metrics import Confusion, confusions, scores
from experiments.sweep.provenance import name
from experiments.sweep.series import by_series, from_zero, frozen_heads, main_pairs, ordered, style
from kshot.errors import ResultsError

if TYPE_CHECKING:
    import pyarrow as pa

# Examples needed

Curve = Mapping[int, float]  # {shots: mean accuracy}, a fraction
MOST_TARGETS = 5
TOLERANCE = 1e-9  # a mean that is a target but for rounding reaches it
STEPS = (10, 20, 5, 2, 1)  # percent between targets: the first that gives from two to MOST_TARGETS


class ShotsNeeded(NamedTuple):
    """measured: the least shots of those measured at which a target is reached; shots: where the curve crosses it;
    at_most: nothing smaller was measured from which to draw the curve, so fewer may do."""

    measured: int
    shots: float
    at_most: bool = False

    def __str__(self) -> str:
        if self.at_most:
            return f"≤ {self.measured}"
        return f"{self.measured}" if self.shots == self.measured else f"{self.measured} ({self.shots:.1f})"


def efficiency_table(cells: Sequence[Record], dataset: str) -> Table | None:
    """The shots that each method needs of a data set; None where no method learns or nothing is reached. Between two
    measured shots a curve is taken to be straight in log2(shots), as the figure draws it; nothing is extrapolated."""
    means = {s: {k: score.mean for k, score in row.items()} for s, row in from_zero(scores(cells, dataset)).items()}
    curves = {series: means[series] for series in ordered(means) if max(means[series]) > 0}
    targets = target_accuracies([*curves.values()]) if curves else []
    if not targets:
        return None
    needed = {series: [shots_needed(curve, target / 100) for target in targets] for series, curve in curves.items()}
    pairs = main_pairs(curves)
    rows = [(style(series).title, *(str(each or NONE) for each in row)) for series, row in needed.items()]
    rows += [(f"ratio of {style(a).title} to {style(b).title}", *map(_ratio, needed[a], needed[b])) for a, b in pairs]
    caption = (
        "Labelled examples per class needed for a mean accuracy: the least of those measured that reaches it, and in "
        "brackets where a line that is straight in log2 of the examples, between the two measured points around it, "
        f"crosses it. ≤: none fewer was measured to draw that line from. {NONE}: not reached."
    )
    if pairs:
        caption += " The ratio is of the numbers in brackets: below 1, the first method needs fewer."
    return Table(caption, ("method", *(f"{target} %" for target in targets)), tuple(rows))


def shots_needed(curve: Curve, target: float) -> ShotsNeeded | None:
    """The shots at which a curve first reaches `target` (a fraction); None where it never does. 0 shots have no
    logarithm: from there on the curve is not drawn."""
    shots = next((k for k in sorted(curve) if curve[k] >= target - TOLERANCE), None)
    if shots is None:
        return None
    if curve[shots] <= target + TOLERANCE or shots <= 1:
        return ShotsNeeded(shots, float(shots))
    below = max((k for k in curve if k < shots), default=0)
    if not below:
        return ShotsNeeded(shots, float(shots), at_most=True)
    share = (target - curve[below]) / (curve[shots] - curve[below])
    return ShotsNeeded(shots, min(float(shots), below * (shots / below) ** share))


def target_accuracies(curves: Sequence[Curve]) -> list[int]:
    """Accuracies in percent, at most MOST_TARGETS, in order: the multiples of a step (10; more where that gives too
    many, less where fewer than two) from the lowest mean with any labelled example to the highest."""
    means = [mean for curve in curves for shots, mean in curve.items() if shots]
    low, high = 100 * (min(means) - TOLERANCE), 100 * (max(means) + TOLERANCE)
    choices = [[step * n for n in range(max(1, math.ceil(low / step)), math.floor(high / step) + 1)] for step in STEPS]
    return next((each for each in choices if 2 <= len(each) <= MOST_TARGETS), choices[0][-MOST_TARGETS:])


def _ratio(a: ShotsNeeded | None, b: ShotsNeeded | None) -> str:
    """Of shots, where both have some; a bound where one of them is."""
    if a is None or b is None or not a.shots or not b.shots or (a.at_most and b.at_most):
        return NONE
    bound = "≤ " if a.at_most else "≥ " if b.at_most else ""
    return f"{bound}{a.shots / b.shots:.2f}"


# Paired differences

Runs = Mapping[int, "pa.Table"]  # {seed: predictions}


DIFFERENCE = ("k", "seeds", "difference", "95% interval", "p")  # columns


def difference_tables(folder: Path, cells: Sequence[Record], dataset: str) -> Iterator[Table]:
    """Paired bootstraps over test images of the mean over the seeds that two series have in common: at the smallest and
    the largest shots, the best series against each other; and at every shots, the two methods that the comparison is
    about. Of series that have predictions in the folder. Raises ResultsError when their images differ.
    """
    shots = sorted({cell["shots"] for cell in cells if cell["dataset"] == dataset})
    drawn, pairs = [k for k in shots if k] or shots, main_pairs(ordered(cell["method"] for cell in cells))
    leaders: dict[int, str] = {}
    rows: list[tuple[str, ...]] = []
    main: list[tuple[str, ...]] = []
    for k in shots if pairs else dict.fromkeys([drawn[0], drawn[-1]]):
        runs = _stored_runs(folder, cells, dataset, k)
        if k in (drawn[0], drawn[-1]) and len(runs) > 1:
            leaders[k] = leader = _best_series(cells, dataset, k, runs)
            rows += [(style(m).title, *_difference(k, runs[leader], runs[m])) for m in ordered(runs) if m != leader]
        compared = [(a, b) for a, b in pairs if a in runs and b in runs]
        main += [(f"{style(a).title} minus {style(b).title}", *_difference(k, runs[a], runs[b])) for a, b in compared]
    titles = [style(leader).title for leader in leaders.values()]
    one = len(set(titles)) == 1
    leading = titles[:1] if one else [f"{title} at {k}" for title, k in zip(titles, leaders, strict=True)]
    caption = (
        f"The best method at k labelled examples per class ({', '.join(leading)}) minus each other, in points of "
        "accuracy: paired bootstrap over test images of the mean over the seeds that both have. The seeds are taken as "
        "they are; not corrected for the number of comparisons."
    )
    if rows:
        yield Table(caption, ("method", *DIFFERENCE), tuple(rows))
    caption = (
        "The two tuned models against each other at every k, in points of accuracy: the same paired bootstrap over "
        "test images. One test a row; the rows are not corrected for their number."
    )
    if main:
        yield Table(caption, ("methods", *DIFFERENCE), tuple(main))


def lead_over(folder: Path, cells: Sequence[Record], dataset: str, shots: int, series: str) -> dict[str, Difference]:
    """{other series: the lead of `series` over it} at these shots: the paired bootstrap over test images of the mean
    over common seeds; of series that have predictions in the folder, nothing where this one has none. Raises
    ResultsError when their images differ."""
    runs = _stored_runs(folder, cells, dataset, shots)
    if series not in runs:
        return {}
    tests = {other: _paired(runs[series], runs[other]) for other in ordered(runs) if other != series}
    return {other: test for other, test in tests.items() if test is not None}


def _stored_runs(folder: Path, cells: Sequence[Record], dataset: str, shots: int) -> dict[str, Runs]:
    """{series: its runs} of the data set at these shots, as far as the folder has their predictions."""
    from pyarrow import parquet

    runs: dict[str, dict[int, pa.Table]] = defaultdict(dict)
    for cell in cells:
        path = folder / "predictions" / f"{cell['key']}.parquet"
        if cell["dataset"] == dataset and cell["shots"] == shots and path.exists():
            runs[cell["method"]][cell["seed"]] = parquet.read_table(path, columns=["key", "label", "prediction"])
    return dict(runs)


def _best_series(cells: Sequence[Record], dataset: str, shots: int, among: Mapping[str, object]) -> str:
    """The series of the highest mean accuracy; of several, the first in order."""
    means = {series: row[shots].mean for series, row in scores(cells, dataset).items() if series in among}
    return max(ordered(means), key=means.__getitem__)


def _difference(shots: int, a: Runs, b: Runs) -> tuple[str, ...]:
    """Shots, number of common seeds, a minus b, its interval, p."""
    test = _paired(a, b)
    if test is None:
        return str(shots), "0", NONE, NONE, NONE
    interval = f"{100 * test.low:+.1f} to {100 * test.high:+.1f}"
    return str(shots), str(len(a.keys() & b.keys())), f"{100 * test.difference:+.1f}", interval, _p(test)


def _paired(a: Runs, b: Runs) -> Difference | None:
    """a minus b over their common seeds; None where they have none."""
    common = sorted(a.keys() & b.keys())
    return bootstrap_difference([a[s] for s in common], [b[s] for s in common], seed=0) if common else None


def _p(test: Difference) -> str:
    return f"{test.p:.3f}" if test.p >= 0.001 else "<0.001"


# Training that fell behind

BEHIND, SURE = 0.2, 0.01  # from this difference in accuracy on, and below this p, a report speaks of it
MIRRORED = (
    "training showed mirrored images (hflip {:g}), which may be of another class here, as arrows and letters are; if "
    "so, run it again with --set hflip=0 and another --out"
)
UNMIRRORED = "its training may need another learning_rate or more views_per_class (--set)"


def training_notes(folder: Path, sweep: Record, cells: Sequence[Record]) -> Iterator[str]:
    """A sentence for each data set and trained series that is behind a head on the same model frozen: by BEHIND, with
    p < SURE in the paired bootstrap. It names the head and the shots where the difference is largest, and a way out.
    Of series that have predictions in the folder. Raises ResultsError when their images differ."""
    sweep, cells = by_series(sweep, cells)
    for dataset in sweep["datasets"]:
        here = [cell for cell in cells if cell["dataset"] == dataset]
        runs = {k: _stored_runs(folder, here, dataset, k) for k in sorted({cell["shots"] for cell in here}) if k}
        for trained in ordered(cell["method"] for cell in here):
            pairs = [(k, head) for k in runs if trained in runs[k] for head in frozen_heads(trained, ordered(runs[k]))]
            tests = [(_paired(runs[k][head], runs[k][trained]), k, head) for k, head in pairs]
            behind = [(t.difference, _p(t), k, head) for t, k, head in tests if t and t.p < SURE]
            difference, p, k, head = max(behind, key=lambda each: each[0], default=(0.0, "", 0, ""))
            if difference > BEHIND - TOLERANCE:
                hflip = max(cell["settings"].get("hflip") or 0 for cell in here if cell["method"] == trained)
                who = f"{name(dataset)}, k = {k}: {style(trained).title} is {100 * difference:.1f} points of accuracy"
                than = f"behind {style(head).title}, which leaves the same model frozen (p {p})"
                yield f"{who} {than}: {MIRRORED.format(hflip) if hflip else UNMIRRORED}."


# Confusions

MOST_CONFUSIONS = 10  # shown of a method
WITH_IMAGES = 4  # of them, the most frequent
IMAGES = 3  # confused test images of each
SIDE = 96  # pixels of an image's longest side


class ImageSources(NamedTuple):
    """Where the encoded images of data sets come from, None for one that cannot be had. test: (data set, key) → a test
    image. training: (data set, label) → an image of that class, shown beside test images that were taken for it."""

    test: Callable[[str, str], bytes | None]
    training: Callable[[str, int], bytes | None]


def confusion_blocks(
    folder: Path, cells: Sequence[Record], dataset: str, classes: Sequence[str], images: ImageSources | None = None
) -> Iterator[Block]:
    """The most frequent confusions at the largest shots, summed over seeds: of the best series, and of the best that
    answers in text; a table each, and images of the worst where there are `images`. Nothing of a series without
    predictions in the folder or without a confusion.

    classes: the names, by label. Raises ResultsError where a prediction is none of them, ImageError for an image that
    cannot be decoded.
    """
    import pyarrow as pa

    shots = largest_shots(cells, dataset)
    runs = _stored_runs(folder, cells, dataset, shots)
    texts = scores(cells, dataset, "accuracy_constrained")
    groups = runs, {series: row for series, row in runs.items() if series in texts}
    for series in dict.fromkeys(_best_series(cells, dataset, shots, group) for group in groups if group):
        predictions = pa.concat_tables(runs[series].values())
        most = confusions(predictions, MOST_CONFUSIONS)
        if most:
            seeds = "one seed" if len(runs[series]) == 1 else f"{len(runs[series])} seeds"
            caption = (
                f"{style(series).title} at k = {shots}: the most frequent confusions, in test images over {seeds} and "
                "in percent of the images of the class."
            )
            rows = tuple(_confusion_row(confusion, classes) for confusion in most)
            yield Table(caption, ("class", "taken for", "images", "% of the class"), rows)
        for confusion in most[:WITH_IMAGES]:
            label, prediction = classes[confusion.label], classes[confusion.prediction]
            if images and (photos := _photos(confusion, predictions, dataset, classes, images)):
                yield Gallery(f"{style(series).title}: {label} taken for {prediction}", tuple(photos))


def _confusion_row(confusion: Confusion, classes: Sequence[str]) -> tuple[str, ...]:
    label, prediction, images, share = confusion
    if not 0 <= min(label, prediction) <= max(label, prediction) < len(classes):
        raise ResultsError(f"predictions hold class {max(label, prediction)}, but there are {len(classes)} class names")
    return classes[label], classes[prediction], str(images), f"{100 * share:.1f}"


def _photos(
    confusion: Confusion, predictions: "pa.Table", dataset: str, classes: Sequence[str], images: ImageSources
) -> list[Photo]:
    """The confused test images that can be had, IMAGES at most, and after them one to compare with; those first that
    most seeds confuse, then by key."""
    columns = (predictions[name].to_pylist() for name in ("key", "label", "prediction"))
    counts = Counter(key for key, *pair in zip(*columns, strict=True) if tuple(pair) == confusion[:2])
    keys = sorted(counts, key=lambda key: (-counts[key], key))[:IMAGES]
    label, prediction = classes[confusion.label], classes[confusion.prediction]
    alt = f"test image of {label}, taken for {prediction}"
    test = [(key, images.test(dataset, key)) for key in keys]
    photos = [Photo(_thumbnail(image, key), alt, "test") for key, image in test if image is not None]
    if photos and (image := images.training(dataset, confusion.prediction)) is not None:
        alt = f"training image of {prediction}"
        photos.append(Photo(_thumbnail(image, prediction), alt, alt))
    return photos


def _thumbnail(image: bytes, what: str) -> bytes:
    """A small JPEG without the metadata of the original."""
    small, buffer = decode(image, max_side=SIDE, name=f"image {what[:12]}"), io.BytesIO()
    small.info.clear()
    small.save(buffer, "JPEG")
    return buffer.getvalue()
