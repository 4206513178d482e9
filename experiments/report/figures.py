"""The figure of a data set: accuracy over labelled examples per class, one line per series, with 95% intervals.

It does not know how cells were made: records in, a PNG and an SVG out, the same bytes for the same records. matplotlib
is used through its object API, so nothing global is left behind.

TODO What is drawn into one set of axes: a data set's accuracy over labelled examples per class, a line per series.

It does not know figures or files: scores in, lines out. Published rows that are drawn with them come from
`plot_published`.
TODO The figure of all data sets: small multiples with one legend and the same shots, each with its own accuracies.

It does not know how cells were made, and draws nothing that others published: that is in the figure of each set.
TODO Published rows in a figure: thin grey lines behind our own, and which of them an axis has room for.

It does not know what we measured beyond the range that it takes, nor which rows are worth drawing (see `references`).
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
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.report.references import ALL, Reference
from experiments.sweep.intervals import Score
from experiments.sweep.metrics import scores, seeds_of
from experiments.sweep.provenance import TOGETHER, file_stem, name
from experiments.sweep.series import from_zero, ordered, style, zero_shot_of
from kshot.errors import ResultsError
from kshot.files import write_file

# ---- Published rows in a figure: thin grey lines behind our own, and which of them an axis has room for.

COLOUR = "#8a8a8a"
LINES = ("-", "--", "-.", (0, (6, 1, 1, 1, 1, 1)))  # dots are ours
SHARE = 2  # our own range, or LEAST where it is smaller, has at least one part in so many of the axis
LEAST = 20.0  # points of accuracy
PUBLISHED_WIDTH = 100  # characters of a line below the axes

Range = tuple[float, float]  # lowest and highest, in percent


def within(rows: Sequence[Reference], own: Range, shots: Sequence[int]) -> tuple[list[Reference], list[Reference]]:
    """(rows to draw, rows that would take the place of our own curves), both in their order. A row of which these shots
    show nothing is in neither.

    own: the range of what we measured; it keeps its share of the axis. The nearest rows are taken first.
    """
    shown = [(row, values) for row in rows if (values := seen(row, shots))]
    drawn: list[Reference] = []
    bottom, top = tens(own)
    room = SHARE * max(top - bottom, LEAST)
    bounds = own
    for row, values in sorted(shown, key=lambda pair: _beyond(pair[1], own)):
        wider = min(*bounds, *values), max(*bounds, *values)
        low, high = tens(wider)
        if high - low <= room:
            drawn.append(row)
            bounds = wider
    return [row for row, _ in shown if row in drawn], [row for row, _ in shown if row not in drawn]


def seen(row: Reference, shots: Sequence[int]) -> list[float]:
    """The values of a row, in percent, that an axis from our smallest to our largest shots shows of it.

    A row over shots is a line, so where the axis ends between two of them the line is there too.
    """
    points = _points(row)
    if not points:
        return list(row.values.values())
    ours, theirs = [k for k in shots if k], [k for k, _ in points]
    low, high = max(min(ours, default=0), theirs[0]), min(max(ours, default=0), theirs[-1])
    if low > high:
        return []
    inside = sorted({low, *(k for k in theirs if low < k < high), high})
    return [float(y) for y in np.interp(np.log2(inside), np.log2(theirs), [y for _, y in points])]


def tens(*ranges: Iterable[float]) -> Range:
    """From ten to ten in percent, within 0 and 100, so that all these values are inside."""
    values = [value for each in ranges for value in each]
    return max(0, 10 * math.floor(min(values) / 10 - 0.1)), min(100, 10 * math.ceil(max(values) / 10 + 0.1))


def draw_published(axes: Axes, rows: Sequence[Reference]) -> None:
    """A curve of a row over shots; of one without training or with the full data, a horizontal line."""
    for row, line in zip(rows, cycle(LINES), strict=False):
        points = _points(row)
        if points:
            x, y = [math.log2(k) for k, _ in points], [value for _, value in points]
            axes.plot(x, y, color=COLOUR, linewidth=1, linestyle=line, marker=".", markersize=4, label=label(row))
        else:
            (level,) = row.values.values()
            axes.axhline(level, color=COLOUR, linewidth=1, linestyle=line, label=label(row), zorder=1)


def label(row: Reference) -> str:
    """What a legend calls it."""
    return f"{row.method}{', full data' if ALL in row.values else ''} (published)"


def remark(inside: Sequence[Reference], outside: Sequence[Reference], shots: Sequence[int]) -> str:
    """What a figure must say of published rows: of those that are drawn, and of those beyond its axis."""
    drawn = ["Grey: published by others, under other protocols; not measured here."] if inside else []
    texts = [f"{row.method} {_span(seen(row, shots))}" for row in outside]
    beyond = [f"Published by others under other protocols, beyond the axis: {'; '.join(texts)}."] if texts else []
    return "\n".join(textwrap.fill(sentence, PUBLISHED_WIDTH) for sentence in (*drawn, *beyond))


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} to {high}"


def _points(row: Reference) -> list[tuple[int, float]]:
    """(shots, percent) of a row that has several, in order; none of a row that is a single level."""
    points = sorted((k, value) for k, value in row.values.items() if isinstance(k, int) and k > 0)
    return points if len(points) == len(row.values) else []


def _beyond(values: Sequence[float], own: Range) -> float:
    """By how much the axis must grow to show these."""
    return max(0.0, own[0] - min(values)) + max(0.0, max(values) - own[1])


# ---- What is drawn into one set of axes: a data set's accuracy over labelled examples per class, a line per series.

Table = Mapping[str, Mapping[int, Score]]  # {series: {shots: score}}
SHIFT, SHIFTS = 0.03, 0.5  # between neighbouring series, and in all at most, of the way from one shots to its double
GREY = "#555555"
WIDTH = 1.6  # of lines, in points
GAP, BREAK = 0.5, 0.05  # how far behind 0 the axis is broken, and half of what is left out there


def panel(
    axes: Axes,
    table: Table,
    n_classes: int | None,
    *,
    shots: Sequence[int],
    chance: str,
    published: Sequence[Reference],
) -> None:
    """Draw the series of a data set, and the line of chance where `n_classes` is known, called `chance`.

    shots: the ticks. published: rows to draw in grey behind the rest, all of them within the axis
    (see `plot_published.within`).
    """
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    place = _x_axis(axes, shots)
    curves, shifts = from_zero(table), _shifts(table)
    for series in ordered(table):
        shifted = {k: x + shifts[series] for k, x in place.items()}
        _draw_series(axes, series, table[series], shifted)
        if 0 in curves[series].keys() - table[series].keys():
            start = place[0] + shifts.get(zero_shot_of(series) or "", 0.0)
            _draw_start(axes, series, curves[series], {**shifted, 0: start}, place[0] + GAP)
    if n_classes:
        axes.axhline(100 / n_classes, color=GREY, linewidth=1, dashes=(6, 3), label=chance, zorder=1)
    draw_published(axes, published)
    _y_axis(axes, own_range(table, n_classes), published, shots)


def shots_of(table: Table) -> list[int]:
    """The shots of all series, in order."""
    return sorted({k for row in table.values() for k in row})


def own_range(table: Table, n_classes: int | None) -> tuple[float, float]:
    """(lowest, highest) in percent of what is drawn of a data set: means, intervals, chance."""
    ends = [score.interval or (score.mean, score.mean) for row in table.values() for score in row.values()]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    return 100 * (min(low, 1 / n_classes) if n_classes else low), 100 * high


def _shifts(table: Mapping[str, Mapping[int, Score]]) -> dict[str, float]:
    """How far a series is moved, so that bars of those with the same accuracy stay apart by a hair's breadth."""
    untuned = [series for series in ordered(table) if max(table[series]) == 0]
    drawn = [series for series in ordered(table) if max(table[series]) > 0]
    return {
        series: min(SHIFT, SHIFTS / len(row)) * (n - (len(row) - 1) / 2)
        for row in (untuned, drawn)
        for n, series in enumerate(row)
    }


def _x_axis(axes: Axes, shots: Sequence[int]) -> dict[int, float]:
    """Ticks at the shots, log2 apart; 0 has no logarithm and sits left of the rest behind a gap. {shots: position}."""
    first = min((math.log2(k) for k in shots if k), default=0.0)
    place = {k: math.log2(k) if k else first - 1 for k in shots}
    axes.set_xticks([place[k] for k in shots], [str(k) for k in shots])
    axes.set_xlim(min(place.values()) - 0.35, max(place.values()) + 0.35)
    axes.set_xlabel("labelled examples per class (log scale)")
    if 0 in place and len(shots) > 1:
        _gap(axes, place[0] + GAP)
    return place


def _gap(axes: Axes, x: float) -> None:
    over: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False}
    axes.plot([x - BREAK, x + BREAK], [0, 0], color="white", linewidth=3, zorder=10, **over)
    slash = [(-0.6, -1.0), (0.6, 1.0)]
    axes.plot(
        [x - BREAK, x + BREAK], [0, 0], linestyle="", marker=slash, color="black", markersize=10, zorder=11, **over
    )


def _draw_series(axes: Axes, series: str, row: Mapping[int, Score], place: Mapping[int, float]) -> None:
    look = style(series)
    if 0 in row:
        axes.axhline(100 * row[0].mean, color=look.colour, linestyle=":", linewidth=1, alpha=0.6, zorder=1)
    shots = sorted(row)
    axes.errorbar(
        [place[k] for k in shots],
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
    low, high = score.interval or (math.nan, math.nan)
    return 100 * (score.mean - low), 100 * (high - score.mean)


def _draw_start(axes: Axes, series: str, row: Mapping[int, Score], place: Mapping[int, float], gap: float) -> None:
    """The line from the model untuned, whose marker is its own, to the first shots; broken where the axis is."""
    shots, look = sorted(row)[:2], style(series)
    ends = [place[k] for k in shots], [100 * row[k].mean for k in shots]
    for part in ([ends[0][0], gap - BREAK], [gap + BREAK, ends[0][1]]):
        axes.plot(part, np.interp(part, *ends), color=look.colour, linestyle=look.line, linewidth=WIDTH, zorder=1.9)


def _y_axis(axes: Axes, own: tuple[float, float], published: Sequence[Reference], shots: Sequence[int]) -> None:
    """Percent; only as much of 0..100 as there is to see, widened to tens. Intervals beyond it are cut."""
    bottom, top = tens(own, *(seen(row, shots) for row in published))
    margin = (top - bottom) / 50  # a marker at the very edge stays whole
    axes.set_ylim(bottom - margin, top + margin)


# ---- The figure of a data set: accuracy over labelled examples per class, one line per series, with 95% intervals.

SIZE = (7.2, 5.6)  # inches, with a legend of at most ROWS rows; each further one adds ROW
ROWS, ROW = 6, 0.21
TWO_COLUMNS = 42  # characters of a title, at most, for a legend of two columns
DPI = 160
RC: dict[Any, Any] = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "svg.hashsalt": "kshot",  # ids in the SVG come from the content, not from chance
    "text.parse_math": False,  # a data set may be called "$x$"
}


def figure(
    cells: Sequence[Mapping[str, Any]],
    dataset: str,
    out: Path,
    *,
    n_classes: int | None = None,
    published: Sequence[Reference] = (),
) -> list[Path]:
    """Draw one data set's cells; write `<file_stem(dataset)>.png` and `.svg` into the folder `out` (made if absent).

    `n_classes` adds the line of chance; `published` rows are drawn in grey as far as the axis that our own numbers need
    has room for them, else named below it. Raises ResultsError when no cell is of this data set.
    """
    table = scores(cells, dataset)
    if not table:
        raise ResultsError(f"no cell of data set {dataset!r} to draw")
    title = f"{name(dataset)}: {spread(table, len(seeds_of(cells, dataset)))}"
    return save(lambda: _draw(table, title, n_classes, published), out, file_stem(dataset))


def spread(table: Table, seeds: int) -> str:
    """What points and bars are."""
    over_images = any(score.over_images for row in table.values() for score in row.values())
    if seeds > 1:
        return f"mean and 95% interval over {seeds} seeds{' (single runs: over test images)' if over_images else ''}"
    return f"one seed, {'95% interval over test images' if over_images else 'no interval'}"


def save(draw: Callable[[], Figure], out: Path, stem: str) -> list[Path]:
    """Draw with settings that are always the same; write `<stem>.png` and `.svg` into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in a script that the font lacks
        mpl.rcdefaults()  # a matplotlibrc of the user's must not change the bytes
        mpl.rcParams.update(RC)
        drawn = draw()
        return [_write(drawn, out / f"{stem}.{suffix}") for suffix in ("png", "svg")]


def canvas(width: float, height: float) -> Figure:
    """An empty figure of that size in inches."""
    drawn = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawn)
    return drawn


def grid_of(titles: Sequence[str]) -> tuple[int, int]:
    """(columns, rows) of a legend of these titles."""
    columns = 2 if max(map(len, titles)) <= TWO_COLUMNS else 1
    return columns, math.ceil(len(titles) / columns)


def draw_legend(drawn: Figure, titles: Sequence[str], said: str = "") -> None:
    """A legend below all axes: what these titles are of, in their order, each once; above it what is `said`."""
    found = {t: h for axes in drawn.axes for h, t in zip(*axes.get_legend_handles_labels(), strict=True)}
    drawn.legend(
        [found[title] for title in titles],
        titles,
        loc="outside lower center",
        ncols=grid_of(titles)[0],
        frameon=False,
        fontsize=9.5,
        handlelength=3,
        title=said or None,
        title_fontsize=8.5,
    )


def _draw(table: Table, title: str, n_classes: int | None, published: Sequence[Reference] = ()) -> Figure:
    shots, chance = shots_of(table), f"chance (1/{n_classes})"
    inside, outside = within(published, own_range(table, n_classes), shots)
    named = [*(style(series).title for series in ordered(table)), *([chance] if n_classes else []), *map(label, inside)]
    said = remark(inside, outside, shots)
    # The axes stay as large however many series there are.
    drawn = canvas(SIZE[0], SIZE[1] + ROW * max(0, grid_of(named)[1] + len(said.splitlines()) - ROWS))
    axes = drawn.add_subplot()
    panel(axes, table, n_classes, shots=shots, chance=chance, published=inside)
    axes.set_ylabel("accuracy on the test images (%)")
    axes.set_title(title, loc="left", fontsize=11)
    draw_legend(drawn, named, said)
    return drawn


def _write(drawn: Figure, path: Path) -> Path:
    blank = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
    buffer = io.BytesIO()
    drawn.savefig(buffer, format=path.suffix[1:], dpi=DPI, metadata=blank)
    return write_file(path, buffer.getvalue())


# ---- The figure of all data sets: small multiples with one legend and the same shots, each with its own accuracies.

PANEL = (3.5, 3.0)  # inches
COLUMNS = 3  # at most
WRAP = 36  # characters of a panel's title
CHANCE = "chance"


def together(
    cells: Sequence[Mapping[str, Any]], datasets: Sequence[str], out: Path, n_classes: Mapping[str, int]
) -> list[Path]:
    """Draw these data sets, each of which has a cell, side by side; write `together.png` and `.svg` into `out`.

    n_classes: classes by data set; adds the line of chance where it is known.
    """
    tables = {dataset: scores(cells, dataset) for dataset in datasets}
    said = {spread(tables[dataset], len(seeds_of(cells, dataset))) for dataset in datasets}
    title = said.pop() if len(said) == 1 else "means and 95% intervals"
    return save(lambda: _draw_small(tables, title, n_classes), out, TOGETHER)


def _draw_small(tables: Mapping[str, Table], title: str, n_classes: Mapping[str, int]) -> Figure:
    series = ordered(each for table in tables.values() for each in table)
    named = [*(style(each).title for each in series), *([CHANCE] if n_classes.keys() & tables.keys() else [])]
    across = min(COLUMNS, math.ceil(math.sqrt(len(tables))))
    down = math.ceil(len(tables) / across)
    drawn = canvas(PANEL[0] * across, PANEL[1] * down + ROW * (grid_of(named)[1] + 1))
    shots = sorted({k for table in tables.values() for k in shots_of(table)})
    for place, (dataset, table) in enumerate(tables.items()):
        axes = drawn.add_subplot(down, across, place + 1)
        panel(axes, table, n_classes.get(dataset), shots=shots, chance=CHANCE, published=())
        axes.set_title(textwrap.fill(name(dataset), WRAP), loc="left", fontsize=10)
        if place + across < len(tables):  # another is below it
            axes.set_xlabel("")
    drawn.suptitle(f"All data sets: {title}", fontsize=11)
    drawn.supylabel("accuracy on the test images (%)", fontsize=10)
    draw_legend(drawn, named)
    return drawn
