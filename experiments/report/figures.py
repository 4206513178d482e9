"""The figures of a report: accuracy over labelled examples per class, a line per series, with 95% intervals.

One figure per data set, with published accuracies in grey behind our own, and one of all data sets side by side.
Cell records in, a PNG and an SVG out, the same bytes for the same records. matplotlib is used through its object API,
so nothing global is left behind.
"""

import io
import math
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report.references import ALL, Reference, references_to_draw
from experiments.sweep.intervals import Score
from experiments.sweep.metrics import scores, seeds_of
from experiments.sweep.provenance import TOGETHER, file_stem, name
from experiments.sweep.series import from_zero, ordered, style, zero_shot_of
from kshot.errors import ResultsError
from kshot.files import write_file

Scores = Mapping[str, Mapping[int, Score]]  # {series: {shots: score}}
Range = tuple[float, float]  # lowest and highest, in percent

SIZE = (7.2, 5.6)  # inches, with a legend of at most ROWS rows; each further one adds ROW
ROWS, ROW = 6, 0.21
PANEL = (3.5, 3.0)  # inches of a data set's axes among others
COLUMNS = 3  # of panels, at most
WRAP = 36  # characters of a panel's title
TWO_COLUMNS = 42  # characters of a title, at most, for a legend of two columns
CHANCE = "chance"
DPI = 160
RC: dict[Any, Any] = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "svg.hashsalt": "kshot",  # ids in the SVG come from the content, not from chance
    "text.parse_math": False,  # a data set may be called "$x$"
}


def write_dataset_figure(
    cells: Sequence[Mapping[str, Any]],
    dataset: str,
    out: Path,
    *,
    n_classes: int | None = None,
    backbones: Iterable[str] = (),
) -> list[Path]:
    """Draw one data set's cells; write `<file_stem(dataset)>.png` and `.svg` into the folder `out` (made if absent).

    `n_classes` adds the line of chance. What is published on the set, and with these `backbones`, is drawn in grey as
    far as the axis that our own numbers need has room for it, else named below it. Raises ResultsError when no cell is
    of this data set.
    """
    table = scores(cells, dataset)
    if not table:
        raise ResultsError(f"no cell of data set {dataset!r} to draw")
    title = f"{name(dataset)}: {_legend_of_intervals(table, len(seeds_of(cells, dataset)))}"
    published = references_to_draw(dataset, backbones)
    return _write(lambda: draw_dataset(table, title, n_classes, published), out, file_stem(dataset))


def write_overview_figure(
    cells: Sequence[Mapping[str, Any]], datasets: Sequence[str], out: Path, n_classes: Mapping[str, int]
) -> list[Path]:
    """Draw these data sets, each of which has a cell, side by side; write `together.png` and `.svg` into `out`.

    n_classes: classes by data set; adds the line of chance where it is known. Nothing published is drawn.
    """
    tables = {dataset: scores(cells, dataset) for dataset in datasets}
    intervals = {_legend_of_intervals(tables[dataset], len(seeds_of(cells, dataset))) for dataset in datasets}
    title = intervals.pop() if len(intervals) == 1 else "means and 95% intervals"
    return _write(lambda: draw_overview(tables, title, n_classes), out, TOGETHER)


def draw_dataset(table: Scores, title: str, n_classes: int | None, published: Sequence[Reference] = ()) -> Figure:
    """The figure of one data set."""
    shots, chance = _shots_of(table), f"{CHANCE} (1/{n_classes})"
    inside, outside = fit_to_axis(published, value_range(table, n_classes), shots)
    titles = [style(series).title for series in ordered(table)]
    titles += [*([chance] if n_classes else []), *map(legend_label, inside)]
    note = published_note(inside, outside, shots)
    # The axes stay as large however many series there are.
    rows = _legend_shape(titles)[1] + len(note.splitlines())
    figure = Figure((SIZE[0], SIZE[1] + ROW * max(0, rows - ROWS)), layout="constrained")
    axes = figure.add_subplot()
    _draw_axes(axes, table, n_classes, shots, chance, inside)
    axes.set_ylabel("accuracy on the test images (%)")
    axes.set_title(title, loc="left", fontsize=11)
    _draw_legend(figure, titles, note)
    return figure


def draw_overview(tables: Mapping[str, Scores], title: str, n_classes: Mapping[str, int]) -> Figure:
    """Small multiples with one legend and the same shots, each with its own range of accuracies."""
    titles = [style(series).title for series in ordered(series for table in tables.values() for series in table)]
    titles += [CHANCE] if n_classes.keys() & tables.keys() else []
    across = min(COLUMNS, math.ceil(math.sqrt(len(tables))))
    down = math.ceil(len(tables) / across)
    height = PANEL[1] * down + ROW * (_legend_shape(titles)[1] + 1)
    figure = Figure((PANEL[0] * across, height), layout="constrained")
    shots = sorted({k for table in tables.values() for k in _shots_of(table)})
    for n, (dataset, table) in enumerate(tables.items()):
        axes = figure.add_subplot(down, across, n + 1)
        _draw_axes(axes, table, n_classes.get(dataset), shots, CHANCE, ())
        axes.set_title(textwrap.fill(name(dataset), WRAP), loc="left", fontsize=10)
        if n + across < len(tables):  # another is below it
            axes.set_xlabel("")
    figure.suptitle(f"All data sets: {title}", fontsize=11)
    figure.supylabel("accuracy on the test images (%)", fontsize=10)
    _draw_legend(figure, titles)
    return figure


def _legend_of_intervals(table: Scores, seeds: int) -> str:
    """What points and bars are."""
    shown = [score for row in table.values() for score in row.values()]
    over_images = any(score.within for score in shown)
    if seeds == 1:
        return f"one seed, {'95% interval over test images' if over_images else 'no interval'}"
    both = any(score.within and score.n > 1 for score in shown)
    of = f"{seeds} seeds and the test images" if both else f"{seeds} seeds"
    return f"mean and 95% interval over {of}{' (single runs: over test images)' if over_images and not both else ''}"


def _shots_of(table: Scores) -> list[int]:
    """The shots of all series, in order."""
    return sorted({k for row in table.values() for k in row})


def value_range(table: Scores, n_classes: int | None) -> Range:
    """Of what is drawn of a data set: means, intervals, chance."""
    ends = [_ends(score) or (score.mean, score.mean) for row in table.values() for score in row.values()]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    return 100 * (min(low, 1 / n_classes) if n_classes else low), 100 * high


def _ends(score: Score) -> tuple[float, float] | None:
    """Of the interval of an accuracy as it is drawn: no accuracy is below 0 or above 1, where Student's t may reach."""
    return score.interval and (max(0.0, score.interval[0]), min(1.0, score.interval[1]))


def _write(draw: Callable[[], Figure], out: Path, stem: str) -> list[Path]:
    """Draw with settings that are always the same; write `<stem>.png` and `.svg` into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in a script that the font lacks
        mpl.rcdefaults()  # a matplotlibrc of the user's must not change the bytes
        mpl.rcParams.update(RC)
        figure = draw()
        paths = []
        for suffix, metadata in ("png", {"Software": None}), ("svg", {"Date": None, "Creator": None}):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix, dpi=DPI, metadata=metadata)
            paths.append(write_file(out / f"{stem}.{suffix}", buffer.getvalue()))
    return paths


def _legend_shape(titles: Sequence[str]) -> tuple[int, int]:
    """(columns, rows) of a legend of these titles."""
    columns = 2 if max(map(len, titles)) <= TWO_COLUMNS else 1
    return columns, math.ceil(len(titles) / columns)


def _draw_legend(figure: Figure, titles: Sequence[str], note: str = "") -> None:
    """A legend below all axes: what these titles are of, in their order, each once; above it the note."""
    handles = {t: h for axes in figure.axes for h, t in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        [handles[title] for title in titles],
        titles,
        loc="outside lower center",
        ncols=_legend_shape(titles)[0],
        frameon=False,
        fontsize=9.5,
        handlelength=3,
        title=note or None,
        title_fontsize=8.5,
    )


# One set of axes

SHIFT, SHIFTS = 0.03, 0.5  # between neighbouring series, and in all at most, of the way from one shots to its double
GREY = "#555555"
WIDTH = 1.6  # of lines, in points
GAP, BREAK = 0.5, 0.05  # how far behind 0 the axis is broken, and half of what is left out there


def _draw_axes(
    axes: Axes, table: Scores, n_classes: int | None, shots: Sequence[int], chance: str, published: Sequence[Reference]
) -> None:
    """Draw the series of a data set, and the line of chance where `n_classes` is known, called `chance`. shots: the
    ticks. published: rows to draw in grey behind the rest, all of them within the axis (see `fit_to_axis`)."""
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    positions = _draw_x_axis(axes, shots)
    curves, shifts = from_zero(table), series_shifts(table)
    for series in ordered(table):
        shifted = {k: x + shifts[series] for k, x in positions.items()}
        _draw_series(axes, series, table[series], shifted)
        if 0 in curves[series].keys() - table[series].keys():
            start = positions[0] + shifts.get(zero_shot_of(series) or "", 0.0)
            _draw_start(axes, series, curves[series], {**shifted, 0: start}, positions[0] + GAP)
    if n_classes:
        axes.axhline(100 / n_classes, color=GREY, linewidth=1, dashes=(6, 3), label=chance, zorder=1)
    _draw_published(axes, published)
    # As much of 0 to 100 percent as there is to see. Intervals beyond it are cut.
    bottom, top = to_tens(value_range(table, n_classes), *(visible_values(row, shots) for row in published))
    margin = (top - bottom) / 50  # a marker at the very edge stays whole
    axes.set_ylim(bottom - margin, top + margin)


def series_shifts(table: Scores) -> dict[str, float]:
    """How far a series is moved to the side, so that the bars of those with the same accuracy can be told apart."""
    untuned = [series for series in ordered(table) if max(table[series]) == 0]
    others = [series for series in ordered(table) if max(table[series]) > 0]
    return {
        series: min(SHIFT, SHIFTS / len(group)) * (n - (len(group) - 1) / 2)
        for group in (untuned, others)
        for n, series in enumerate(group)
    }


def _draw_x_axis(axes: Axes, shots: Sequence[int]) -> dict[int, float]:
    """Ticks at the shots, log2 apart; 0 has no logarithm and is left of the rest behind a gap. {shots: position}."""
    first = min((math.log2(k) for k in shots if k), default=0.0)
    positions = {k: math.log2(k) if k else first - 1 for k in shots}
    axes.set_xticks([positions[k] for k in shots], [str(k) for k in shots])
    axes.set_xlim(min(positions.values()) - 0.35, max(positions.values()) + 0.35)
    axes.set_xlabel(f"labelled examples per class{' (log scale)' if len(shots) > 1 else ''}")
    if 0 in positions and len(shots) > 1:
        x = positions[0] + GAP
        over: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        ends = [x - BREAK, x + BREAK]
        slash = [(-0.6, -1.0), (0.6, 1.0)]
        axes.plot(ends, [0, 0], color="white", linewidth=3, zorder=10, **over)
        axes.plot(ends, [0, 0], linestyle="", marker=slash, color="black", markersize=10, zorder=11, **over)
    return positions


def _draw_series(axes: Axes, series: str, row: Mapping[int, Score], positions: Mapping[int, float]) -> None:
    look = style(series)
    if 0 in row:
        axes.axhline(100 * row[0].mean, color=look.colour, linestyle=":", linewidth=1, alpha=0.6, zorder=1)
    shots = sorted(row)
    axes.errorbar(
        [positions[k] for k in shots],
        [100 * row[k].mean for k in shots],
        yerr=list(zip(*(_bar(row[k]) for k in shots), strict=True)),
        color=look.colour,
        marker=look.marker,
        markerfacecolor="white" if look.hollow else look.colour,
        linestyle=look.line,
        label=look.title,
        markersize=9 if look.marker == "*" else 6,
        linewidth=WIDTH,
        elinewidth=1,
        capsize=2.5,
    )


def _bar(score: Score) -> tuple[float, float]:
    """How far the interval reaches down and up. Without one it is NaN: not drawn, unlike a bar of length 0."""
    low, high = _ends(score) or (math.nan, math.nan)
    return 100 * (score.mean - low), 100 * (high - score.mean)


def _draw_start(axes: Axes, series: str, row: Mapping[int, Score], positions: Mapping[int, float], gap: float) -> None:
    """The line from the untuned model, which has a marker of its own, to the first shots; broken where the axis is."""
    shots, look = sorted(row)[:2], style(series)
    ends = [positions[k] for k in shots], [100 * row[k].mean for k in shots]
    for part in ([ends[0][0], gap - BREAK], [gap + BREAK, ends[0][1]]):
        axes.plot(part, np.interp(part, *ends), color=look.colour, linestyle=look.line, linewidth=WIDTH, zorder=1.9)


# Published rows: thin grey lines behind our own

COLOUR = "#8a8a8a"
LINES = ("-", "--", "-.", (0, (6, 1, 1, 1, 1, 1)))  # dots are ours
SHARE = 2  # our own range, or LEAST where it is smaller, has at least one part in so many of the axis
LEAST = 20.0  # points of accuracy
PUBLISHED_WIDTH = 100  # characters of a line below the axes


def fit_to_axis(rows: Sequence[Reference], own: Range, shots: Sequence[int]) -> tuple[list[Reference], list[Reference]]:
    """(rows to draw, rows that would take the room of our own curves), both in their order, of those of which these
    shots show something. own: the range of what we measured; it keeps its share. The nearest rows are taken first."""
    visible = [(row, values) for row in rows if (values := visible_values(row, shots))]
    inside: list[Reference] = []
    bottom, top = to_tens(own)
    room = SHARE * max(top - bottom, LEAST)
    bounds = own

    def beyond(values: Sequence[float]) -> float:
        """By how much the axis must grow to show these."""
        return max(0.0, own[0] - min(values)) + max(0.0, max(values) - own[1])

    for row, values in sorted(visible, key=lambda pair: beyond(pair[1])):
        wider = min(*bounds, *values), max(*bounds, *values)
        low, high = to_tens(wider)
        if high - low <= room:
            inside.append(row)
            bounds = wider
    return [row for row, _ in visible if row in inside], [row for row, _ in visible if row not in inside]


def visible_values(row: Reference, shots: Sequence[int]) -> list[float]:
    """The values of a row, in percent, that an axis from our smallest to our largest shots shows of it: of a line, also
    those where the axis ends."""
    points = _points(row)
    if not points:
        return list(row.values.values())
    ours, theirs = [k for k in shots if k], [k for k, _ in points]
    low, high = max(min(ours, default=0), theirs[0]), min(max(ours, default=0), theirs[-1])
    if low > high:
        return []
    inside = sorted({low, *(k for k in theirs if low < k < high), high})
    return [float(y) for y in np.interp(np.log2(inside), np.log2(theirs), [y for _, y in points])]


def to_tens(*ranges: Iterable[float]) -> Range:
    """From ten to ten in percent, within 0 and 100, so that all these values are inside."""
    values = [value for each in ranges for value in each]
    return max(0, 10 * math.floor(min(values) / 10 - 0.1)), min(100, 10 * math.ceil(max(values) / 10 + 0.1))


def legend_label(row: Reference) -> str:
    """The name of a published row in the legend."""
    return f"{row.method}{', full data' if ALL in row.values else ''} (published)"


def published_note(inside: Sequence[Reference], outside: Sequence[Reference], shots: Sequence[int]) -> str:
    """What a figure must say of published rows: of those that are drawn, and of those beyond its axis."""
    sentences = ["Grey: published by others, under other protocols; not measured here."] if inside else []
    texts = []
    for row in outside:
        values = visible_values(row, shots)
        ends = dict.fromkeys([f"{min(values):.1f}", f"{max(values):.1f}"])
        texts.append(f"{row.method} {' to '.join(ends)}")
    if texts:
        sentences.append(f"Published by others under other protocols, beyond the axis: {'; '.join(texts)}.")
    return "\n".join(textwrap.fill(sentence, PUBLISHED_WIDTH) for sentence in sentences)


def _draw_published(axes: Axes, rows: Sequence[Reference]) -> None:
    """A curve of a row over shots; of one without training or with the full data, a horizontal line."""
    for row, line in zip(rows, cycle(LINES), strict=False):
        look: dict[str, Any] = {"color": COLOUR, "linewidth": 1, "linestyle": line, "label": legend_label(row)}
        if points := _points(row):
            x, y = [math.log2(k) for k, _ in points], [value for _, value in points]
            axes.plot(x, y, marker=".", markersize=4, **look)
        else:
            (level,) = row.values.values()
            axes.axhline(level, zorder=1, **look)


def _points(row: Reference) -> list[tuple[int, float]]:
    """(shots, percent) of a row that has several, in order; none of a row that is a single level."""
    points = sorted((k, value) for k, value in row.values.items() if isinstance(k, int) and k > 0)
    return points if len(points) == len(row.values) else []
