"""How long a sweep takes: measured rates of this machine times what there is to do, shared out over its workers.

Drawing the report is not in it. Image features are taken for unknown: where an earlier sweep has left them in the
cache, it takes less.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import heapreplace
from statistics import mean
from typing import Any

from experiments import executors
from experiments.estimate_counts import backbone_images, images, work
from experiments.estimate_features import Turns, seen_in_cell, turns
from experiments.estimate_parts import Part, Todo
from experiments.estimate_probe import Asked, Rates, Seen, own_folder, probe
from experiments.estimate_tokens import Lengths

NAME = 8  # tokens of an answer, where no tokenizer says


@dataclass(frozen=True)
class Measured:
    """What the workers saw, on average. start: seconds until one begins. data, prepared, mirrored: by source, see Seen.

    rates: (source, variant) → rates. peak: bytes that a worker took at most. spent: seconds of the measurement.
    """

    start: float
    data: Mapping[str, float]
    prepared: Mapping[str, float]
    mirrored: Mapping[str, float]
    rates: Mapping[tuple[str, tuple[Any, ...]], Rates]
    peak: int
    spent: float


@dataclass(frozen=True)
class Spent:
    """Seconds of a sweep, by what a user waits for: total is their sum. methods: of one worker, by method."""

    start: float
    prepare: float
    encode: float
    cells: float
    methods: Mapping[str, float]

    @property
    def total(self) -> float:
        return self.start + self.prepare + self.encode + self.cells


def measure(
    todo: Todo,
    workers: int,
    lengths: Mapping[tuple[str, str], Lengths] | None = None,
    *,
    threads: int = 1,
    gpus: Sequence[str] = (),
) -> Measured:
    """Every method that is planned, tried in as many workers at once as the sweep will have: two busy cores are slower
    than one. Raises what loading a model raises, as InputError or KshotError."""
    asked = [_asked(todo, source, lengths) for source in todo.sets]
    sent, start = time.time(), time.perf_counter()
    with own_folder() as folder:
        answers = executors.local(partial(probe, folder), [asked] * workers, workers, threads=threads, gpus=gpus)
        seen = [answer for _, answer in executors.results(answers)]
    return _averaged(asked, seen, sent, time.perf_counter() - start)


def spent(todo: Todo, measured: Measured, workers: int) -> Spent:
    """Of the whole sweep on this many workers."""
    when = turns(todo)
    seconds = [_cell(part, todo, measured, when) for part in todo.parts]
    methods: dict[str, float] = {}
    for part, each in zip(todo.parts, seconds, strict=True):
        methods[part.method] = methods.get(part.method, 0.0) + each
    loads = sum(_loads(measured))
    data = [measured.data[source] + each for source, each in _preparation(todo, measured).items()]
    encode = sum(_encoding(todo, measured, when, workers)) / workers
    return Spent(measured.start + loads, sum(data), encode, makespan(seconds, workers), methods)


def makespan(seconds: Sequence[float], workers: int) -> float:
    """When the last of these jobs ends if each, in this order, is taken by the first worker that is free."""
    free = [0.0] * workers
    for each in seconds:
        heapreplace(free, free[0] + each)
    return max(free)


def _asked(todo: Todo, source: str, lengths: Mapping[tuple[str, str], Lengths] | None) -> Asked:
    parts = [part for part in todo.parts if part.source == source]
    variants = {part.variant: part for part in parts}
    shots = tuple(sorted({part.shots for part in parts if part.row.learns})) or (1,)
    answers = [length.answer for (of, _), length in (lengths or {}).items() if of == source]
    answer = round(max(answers, default=NAME))
    access = todo.sets[source].access
    return Asked(source, access, tuple(variants.values()), shots, todo.service, todo.device, answer)


def _averaged(asked: Sequence[Asked], seen: Sequence[Sequence[Seen]], sent: float, spent: float) -> Measured:
    def by_source(field: Callable[[Seen], float]) -> dict[str, float]:
        return {one.source: mean(field(each[n]) for each in seen) for n, one in enumerate(asked)}

    rates = {
        (one.source, variant): _mean_rates([each[n].rates[variant] for each in seen])
        for n, one in enumerate(asked)
        for variant in seen[0][n].rates
    }
    start = mean(each[0].began - sent for each in seen)
    peak = max(one.peak for each in seen for one in each)
    parts = (by_source(lambda one: one.data), by_source(lambda one: one.prepared), by_source(lambda one: one.mirrored))
    return Measured(start, *parts, rates, peak, spent)


def _mean_rates(rates: Sequence[Rates]) -> Rates:
    return Rates(*(mean(getattr(each, name) for each in rates) for name in Rates.__dataclass_fields__))


def _cell(part: Part, todo: Todo, measured: Measured, when: Turns) -> float:
    known, rates = todo.sets[part.source], measured.rates[part.source, part.variant]
    does, again = work(part, known), part.looks and part.source in when.cell
    trained = does.steps * rates.step + does.fitted * rates.fit * (not part.trains)
    encoded = seen_in_cell(part, known) * rates.encoded if again else 0.0
    return rates.fixed + trained + encoded + does.scored * rates.scored + does.answered * rates.answered


def _loads(measured: Measured) -> Iterator[float]:
    """Of each method once a worker: a later data set finds its models loaded."""
    first: dict[Any, float] = {}
    for (_, variant), rates in measured.rates.items():
        first.setdefault(variant, rates.load)
    yield from first.values()


def _preparation(todo: Todo, measured: Measured) -> dict[str, float]:
    """Every worker prepares the images of its cells, which are soon those of all."""
    found = {}
    for source, each in images(todo.parts, todo).items():
        found[source] = each.test * measured.prepared[source] + each.train * measured.mirrored[source]
    return found


def _encoding(todo: Todo, measured: Measured, when: Turns, workers: int) -> Iterator[float]:
    """Seconds of the towers and frozen backbones: each image once for all workers, or once for each of them where it is
    not encoded ahead; what every cell encodes anew is counted there."""
    looking = todo.where(lambda part: part.looks and part.source in (*when.once, *when.worker))
    for source, each in images(looking, todo).items():
        rates = [measured.rates[source, part.variant].encoded for part in looking if part.source == source]
        times = 1 if source in when.once else min(workers, len(rates))
        yield times * (each.shown + each.test) * max(rates)
    for part, each in backbone_images(todo):
        yield (each.train + each.test) * measured.rates[part.source, part.variant].encoded
