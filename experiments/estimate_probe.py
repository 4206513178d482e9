"""A short measurement in a worker: what each method takes to load, a step, an image. Knows no sweep and no totals.

A method is run as a cell runs it, on a few images; what a second run on the same images takes less is what loading or
encoding took. Features go to a folder of the measurement's own, so that none is known from before.
"""

import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

from data import catalog
from data.core import Dataset, Example, Images
from data.images import prepare_all
from data.row import Access
from experiments.estimate_parts import Part
from experiments.methods import METHODS, Outcome, Task
from experiments.metrics import metrics
from experiments.predictions import predictions
from experiments.run import few_shot
from kshot_files import TEMPORARY, cache_folder, remove_stale

SECONDS = 1.0  # that one run should take, about
FEW, SOME, MANY = 2, 8, 192  # test images of a run
STEPS = 24  # of a run, at most
LONG = 10.0  # seconds of a run after which no longer one is tried
PROBE = "probe"  # in the names of folders


@dataclass(frozen=True)
class Asked:
    """What one worker measures of one data set: the parts, one of each variant. sent: when (seconds of the clock)."""

    source: str
    access: Access
    parts: tuple[Part, ...]
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
class Seen:
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


def probe(folder: Path, asked: Sequence[Asked]) -> list[Seen]:
    """What this worker sees of each data set. folder: see `own_folder`; models keep features in it to the end."""
    own = mkdtemp(dir=folder)
    return [_seen(each, own) for each in asked]


def _seen(asked: Asked, folder: str) -> Seen:
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
    return Seen(began, loaded - start, (after - loaded) / len(test), (done - after) / len(pool), rates, _peak())


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


def _rates(part: Part, asked: Asked, dataset: Dataset, test: Sequence[Example]) -> Rates:
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
    part: Part, first: Run, again: Run, new: Run, known: Run, train: tuple[int, int], test: int, steps: int
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


def _training(part: Part, asked: Asked, dataset: Dataset) -> tuple[list[Example], list[Example]]:
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
    part: Part, asked: Asked, dataset: Dataset, train: Sequence[Example], test: Sequence[Example], count: int = 1
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
