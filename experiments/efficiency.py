"""Data efficiency: how many labelled examples a class a method needs to reach an accuracy.

It does not know records or predictions: mean accuracies by shots in, a table out. Shots are what was measured; between
two that were, a curve is taken to be straight in log2(shots), as the figure draws it. Nothing is extrapolated.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.metrics import scores
from experiments.report_blocks import Cell, Table
from experiments.series import from_zero, main_pairs
from experiments.styles import ordered, style
from experiments.tables import NONE

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
