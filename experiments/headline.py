"""The sentence of a report that says what came out for a data set, and how sure that is. Cell records in, text out."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.display import name
from experiments.intervals import Score
from experiments.metrics import scores, seeds_of
from experiments.series import choices_of, method_of
from experiments.styles import COUNTED, ordered, style
from experiments.tables import Record, percent

NAMED = 3  # how many methods a sentence names before it counts


def headline(cells: Sequence[Record], dataset: str) -> str:
    """One sentence: what was compared, what was best at the smallest and the largest shots, and how sure that is.

    The methods of the cells may be series (see `by_series`).
    """
    table = scores(cells, dataset)
    methods = {method_of(m) for m in table}
    shots = sorted({k for row in table.values() for k in row if k})
    under = ", ".join([_count(len(seeds_of(cells, dataset)), "seed"), *_compared(table)])
    opening = f"{_count(len(methods), 'method')} {'was' if len(methods) == 1 else 'were'} compared on {name(dataset)}"
    blind = [f"{style(m).title} reaches {_share(table[m][0])}" for m in ordered(table) if 0 in table[m]]
    without = [f"with no example at all, {_and(blind)}"] if blind else []
    ends = [f"at {k} per class, {_lead(table, k)}" for k in dict.fromkeys([*shots[:1], *shots[-1:]])]
    span = f"{shots[0]} to {shots[-1]}" if len(shots) > 1 else "".join(map(str, shots[:1])) or "no"
    examples = "example" if shots == [1] else "examples"
    return f"{opening} with {span} labelled {examples} per class ({under}): {'; '.join(ends + without)}."


def _compared(table: Iterable[str]) -> list[str]:
    """How many values of each setting are compared: `2 prompts`."""
    found: dict[str, set[Any]] = defaultdict(set)
    for choice in (choice for series in table for choice in choices_of(series)):
        found[choice.setting].add(choice.value)
    return [_count(len(values), COUNTED.get(setting, setting)) for setting, values in found.items()]


def _lead(table: Mapping[str, Mapping[int, Score]], shots: int) -> str:
    column = {method: table[method][shots] for method in ordered(table) if shots in table[method]}
    top = max(score.mean for score in column.values())
    leaders = [method for method, score in column.items() if score.mean == top]
    if len(column) == 1:
        return f"{style(leaders[0]).title} reaches {_share(column[leaders[0]])}"
    names = _and([style(method).title for method in leaders])
    best = f"{names} {'is' if len(leaders) == 1 else 'are'} best with {_share(column[leaders[0]])}"
    rivals = [method for method in column if method not in leaders]
    return f"{best}{_hedge(column, leaders, rivals)}" if rivals else best


def _hedge(column: Mapping[str, Score], leaders: Sequence[str], rivals: Sequence[str]) -> str:
    if column[leaders[0]].half_width is None:
        return " (one seed, so without an interval over seeds)"
    near = [style(m).title for m in rivals if any(_overlap(column[leader], column[m]) for leader in leaders)]
    if not near:
        return ", with a 95% interval above all others"
    more = [f"{len(near) - NAMED} more"] if len(near) > NAMED else []
    that = "that" if len(near) == 1 else "those"
    return f", but the 95% interval overlaps with {that} of {_and(near[:NAMED] + more)}"


def _overlap(best: Score, other: Score) -> bool:
    (low, _), (_, high) = (score.interval or (score.mean, score.mean) for score in (best, other))
    return low <= high


def _share(score: Score) -> str:
    score = score._replace(over_images=None)  # brackets would have to be explained
    return f"{percent(score)} %".replace(" ", "\N{NO-BREAK SPACE}")


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
