"""How long a sweep takes: rates that are measured on this machine, times what there is to compute, on several workers.

A measurement runs every method as a cell does, on a few images; what a second run on the same images takes less is the
loading of models or the encoding of images. Drawing the report is not in the estimate, and image features that an
earlier sweep has left in the cache are not counted on.
"""

import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from heapq import heapreplace
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

from data import catalog
from data.dataset import Dataset, Example, Images
from data.preparation import prepare_all
from experiments.plan.counts import LengthTable, cell_work, encoded_in_cell
from experiments.sweep import workers as executors
from experiments.sweep.cells import predictions
from experiments.sweep.methods import METHODS, Outcome, Task
from experiments.sweep.metrics import metrics
from experiments.sweep.run import few_shot
from experiments.sweep.workload import (
    CellSpec,
    EncodingSchedule,
    Workload,
    backbone_image_counts,
    encoding_schedule,
    image_counts,
)
from kshot.files import TEMPORARY, cache_folder, remove_stale

ANSWER = 8  # tokens of an answer, where no tokenizer is here to count them


@dataclass(frozen=True)
class Rates:
    """Seconds of a method. load: once a worker. fixed: of a cell, whatever it does. step: of an optimizer step. fit: of
    a training image of a head. scored, generated: of a test image. encoded: of an image through the tower or a frozen
    backbone."""

    load: float = 0.0
    fixed: float = 0.0
    step: float = 0.0
    fit: float = 0.0
    scored: float = 0.0
    generated: float = 0.0
    encoded: float = 0.0


@dataclass(frozen=True)
class ProbeResult:
    """What a worker measured of one data set. began: seconds of the clock. data: seconds to load the set. prepared,
    mirrored: seconds an image, without and with its mirrored twin where one is shown. rates: by variant. peak: bytes of
    the process."""

    began: float
    data: float
    prepared: float
    mirrored: float
    rates: Mapping[tuple[Any, ...], Rates]
    peak: int


@dataclass(frozen=True)
class Measurement:
    """Means over the workers. start: seconds until a worker begins. results: by source. seconds: what it all took."""

    start: float
    results: Mapping[str, ProbeResult]
    seconds: float

    @property
    def peak(self) -> int:
        return max(result.peak for result in self.results.values())

    def rates(self, cell: CellSpec) -> Rates:
        return self.results[cell.source].rates[cell.variant]


@dataclass(frozen=True)
class SweepTime:
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
    workload: Workload,
    workers: int,
    lengths: LengthTable | None = None,
    *,
    threads: int = 1,
    ranks: int = 1,
    gpus: Sequence[str] = (),
) -> Measurement:
    """Runs every method in as many workers at once as the sweep will have: two busy cores are slower than one. threads,
    ranks, gpus: of each, see `experiments.sweep.workers.local`; the workload's device is the place where it computes.
    Raises what loading a model raises, as InputError or KshotError."""
    infos = {source: replace(info, dataset=None) for source, info in workload.datasets.items()}  # a worker loads it
    job = replace(workload, datasets=infos)
    answers: dict[str, int] = {}
    for (source, _), length in (lengths or {}).items():
        answers[source] = max(answers.get(source, 0), round(length.answer))
    sent, start = time.time(), time.perf_counter()
    with probe_folder() as folder:
        how: dict[str, Any] = {"threads": threads, "ranks": ranks, "gpus": gpus}
        done = executors.local(partial(probe, folder, answers), [job] * workers, workers, **how)
        results = [result for _, result in executors.results(done)]
    by_source = {source: _mean([each[source] for each in results]) for source in infos}
    began = mean(min(one.began for one in each.values()) for each in results)
    return Measurement(began - sent, by_source, time.perf_counter() - start)


def sweep_time(workload: Workload, measurement: Measurement, workers: int) -> SweepTime:
    """Of the whole sweep on this many workers."""
    schedule = encoding_schedule(workload)
    seconds = [_cell(cell, workload, measurement.rates(cell), schedule) for cell in workload.cells]
    methods, prepare = defaultdict[str, float](float), 0.0
    loads: dict[Any, float] = {}  # a later data set finds its models loaded
    for cell, each in zip(workload.cells, seconds, strict=True):
        methods[cell.method] += each
        loads.setdefault(cell.variant, measurement.rates(cell).load)
    for source, images in image_counts(workload.cells, workload).items():
        result = measurement.results[source]  # every worker prepares the images of its cells, which are soon all
        prepare += result.data + (images.test * result.prepared + images.train * result.mirrored)
    encode = sum(_encoding(workload, measurement, schedule, workers)) / workers
    return SweepTime(measurement.start + sum(loads.values()), prepare, encode, makespan(seconds, workers), methods)


def makespan(seconds: Sequence[float], workers: int) -> float:
    """When the last of these jobs ends if each, in this order, is taken by the first worker that is free."""
    free = [0.0] * workers
    for each in seconds:
        heapreplace(free, free[0] + each)
    return max(free)


def _mean(results: Sequence[ProbeResult]) -> ProbeResult:
    rates = {
        variant: Rates(*(mean(vars(each.rates[variant])[name] for each in results) for name in vars(Rates())))
        for variant in results[0].rates
    }
    times = {name: mean(getattr(each, name) for each in results) for name in ("began", "data", "prepared", "mirrored")}
    return ProbeResult(**times, rates=rates, peak=max(each.peak for each in results))


def _cell(cell: CellSpec, workload: Workload, rates: Rates, schedule: EncodingSchedule) -> float:
    info = workload.datasets[cell.source]
    work = cell_work(cell, info)
    training = work.steps * rates.step + work.fitted * rates.fit * (not cell.spec.trains)
    encodes = cell.spec.uses_vlm and cell.source in schedule.per_cell
    encoding = encoded_in_cell(cell, info) * rates.encoded if encodes else 0.0
    return rates.fixed + training + encoding + work.scored * rates.scored + work.generated * rates.generated


def _encoding(
    workload: Workload, measurement: Measurement, schedule: EncodingSchedule, workers: int
) -> Iterator[float]:
    """Seconds of the towers and frozen backbones: each image once for all workers, or once in each of them where it is
    not encoded ahead; what every cell encodes again is counted there."""
    cells = workload.select(lambda c: c.spec.uses_vlm and c.source in (*schedule.ahead, *schedule.per_worker))
    for source, images in image_counts(cells, workload).items():
        rates = [measurement.rates(cell).encoded for cell in cells if cell.source == source]
        times = 1 if source in schedule.ahead else min(workers, len(rates))
        yield times * (images.train_views + images.test) * max(rates)
    for cell, images in backbone_image_counts(workload):
        yield (images.train + images.test) * measurement.rates(cell).encoded


# The measurement, in a worker

SECONDS = 1.0  # that one run should take, about
FEW, SOME, MANY = 2, 8, 192  # test images of a run
STEPS = 24  # of a run, at most
LONG = 10.0  # seconds of a run after which no longer one is tried
PROBE = "probe"  # in the names of folders


@contextmanager
def probe_folder() -> Iterator[Path]:
    """A folder in the cache for a measurement, for the parent to make: its workers may be ended at any moment. It is
    removed at the end, and so are those that killed measurements left an hour ago."""
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    remove_stale(cache / PROBE)
    name = {"prefix": f".{PROBE}.", "suffix": TEMPORARY}
    with TemporaryDirectory(dir=cache, **name, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def probe(folder: Path, answers: Mapping[str, int], workload: Workload) -> dict[str, ProbeResult]:
    """What this worker process, which serves nothing else, measures of each data set. Features are cached in `folder`
    (see `probe_folder`), so that none is there from an earlier sweep. answers: source → tokens of an answer."""
    loaded = {source: _load(source, workload) for source in workload.datasets}  # from the real cache
    os.environ["KSHOT_CACHE"] = mkdtemp(dir=folder)
    results = {}
    for source, timed in loaded.items():
        cells = [cell for cell in workload.cells if cell.source == source]
        results[source] = _probe(replace(workload, cells=cells), answers.get(source, ANSWER), *timed)
    return results


def _load(source: str, workload: Workload) -> tuple[Dataset, float, float]:
    """A data set, when its loading began, and its seconds."""
    began, start = time.time(), time.perf_counter()
    split_seed = workload.cells[0].settings.split_seed  # a sweep has one
    dataset = catalog.load(source, access=workload.datasets[source].access, split_seed=split_seed)
    return dataset, began, time.perf_counter() - start


def _probe(workload: Workload, answer: int, dataset: Dataset, began: float, data: float) -> ProbeResult:
    """workload: the cells of this data set. answer: tokens of an answer. began, data: when and how long it loaded."""
    max_side = workload.cells[0].settings.max_side
    start = time.perf_counter()
    images = [*dataset.test, *dataset.train][: FEW + SOME + MANY]  # a small set has too few to test on
    test = prepare_all(images, max_side=max_side, hflip=False)
    prepared = time.perf_counter()
    pool = prepare_all(dataset.train[:MANY], max_side=max_side, hflip=bool(workload.cells[0].settings.hflip))
    mirrored = time.perf_counter()
    variants = {cell.variant: cell for cell in workload.cells}
    rates = {variant: _rates(cell, workload, dataset, test, answer) for variant, cell in variants.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)
    return ProbeResult(began, data, (prepared - start) / len(test), (mirrored - prepared) / len(pool), rates, peak)


@dataclass(frozen=True)
class ShortTask(Task):
    """A cell's task cut short: `count` optimizer steps."""

    count: int = 1

    @property
    def steps(self) -> int:
        return self.count


@dataclass(frozen=True)
class RunTime:
    """Seconds of a run: of its phases, of the metrics that follow in a cell, and of all."""

    fit: float
    predict: float
    answer: float
    metrics: float
    total: float


def _rates(cell: CellSpec, workload: Workload, dataset: Dataset, test: Sequence[Example], answer: int) -> Rates:
    small, large = _training_images(cell, workload, dataset)
    trains = cell.spec.trains
    if trains and cell.spec.generates:  # a model that has learnt to answer stops after a class name
        answer = min(answer, cell.settings.answer_tokens)
        cell = cell._replace(settings=cell.settings.model_copy(update={"answer_tokens": answer}))
    run = partial(_run, cell, workload, dataset)
    cold, warm = run(small, test[:FEW]), run(small, test[:FEW])
    some = min(SOME, max(1, (len(test) - FEW) // 2))
    uncached = run(small, test[FEW : FEW + some])
    each = max((uncached.predict - warm.predict + uncached.answer - warm.answer) / some, 1e-4)
    many = test[FEW : FEW + some]
    if uncached.total < LONG:
        many = test[FEW + some :][: max(1, int(SECONDS / each))]
        uncached = run(large, many)
    steps = min(STEPS, 1 + int(SECONDS / max(warm.fit, 1e-3))) if trains else 1
    cached = run(large, many, steps)
    return fit_rates(cold, warm, uncached, cached, (len(small), len(large)), len(many), steps if trains else 0)


def fit_rates(
    cold: RunTime, warm: RunTime, uncached: RunTime, cached: RunTime, train: tuple[int, int], test: int, steps: int
) -> Rates:
    """The line through a small and a large run.

    cold, warm: of FEW test images and one step, before and after models are loaded and images encoded. uncached,
    cached: of `test` images and `steps` steps (0: nothing trains). train: training images of a small and a large run.
    """
    step = fit = 0.0
    if steps:
        step = (cached.fit - warm.fit) / (steps - 1) if steps > 1 else cached.fit
    else:
        fit = (cached.fit - warm.fit) / (train[1] - train[0]) if train[1] > train[0] else cached.fit / max(train[0], 1)
    more = max(test - FEW, 1)
    scored = (cached.predict + cached.metrics - warm.predict - warm.metrics) / more
    generated = (cached.answer - warm.answer) / more
    step, fit, scored, generated = (max(each, 0.0) for each in (step, fit, scored, generated))
    return Rates(
        load=max(cold.total - warm.total, 0.0),
        fixed=max(warm.total - step - fit * train[0] - FEW * (scored + generated), 0.0),
        step=step,
        fit=fit,
        scored=scored,
        generated=generated,
        encoded=max((uncached.predict - cached.predict) / test, 0.0),
    )


def _training_images(cell: CellSpec, workload: Workload, dataset: Dataset) -> tuple[list[Example], list[Example]]:
    """The training images of a small and a large run: a batch where a model trains; else two numbers of shots, as far
    as they are few images."""
    s = cell.settings
    if not cell.spec.learns:
        return [], []
    every = {each.shots for each in workload.cells if each.spec.learns}
    shots, most = [min(every)] * 2, s.batch_size
    if not cell.spec.trains:
        few = [k for k in every if k * len(dataset.classes) <= MANY] or shots
        shots, most = [min(few), max(few)], MANY
    small, large = (prepare_all(few_shot(dataset, k, 0, s)[:most], max_side=s.max_side, hflip=False) for k in shots)
    return small, large


def _run(
    cell: CellSpec, where: Workload, dataset: Dataset, train: list[Example], test: Sequence[Example], count: int = 1
) -> RunTime:
    shown = dataset.classes, train, Images(test)
    task = ShortTask(*shown, 0, cell.settings, where.service, where.device, count=count)
    start = time.perf_counter()
    outcome: Outcome = METHODS[cell.method].run(task)
    done = time.perf_counter()
    metrics(predictions(test, outcome), len(dataset.classes))
    end = time.perf_counter()
    fit, predict, answer = (outcome.seconds.get(name, 0.0) for name in ("fit", "predict", "answer"))
    return RunTime(fit, predict, answer, end - done, end - start)
