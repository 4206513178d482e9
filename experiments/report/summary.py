"""The first paragraph on a data set: short sentences that say no more than the paired tests do."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.report.comparisons import lead_over
from experiments.report.tables import Record, percent
from experiments.sweep.intervals import Difference, Score
from experiments.sweep.metrics import scores, seeds_of
from experiments.sweep.provenance import name
from experiments.sweep.series import COUNTED, choices_of, main_pairs, method_of, ordered, style

NAMED = 3  # how many methods a sentence names before it counts
SURE = 0.05  # below this p, a difference is called one


def headline(folder: Path, cells: Sequence[Record], dataset: str) -> str:
    """What was compared; what is best at the smallest and the largest shots, and whether the paired bootstrap tells it
    from the others; how the two tuned models differ; the model untuned. Where the folder has no predictions, nothing is
    said of differences. Raises ResultsError when the images of methods differ."""
    table = scores(cells, dataset)
    shots = sorted({k for row in table.values() for k in row if k})
    sentences = [_compared_sentence(cells, dataset, table, shots)]
    ends = dict.fromkeys([*shots[:1], *shots[-1:]])
    sentences += [_best_sentence(folder, cells, dataset, table, k) for k in ends]
    sentences += _pair_sentences(folder, cells, dataset, table, shots)
    untuned = [f"{style(m).title} reaches {_share(table[m][0])}" for m in ordered(table) if 0 in table[m]]
    if untuned:
        sentences.append(f"With no example at all, {_and(untuned)}")
    return " ".join(f"{sentence}." for sentence in sentences)


def _compared_sentence(cells: Sequence[Record], dataset: str, table: Mapping[str, Any], shots: Sequence[int]) -> str:
    methods = {method_of(series) for series in table}
    under = ", ".join([_count(len(seeds_of(cells, dataset)), "seed"), *_compared(table)])
    span = f"{shots[0]} to {shots[-1]}" if len(shots) > 1 else "".join(map(str, shots)) or "no"
    examples = "example" if shots == [1] else "examples"
    compared = f"{_count(len(methods), 'method')} {'was' if len(methods) == 1 else 'were'} compared on {name(dataset)}"
    return f"{compared} with {span} labelled {examples} per class ({under})"


def _compared(table: Iterable[str]) -> list[str]:
    """How many values of each setting are compared: `2 prompts`."""
    values: dict[str, set[Any]] = defaultdict(set)
    for choice in (choice for series in table for choice in choices_of(series) if not choice.idle):
        values[choice.setting].add(choice.value)
    return [_count(len(each), COUNTED.get(setting, setting)) for setting, each in values.items()]


def _best_sentence(
    folder: Path, cells: Sequence[Record], dataset: str, table: Mapping[str, Mapping[int, Score]], shots: int
) -> str:
    column = {method: table[method][shots] for method in ordered(table) if shots in table[method]}
    top = max(score.mean for score in column.values())
    leaders = [method for method, score in column.items() if score.mean == top]
    names, share = _and([style(method).title for method in leaders]), _share(column[leaders[0]])
    if len(column) == 1:
        return f"At {shots} per class, {names} reaches {share}"
    best = f"At {shots} per class, {names} {'is' if len(leaders) == 1 else 'are'} best with {share}"
    if len(leaders) > 1:
        return best
    tests = lead_over(folder, cells, dataset, shots, leaders[0])
    apart = [method for method in column if method not in {*tests, *leaders}] if tests else []
    return f"{best}{_certainty(tests)}" if not apart else f"{best}; there is no paired test with {_titles(apart)}"


def _certainty(tests: Mapping[str, Difference]) -> str:
    """tests: the leader's lead over others, as far as there are predictions; over the seeds that both have, which may
    be fewer than those of the means."""
    if not tests:
        return ""
    if behind := [series for series, test in tests.items() if test.p < SURE and test.difference <= 0]:
        return f", but on the seeds that both have {_titles(behind)} {'is' if len(behind) == 1 else 'are'} ahead"
    open_ = [series for series, test in tests.items() if test.p >= SURE]
    if not open_:
        least = min(tests.values(), key=lambda test: test.difference)
        highest = max(test.p for test in tests.values())
        by = f"by {100 * least.difference:.1f} points or more"
        return f", ahead of {'the other' if len(tests) == 1 else 'all others'} {by} (paired test, {_p(highest)})"
    lowest = min(tests[series].p for series in open_)
    return f"; the paired test does not tell it from {_titles(open_)} (p ≥ {lowest:.2f})"


def _titles(series: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    names = [style(each).title for each in series]
    return _and(names[:NAMED] + ([f"{len(names) - NAMED} more"] if len(names) > NAMED else []))


def _pair_sentences(
    folder: Path, cells: Sequence[Record], dataset: str, table: Mapping[str, Any], shots: Sequence[int]
) -> Iterator[str]:
    """The two tuned models against each other at the largest shots, where a sweep has one of each."""
    pairs = main_pairs(table)
    if len(pairs) != 1 or not shots:
        return
    (first, second), k = pairs[0], shots[-1]
    test = lead_over(folder, cells, dataset, k, first).get(second)
    if test is None:
        return
    if test.p >= SURE:
        yield f"The two tuned models are not told apart at {k} (p = {test.p:.2f})"
        return
    ahead, behind = (first, second) if test.difference > 0 else (second, first)
    lead = f"{100 * abs(test.difference):.1f} points ahead of {style(behind).title} at {k} ({_p(test.p)})"
    yield f"Of the two tuned models, {style(ahead).title} is {lead}"


def _p(p: float) -> str:
    return f"p ≤ {p:.3f}" if p >= 0.001 else "p < 0.001"


def _share(score: Score) -> str:
    score = score._replace(within=None, half_width=None)  # brackets would have to be explained
    return f"{percent(score)} %".replace(" ", "\N{NO-BREAK SPACE}")


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
