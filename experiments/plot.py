"""The figure of a sweep: accuracy over labelled examples per class, one line per series, with 95% intervals.

It does not know how cells were made: records in, a PNG and an SVG out, the same bytes for the same records. matplotlib
is used through its object API, so nothing global is left behind.
"""

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.display import file_stem, name
from experiments.intervals import Score
from experiments.metrics import scores, seeds_of
from experiments.series import from_zero, zero_shot_of
from experiments.styles import ordered, style
from kshot_errors import ResultsError
from kshot_files import write_file

SIZE = (7.2, 5.6)  # inches, with a legend of at most ROWS rows; each further one adds ROW
ROWS, ROW = 6, 0.21
TWO_COLUMNS = 42  # characters of a title, at most, for a legend of two columns
SHIFT, SHIFTS = 0.03, 0.5  # between neighbouring series, and in all at most, of the way from one shots to its double
DPI = 160
GREY = "#555555"
WIDTH = 1.6  # of lines, in points
GAP, BREAK = 0.5, 0.05  # how far behind 0 the axis is broken, and half of what is left out there
RC: dict[Any, Any] = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "svg.hashsalt": "kshot",  # ids in the SVG come from the content, not from chance
    "text.parse_math": False,  # a data set may be called "$x$"
}


def figure(cells: Sequence[Mapping[str, Any]], dataset: str, out: Path, *, n_classes: int | None = None) -> list[Path]:
    """Draw one data set's cells; write `<file_stem(dataset)>.png` and `.svg` into the folder `out` (made if absent).

    `n_classes` adds the line of chance. Raises ResultsError when no cell is of this data set.
    """
    table = scores(cells, dataset)
    if not table:
        raise ResultsError(f"no cell of data set {dataset!r} to draw")
    out.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in a script that the font lacks
        mpl.rcdefaults()  # a matplotlibrc of the user's must not change the bytes
        mpl.rcParams.update(RC)
        drawn = _draw(table, f"{name(dataset)}: {_spread(table, len(seeds_of(cells, dataset)))}", n_classes)
        return [_save(drawn, out / f"{file_stem(dataset)}.{suffix}") for suffix in ("png", "svg")]


def _spread(table: dict[str, dict[int, Score]], seeds: int) -> str:
    over_images = any(score.over_images for row in table.values() for score in row.values())
    if seeds > 1:
        return f"mean and 95% interval over {seeds} seeds{' (single runs: over test images)' if over_images else ''}"
    return f"one seed, {'95% interval over test images' if over_images else 'no interval'}"


def _draw(table: dict[str, dict[int, Score]], title: str, n_classes: int | None) -> Figure:
    columns, height = _legend(table, n_classes)
    drawn = Figure(figsize=(SIZE[0], height), layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.add_subplot()
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    place = _x_axis(axes, sorted({k for row in table.values() for k in row}))
    curves, shifts = from_zero(table), _shifts(table)
    for series in ordered(table):
        shifted = {k: x + shifts[series] for k, x in place.items()}
        _draw_series(axes, series, table[series], shifted)
        if 0 in curves[series].keys() - table[series].keys():
            start = place[0] + shifts.get(zero_shot_of(series) or "", 0.0)
            _draw_start(axes, series, curves[series], {**shifted, 0: start}, place[0] + GAP)
    if n_classes:
        axes.axhline(100 / n_classes, color=GREY, linewidth=1, dashes=(6, 3), label=f"chance (1/{n_classes})", zorder=1)
    _y_axis(axes, table, n_classes)
    axes.set_title(title, loc="left", fontsize=11)
    drawn.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9.5, handlelength=3)
    return drawn


def _legend(table: Mapping[str, object], n_classes: int | None) -> tuple[int, float]:
    """(columns of the legend, height of the figure in inches): the axes stay as large however many series there are."""
    columns = 2 if max(len(style(series).title) for series in table) <= TWO_COLUMNS else 1
    rows = math.ceil((len(table) + (1 if n_classes else 0)) / columns)
    return columns, SIZE[1] + ROW * max(0, rows - ROWS)


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


def _draw_series(axes: Axes, series: str, row: dict[int, Score], place: dict[int, float]) -> None:
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


def _y_axis(axes: Axes, table: dict[str, dict[int, Score]], n_classes: int | None) -> None:
    """Percent; only as much of 0..100 as there is to see, widened to tens. Intervals beyond it are cut."""
    ends = [score.interval or (score.mean, score.mean) for row in table.values() for score in row.values()]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    low = min(low, 1 / n_classes) if n_classes else low
    bottom = max(0, 10 * math.floor(10 * low - 0.1))
    top = min(100, 10 * math.ceil(10 * high + 0.1))
    margin = (top - bottom) / 50  # a marker at the very edge stays whole
    axes.set_ylim(bottom - margin, top + margin)
    axes.set_ylabel("accuracy on the test images (%)")


def _save(drawn: Figure, path: Path) -> Path:
    blank = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
    buffer = io.BytesIO()
    drawn.savefig(buffer, format=path.suffix[1:], dpi=DPI, metadata=blank)
    return write_file(path, buffer.getvalue())
