"""Published rows in a figure: thin grey lines behind our own, and which of them an axis has room for.

It does not know what we measured beyond the range that it takes, nor which rows are worth drawing (see `references`).
"""

import math
import textwrap
from collections.abc import Iterable, Sequence
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes

from experiments.references import ALL, Reference

COLOUR = "#8a8a8a"
LINES = ("-", "--", "-.", (0, (6, 1, 1, 1, 1, 1)))  # dots are ours
SHARE = 2  # our own range, or LEAST where it is smaller, has at least one part in so many of the axis
LEAST = 20.0  # points of accuracy
WIDTH = 100  # characters of a line below the axes

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
    return "\n".join(textwrap.fill(sentence, WIDTH) for sentence in (*drawn, *beyond))


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
