"""How long a sweep takes: measured rates of this machine times what there is to do, shared out over its workers.

Drawing the report is not in it. Image features are taken for unknown: where an earlier sweep has left them in the
cache, it takes less.

TODO A short measurement in a worker: what each method takes to load, a step, an image. Knows no sweep and no totals.

A method is run as a cell runs it, on a few images; what a second run on the same images takes less is what loading or
encoding took. Features go to a folder of the measurement's own, so that none is known from before.
"""

import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from heapq import heapreplace
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

from data import catalog
from data.dataset import Access, Dataset, Example, Images
from data.preparation import prepare_all
from experiments.sweep import workers as executors
from experiments.sweep.cells import predictions
from experiments.sweep.encoding import EncodingSchedule, encoding_schedule, seen_in_cell
from experiments.sweep.methods import METHODS, Outcome, Task
from experiments.sweep.metrics import metrics
from experiments.sweep.run import few_shot
from experiments.sweep.workload import CellSpec, Lengths, Workload, backbone_images, images, work
from kshot.files import TEMPORARY, cache_folder, remove_stale

# ---- A short measurement in a worker: what each method takes to load, a step, an image. Knows no sweep and no

SECONDS = 1.0  # that one run should take, about
FEW, SOME, MANY = 2, 8, 192  # test images of a run
STEPS = 24  # of a run, at most
LONG = 10.0  # seconds of a run after which no longer one is tried
PROBE = "probe"  # in the names of folders


@dataclass(frozen=True)
class ProbeRequest:
    """What one worker measures of one data set: the parts, one of each variant. sent: when (seconds of the clock)."""

    source: str
    access: Access
    parts: tuple[CellSpec, ...]
    shots: tuple[int, ...]
    service: str
    device: str
    answer: int  # tokens of the answer of a model that has learnt to answer


@dataclass(frozen=True)
class Rates:
    """Seconds. load: once a worker. fixed: of a cell, whatever it does. step: of the optimizer. fit: a training image
    of a head. scored, answered: a test image. encoded: an image through the tower or a frozen backbone."""

    load: float = 0.0
    fixed: float = 0.0
    step: float = 0.0
    fit: float = 0.0
    scored: float = 0.0
    answered: float = 0.0
    encoded: float = 0.0


@dataclass(frozen=True)
class ProbeResult:
    """What a worker saw of a data set. began: seconds of the clock. data: seconds to load the set. prepared, mirrored:
    seconds an image, without and with its twin. peak: bytes that the process has had at most."""

    began: float
    data: float
    prepared: float
    mirrored: float
    rates: dict[tuple[Any, ...], Rates]
    peak: int


@dataclass(frozen=True)
class Short(Task):
    """A cell's task cut short: `count` optimizer steps."""

    count: int = 1

    @property
    def steps(self) -> int:
        return self.count


@dataclass(frozen=True)
class Run:
    """Seconds of a run: of its phases, of what follows a method in a cell, and of all."""

    fit: float
    predict: float
    answer: float
    after: float
    wall: float


@contextmanager
def own_folder() -> Iterator[Path]:
    """A folder in the cache for a measurement, for the parent to make: its workers may be ended at any moment. It is
    removed at the end, and so are those that killed measurements left an hour ago."""
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    remove_stale(cache / PROBE)
    name = {"prefix": f".{PROBE}.", "suffix": TEMPORARY}
    with TemporaryDirectory(dir=cache, **name, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def probe(folder: Path, asked: Sequence[ProbeRequest]) -> list[ProbeResult]:
    """What this worker sees of each data set. folder: see `own_folder`; models keep features in it to the end."""
    own = mkdtemp(dir=folder)
    return [_seen(each, own) for each in asked]


def _seen(asked: ProbeRequest, folder: str) -> ProbeResult:
    began, start = time.time(), time.perf_counter()
    s = asked.parts[0].settings
    dataset = catalog.load(asked.source, access=asked.access, split_seed=s.split_seed)
    loaded = time.perf_counter()
    shown = [*dataset.test, *dataset.train][: FEW + SOME + MANY]  # a small set has too few to test on
    test = prepare_all(shown, max_side=s.max_side, hflip=False)
    after = time.perf_counter()
    pool = prepare_all(dataset.train[:MANY], max_side=s.max_side, hflip=True)
    done = time.perf_counter()
    with _cache_at(folder):
        rates = {part.variant: _rates(part, asked, dataset, test) for part in asked.parts}
    return ProbeResult(began, loaded - start, (after - loaded) / len(test), (done - after) / len(pool), rates, _peak())


@contextmanager
def _cache_at(folder: str) -> Iterator[None]:
    before = os.environ.get("KSHOT_CACHE")
    os.environ["KSHOT_CACHE"] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ["KSHOT_CACHE"]
        else:
            os.environ["KSHOT_CACHE"] = before


def _peak() -> int:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used << 10


def _rates(part: CellSpec, asked: ProbeRequest, dataset: Dataset, test: Sequence[Example]) -> Rates:
    small, large = _training(part, asked, dataset)
    run = partial(_run, part, asked, dataset)
    first = run(small, test[:FEW])
    again = run(small, test[:FEW])
    some = min(SOME, max(1, (len(test) - FEW) // 2))
    fresh = run(small, test[FEW : FEW + some])
    each = max((fresh.predict - again.predict + fresh.answer - again.answer) / some, 1e-4)
    many = test[FEW + some :][: max(1, int(SECONDS / each))] if fresh.wall < LONG else test[FEW : FEW + some]
    steps = min(STEPS, 1 + int(SECONDS / max(again.fit, 1e-3))) if part.trains else 1
    new = run(large, many) if fresh.wall < LONG else fresh
    known = run(large, many, steps)
    return _fitted(part, first, again, new, known, (len(small), len(large)), len(many), steps)


def _fitted(
    part: CellSpec, first: Run, again: Run, new: Run, known: Run, train: tuple[int, int], test: int, steps: int
) -> Rates:
    """The line through a small and a large run."""
    more = max(test - FEW, 1)
    step = fit = 0.0
    if part.trains:
        step = (known.fit - again.fit) / (steps - 1) if steps > 1 else known.fit
    elif train[1] > train[0]:
        fit = (known.fit - again.fit) / (train[1] - train[0])
    else:
        fit = known.fit / max(train[0], 1)
    scored = (known.predict + known.after - again.predict - again.after) / more
    answered = (known.answer - again.answer) / more
    step, fit, scored, answered = (max(each, 0.0) for each in (step, fit, scored, answered))
    fixed = again.wall - step - fit * train[0] - FEW * (scored + answered)
    return Rates(
        load=max(first.wall - again.wall, 0.0),
        fixed=max(fixed, 0.0),
        step=step,
        fit=fit,
        scored=scored,
        answered=answered,
        encoded=max((new.predict - known.predict) / test, 0.0),
    )


def _training(part: CellSpec, asked: ProbeRequest, dataset: Dataset) -> tuple[list[Example], list[Example]]:
    """The training images of a small and a large run: a batch where a model trains; else two numbers of shots, as far
    as they are few images."""
    s = part.settings
    if not part.row.learns:
        return [], []
    if part.trains:
        pool = few_shot(dataset, min(asked.shots), 0, s)[: s.batch_size]
        prepared = prepare_all(pool, max_side=s.max_side, hflip=False)
        return prepared, prepared
    fitting = [k for k in asked.shots if k * len(dataset.classes) <= MANY] or [min(asked.shots)]
    ends = (few_shot(dataset, k, 0, s)[:MANY] for k in (min(fitting), max(fitting)))
    small, large = (prepare_all(chosen, max_side=s.max_side, hflip=False) for chosen in ends)
    return small, large


def _run(
    part: CellSpec,
    asked: ProbeRequest,
    dataset: Dataset,
    train: Sequence[Example],
    test: Sequence[Example],
    count: int = 1,
) -> Run:
    learnt = {"answer_tokens": min(asked.answer, part.settings.answer_tokens)} if part.trains and part.asks else {}
    task = Short(
        classes=dataset.classes,
        train=train,
        test=Images(test),
        seed=0,
        settings=part.settings.model_copy(update=learnt),
        hflip=0.0,
        service=asked.service,
        device=asked.device,
        count=count,
    )
    start = time.perf_counter()
    outcome: Outcome = METHODS[part.method].run(task)
    done = time.perf_counter()
    metrics(predictions(test, outcome), len(dataset.classes))
    after = time.perf_counter() - done
    fit, predict, answer = (outcome.seconds.get(name, 0.0) for name in ("fit", "predict", "answer"))
    return Run(fit, predict, answer, after, time.perf_counter() - start)


# ---- How long a sweep takes: measured rates of this machine times what there is to do, shared out over its workers.

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
    todo: Workload,
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


def spent(todo: Workload, measured: Measured, workers: int) -> Spent:
    """Of the whole sweep on this many workers."""
    when = encoding_schedule(todo)
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


def _asked(todo: Workload, source: str, lengths: Mapping[tuple[str, str], Lengths] | None) -> ProbeRequest:
    parts = [part for part in todo.parts if part.source == source]
    variants = {part.variant: part for part in parts}
    shots = tuple(sorted({part.shots for part in parts if part.row.learns})) or (1,)
    answers = [length.answer for (of, _), length in (lengths or {}).items() if of == source]
    answer = round(max(answers, default=NAME))
    access = todo.sets[source].access
    return ProbeRequest(source, access, tuple(variants.values()), shots, todo.service, todo.device, answer)


def _averaged(
    asked: Sequence[ProbeRequest], seen: Sequence[Sequence[ProbeResult]], sent: float, spent: float
) -> Measured:
    def by_source(field: Callable[[ProbeResult], float]) -> dict[str, float]:
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


def _cell(part: CellSpec, todo: Workload, measured: Measured, when: EncodingSchedule) -> float:
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


def _preparation(todo: Workload, measured: Measured) -> dict[str, float]:
    """Every worker prepares the images of its cells, which are soon those of all."""
    found = {}
    for source, each in images(todo.parts, todo).items():
        found[source] = each.test * measured.prepared[source] + each.train * measured.mirrored[source]
    return found


def _encoding(todo: Workload, measured: Measured, when: EncodingSchedule, workers: int) -> Iterator[float]:
    """Seconds of the towers and frozen backbones: each image once for all workers, or once for each of them where it is
    not encoded ahead; what every cell encodes anew is counted there."""
    looking = todo.where(lambda part: part.looks and part.source in (*when.once, *when.worker))
    for source, each in images(looking, todo).items():
        rates = [measured.rates[source, part.variant].encoded for part in looking if part.source == source]
        times = 1 if source in when.once else min(workers, len(rates))
        yield times * (each.shown + each.test) * max(rates)
    for part, each in backbone_images(todo):
        yield (each.train + each.test) * measured.rates[part.source, part.variant].encoded
