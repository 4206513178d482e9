"""What is drawn into one set of axes: a data set's accuracy over labelled examples per class, a line per series.

It does not know figures or files: scores in, lines out. Published rows that are drawn with them come from
`plot_published`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from experiments.intervals import Score
from experiments.plot_published import draw_published, seen, tens
from experiments.references import Reference
from experiments.series import from_zero, zero_shot_of
from experiments.styles import ordered, style

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
