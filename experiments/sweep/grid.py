"""A sweep: its grid of cells is planned and checked before anything runs; cells that are missing are run, and stored as
they finish."""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from baselines import hub as hub_backbones
from data import catalog
from data.check import refuse_broken
from data.dataset import Access, Dataset
from experiments.sweep import workers as executors
from experiments.sweep.cells import Cell, EncodingJob, Job, service_kind
from experiments.sweep.config import LATER, MODELS, RunOptions, Settings, Sweep, commits_of
from experiments.sweep.methods import METHODS
from experiments.sweep.preflight import (
    check_apart,
    check_key,
    check_settings,
    check_shots,
    check_weights,
    compared_settings,
    recorded_along,
    settings_read,
)
from experiments.sweep.provenance import dataset_notes, few_tests, local_model, notes, recorded, relevant
from experiments.sweep.run import work
from experiments.sweep.store import Results
from experiments.sweep.tracking import Tracker
from experiments.sweep.workers import EXECUTORS, Failure
from experiments.sweep.workload import adapt, encoding_parts, encoding_schedule, of_jobs
from kshot.errors import (
    DatasetError,
    InputError,
    KshotError,
    ModelError,
    UnknownNameError,
    near_name,
)
from vlm import models, nano

# on which depends what images are shown
IMAGE_SETTINGS = ("model", "max_side", "limit_test", "split_seed", "allow_fewer", "calibration")


class Observer(Protocol):
    """What a caller may do at each stage of a sweep: nothing, unless a method is replaced."""

    def planning(self) -> AbstractContextManager[Any]:
        """Around the reading of the data and the checks."""
        return nullcontext()

    def planned(self, planned: "Plan") -> None:
        """Once all is checked that can be before a model is fetched or loaded."""
        return

    def running(self, planned: "Plan", results: Results, jobs: "Sequence[Job]") -> AbstractContextManager[Any]:
        """Around the run of these jobs: none, where the folder has all cells."""
        return nullcontext()

    def started(self, job: Job | EncodingJob) -> None:
        """When a job begins, also one that is tried again."""
        return

    def finished(
        self, job: Job | EncodingJob, failure: Failure | None, record: Mapping[str, Any] | None, done: int
    ) -> None:
        """After each job. record: of a cell that is stored now. done: cells of the sweep that are."""
        return

    def complete(self, planned: "Plan", results: Results, content: dict[str, Any]) -> None:
        """After the last job, while the folder is still held for writing. content: of sweep.json."""
        return


class _Silent(Observer):
    """One that does nothing."""


def run_sweep(
    sweep: Sweep, folder: Path | str, options: RunOptions | None = None, observer: Observer | None = None
) -> Results:
    """Run the cells of a sweep that the folder lacks, and store each as it finishes; the folder's results. Raises as
    `plan` does before anything runs, ModelError also for a model that cannot be loaded; after the last cell, KshotError
    where cells failed, InputError where every failure was one of the input."""
    options, observer, results = options or RunOptions(), observer or _Silent(), Results(folder)
    if options.executor not in EXECUTORS:
        raise UnknownNameError("executor", options.executor, EXECUTORS)
    follower = Tracker(options.track)
    with observer.planning():
        sweep = continued(sweep, results)
        planned = plan(
            sweep,
            service=options.service,
            device=options.device,
            access=options.access,
            gpus_per_worker=options.gpus_per_worker,
            on_cluster=options.executor == "ray",
        )
        observer.planned(planned)
        _checked_jobs(planned, results, options)
    with results.writing():
        content = results.begin(planned.describe())
        jobs = _checked_jobs(planned, results, options)  # more than before, where files of cells were set aside
        with observer.running(planned, results, jobs):
            if jobs:
                follower.start(content, results.folder)
                try:
                    _run_jobs(planned, results, jobs, options, follower, observer)
                finally:
                    follower.finish()
        observer.complete(planned, results, content)
    _check_failures(results, jobs)
    return results


@dataclass(frozen=True)
class Plan:
    """The cells of a sweep with the data sets they need, all checked. jobs: one data set after the other, so that
    workers keep its images, and of each the long ones first, so that no worker waits at the end. adapted: lines on what
    was asked for and a data set does not have."""

    sweep: Sweep
    datasets: dict[str, Dataset]
    jobs: list[Job]
    adapted: Sequence[str] = ()

    def about_data(self) -> Iterator[str]:
        """What is used, a line a data set, and what must be said of it."""
        for dataset in self.datasets.values():
            train, test, most = len(dataset.train), len(dataset.test), self.sweep.settings.limit_test
            tested = f"{test:,}" if most is None or most >= test else f"{most:,} of {test:,}"
            counts = f"{len(dataset.classes):,} classes, {train:,} train and {tested} test images"
            yield f"{dataset.name}: {counts}, protocol {dataset.protocol}"
            yield from dataset_notes(dataset)
            yield from few_tests(dataset, most)
        yield from self.adapted

    def describe(self) -> dict[str, Any]:
        """The content of sweep.json."""
        settings, compared = self._settings(), compared_settings(self.sweep)
        caps = {self.datasets[source].name: most for source, most in self.sweep.most_shots.items()}
        usual = self.sweep.settings.views_per_class
        views = {j.cell.dataset: j.settings.views_per_class for j in self.jobs if j.settings.views_per_class != usual}
        of_settings = dict.fromkeys(line for s in self.sweep.variants for line in notes(s, settings_read(self.sweep)))
        sets = self.datasets.values()
        most = self.sweep.settings.limit_test
        of_datasets = [line for each in sets for line in (*dataset_notes(each), *few_tests(each, most))]
        return {
            "name": self.sweep.name,
            "datasets": [dataset.name for dataset in self.datasets.values()],
            "methods": list(self.sweep.methods),
            "shots": sorted(self.sweep.shots),
            "seeds": sorted(self.sweep.seeds),
            "settings": settings,
            **({"most_shots": caps} if caps else {}),
            **({"views_per_class": views} if views else {}),
            **({"prompts": list(self.sweep.prompts)} if len(self.sweep.prompts) > 1 else {}),
            **({"compare": {name: settings[name] for name in compared}} if compared else {}),
            "protocols": {dataset.name: dataset.protocol for dataset in self.datasets.values()},
            "classes": {dataset.name: list(dataset.classes) for dataset in self.datasets.values()},
            "data": {dataset.name: dict(dataset.facts) for dataset in self.datasets.values() if dataset.facts},
            "notes": [*of_settings, *self.adapted, *of_datasets],
            **({"service": service_kind(self.jobs[0].service), "device": self.jobs[0].device} if self.jobs else {}),
        }

    def _settings(self) -> dict[str, Any]:
        """What the settings were; of one that has several values, and of its revision, each in a list."""
        values = recorded(self.sweep.variants[0])
        for name in self.sweep.axes:
            first, *others = each = recorded_along(self.sweep, name)
            values |= {key: [one[key] for one in each] for key in values if any(o[key] != first[key] for o in others)}
        return values

    def missing(self, results: Results, *, only_failed: bool = False) -> list[Job]:
        """The jobs whose cells are not stored yet; of them those that have failed."""
        finished = results.finished()
        keys = results.failed_keys() if only_failed else {job.cell.key for job in self.jobs}
        return [job for job in self.jobs if job.cell.key in keys - finished]

    def encodings(self, jobs: Sequence[Job]) -> list[EncodingJob]:
        """What is encoded once, for all of these jobs: the images that the VLM of this machine is shown, of the data
        sets whose features can be kept until they are used."""
        alike: dict[Any, list[Job]] = defaultdict(list)
        workload, encodings = of_jobs(jobs, self.datasets), list[EncodingJob]()
        ahead = encoding_schedule(workload).ahead
        for job in jobs:
            if job.source in ahead and METHODS[job.cell.method].uses_vlm:
                alike[job.source, *(getattr(job.settings, name) for name in IMAGE_SETTINGS)].append(job)
        for same in alike.values():
            learning = [job.cell for job in same if METHODS[job.cell.method].learns]
            seeds, shots = tuple(sorted({c.seed for c in learning})), max((c.shots for c in learning), default=0)
            info, settings = workload.datasets[same[0].source], same[0].settings
            parts = encoding_parts(info.train_count(seeds, shots, settings), info.test_count(settings))
            encodings += [EncodingJob(same[0], seeds, shots, part, parts) for part in range(parts)]
        return encodings


def plan(
    sweep: Sweep,
    *,
    service: str = "local",
    device: str = "cpu",
    access: Access | None = None,
    here: bool = True,
    gpus_per_worker: int = 1,
    on_cluster: bool = False,
) -> Plan:
    """Every cell of the grid. access: for the data sets that can be had in several ways. gpus_per_worker: on all of
    which a VLM is. here: whether it is to run now, so that service and device must be there; on_cluster: whether on
    machines of which the devices are not known here.

    Loads the data sets and raises for whatever can be known to be wrong before a start: UnknownNameError (data set,
    method, model), PromptError, ModelError, DatasetError, ImageError, TooFewImagesError, InputError (an image size that
    does not fit a backbone, two that results could not tell apart, an access that none of the data sets has).
    """
    for method in sweep.methods:
        if method not in METHODS:
            raise UnknownNameError("method", method, METHODS)
    if service != "local" and (alone := [name for name in sweep.methods if METHODS[name].local]):
        raise InputError(f"{alone[0]} needs features, which the Tinker API does not give; use --service local")
    if here and service != "local":
        from vlm.service import check

        check_key(service)
        check(service)
    gpus_of(device, here=here and not on_cluster)  # which may raise
    check_settings(sweep, service)
    sweep = _pinned(sweep, service)
    access, split_seed = access or Access(), sweep.settings.split_seed
    accesses = catalog.accesses(sweep.datasets, access, sweep.protocol)
    datasets = {source: catalog.load(source, access=each, split_seed=split_seed) for source, each in accesses.items()}
    for source, dataset in datasets.items():
        if not source.startswith(catalog.FOLDER):  # whose images are decoded whenever it is loaded
            refuse_broken(dataset)
    check_apart(datasets, [dataset.name for dataset in datasets.values()], kind=DatasetError)
    sweep, adapted = adapt(sweep, access, datasets)
    check_shots(sweep, datasets)
    jobs: list[Job] = []
    for source, dataset in datasets.items():
        where = source, service, worker_place(device, gpus_per_worker), accesses[source]
        jobs += (Job(cell, settings, *where) for cell, settings in _cells(sweep, source, dataset))
    return Plan(sweep, datasets, jobs, adapted)


def continued(sweep: Sweep, results: Results) -> Sweep:
    """The sweep with models of the hub at the commits of the cells that the folder has: the hub may have newer ones."""
    old = results.sweep()["settings"] if results.has_cells() else {}
    commits = {kind: commits_of(kind, old) for kind in MODELS if kind in old}

    def at_old(kind: str, name: str) -> str:
        name = models.full_name(name) if kind == "model" else name
        commit = None if local_model(kind, name) else commits[kind].get(name)
        return f"{name}@{commit}" if commit else name

    return _with_models(sweep, commits, at_old) if any(commits.values()) else sweep


def _run_jobs(
    planned: Plan, results: Results, jobs: Sequence[Job], options: RunOptions, follower: Tracker, observer: Observer
) -> None:
    """Run and store these jobs of the plan. One that fails stops no other; where images cannot be encoded, the cells
    that need them say so. Raises InputError where the executor cannot run here, or not with so many workers."""
    gpus, workers, total = gpu_groups(options), options.workers, len(planned.jobs)
    if gpus and workers and workers > len(gpus) and options.executor == "local":
        each = options.gpus_per_worker
        has = f"GPUs: {len(gpus) * each}, and each worker takes {each if each > 1 else 'one'}"
        raise InputError(f"--workers {workers}, but {has}; leave --workers out")
    done, start = total - len(planned.missing(results)), getattr(executors, options.executor)
    how = {"threads": options.threads, "ranks": options.ranks, "gpus": gpus, "started": observer.started}
    answers = start(work, jobs, workers, first=planned.encodings(jobs), **how)
    with closing(answers):
        for job, answer in answers:
            failure, record = answer if isinstance(answer, Failure) else None, None
            if isinstance(job, Job) and failure:
                noted = {"error": failure.message, "exit_status": failure.exit_status, "trace": failure.trace}
                results.fail({"key": job.cell.key, **job.cell.identity, **noted})
            elif isinstance(job, Job):
                results.add(*answer)
                done, record = done + 1, answer[0]
                follower.cell(record, done, total)
            observer.finished(job, failure, record, done)


def _check_failures(results: Results, jobs: Iterable[Job]) -> None:
    keys = {job.cell.key for job in jobs}
    if failed := [record for record in results.failures() if record["key"] in keys]:
        first, wrong = failed[0], all(record["exit_status"] == InputError.exit_status for record in failed)
        cell = f"{first['method']} on {first['dataset']}, {first['shots']} shots, seed {first['seed']}"
        again = "(the same command tries them again, and --only-failed them alone)"
        message = f"{len(failed)} of {len(keys)} cells failed, first {cell}: {first['error']} {again}"
        raise (InputError if wrong else KshotError)(message)


def gpus_of(device: str, *, here: bool = True) -> tuple[str, ...]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs of a device: of cuda all that are visible, of cuda:1 the second. Raises
    InputError for GPUs that this machine does not have, unless they need not be here: then there are none."""
    if re.fullmatch(r"cpu(:[1-9]\d*)?", device):
        return ()
    if not re.fullmatch(r"cuda(:\d+)?", device):
        near = near_name(device, ["cpu", "cuda"])
        meant = f" (did you mean {near!r}?)" if near else ""
        raise InputError(f"device {device!r} is not available here{meant}; use --device cpu, cpu:N, cuda or cuda:N")
    import torch

    number, visible, count = device.partition(":")[2], os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    names = visible.split(",") if count and visible else [str(n) for n in range(count)]
    if names and (not number or int(number) < len(names)):
        return (names[int(number)],) if number else tuple(names)
    if not here:
        return ()
    if not names:
        raise InputError(f"device {device!r} is not available here: torch sees no GPU; use --device cpu")
    raise InputError(f"device {device!r} is not available here; give cuda, or cuda:0 to cuda:{len(names) - 1}")


def gpu_groups(options: RunOptions, *, here: bool = True) -> tuple[str, ...]:
    """What CUDA_VISIBLE_DEVICES says in each worker: the names of its GPUs; on a Ray cluster, which chooses them, one
    entry for all. Raises as `gpus_of`, and InputError where there are fewer than a worker is to get."""
    on_cluster, each = options.executor == "ray", options.gpus_per_worker
    gpus, on_cpu = gpus_of(options.device, here=here and not on_cluster), options.device.startswith("cpu")
    if on_cluster and not on_cpu:
        return (",".join(map(str, range(each))),)
    if each > max(1, len(gpus)) and (gpus or here or on_cpu):
        raise InputError(f"--gpus-per-worker {each}, but GPUs: {len(gpus)}; give fewer, or --device cuda")
    return tuple(",".join(gpus[n : n + each]) for n in range(0, len(gpus) - each + 1, each))


def worker_place(device: str, gpus_per_worker: int) -> str:
    """Where a worker computes, among the GPUs that it gets: a place of `vlm.places`."""
    if device.startswith("cpu"):
        return device
    return "all" if gpus_per_worker > 1 else device.partition(":")[0]


def _pinned(sweep: Sweep, service: str) -> Sweep:
    """The sweep with models of the hub at the commits that they have now: all its cells load these and state them, so a
    folder never holds cells of two. Where neither the hub nor its cache has a model, it stays as it is, and loading it
    says why; of a remote service's VLM no commit is known here."""

    def now(kind: str, name: str) -> str:
        with suppress(ModelError):
            return models.pinned(name) if kind == "model" else hub_backbones.pinned(name)
        return name

    kinds = [kind for kind in MODELS if kind in settings_read(sweep) and (kind != "model" or service == "local")]
    return _with_models(sweep, kinds, now)


def _with_models(sweep: Sweep, kinds: Iterable[str], change: Callable[[str, str], str]) -> Sweep:
    """The sweep with other models of these kinds. change: kind and name → another name."""
    settings = {kind: change(kind, getattr(sweep.settings, kind)) for kind in kinds}
    compared = {kind: tuple(change(kind, name) for name in getattr(sweep.compare, kind, ())) for kind in kinds}
    compare = sweep.compare.model_copy(update={kind: names for kind, names in compared.items() if names})
    return sweep.model_copy(update={"settings": sweep.settings.model_copy(update=settings), "compare": compare})


def _checked_jobs(planned: Plan, results: Results, options: RunOptions) -> list[Job]:
    """The jobs that are to be run. Raises ModelError for a model or backbone that none of them could load; on a
    cluster, whose nodes have the models, for one of the hub at no known commit: its nodes could load several."""
    jobs, model = planned.missing(results, only_failed=options.only_failed), planned.sweep.settings.model
    if options.executor == "local":
        check_weights(jobs)
    local = any(job.service == "local" and METHODS[job.cell.method].uses_vlm for job in planned.jobs)
    if not jobs or not local or model == nano.NAME:  # which comes with kshot, and needs no seconds of importing
        return jobs
    if options.executor == "local":
        from vlm.service import check_model

        check_model(model)
        return jobs
    try:
        models.pinned(model)
    except ModelError as error:
        raise ModelError(f"{error}; or name the commit: --set model={model.partition('@')[0]}@COMMIT") from error
    return jobs


def _cells(sweep: Sweep, source: str, dataset: Dataset) -> Iterator[tuple[Cell, Settings]]:
    """Each cell with the settings it is run under, the long ones first. A data set's own hflip, and settings that came
    later, at their defaults, are recorded and left out of the key."""
    own = catalog.find(source).hflip
    sweep, usual = sweep.on(len(dataset.classes), own), Settings(hflip=own)
    values = cache(recorded)
    for name in sorted(sweep.methods, key=lambda name: -METHODS[name].cost):
        method = METHODS[name]
        for settings, shots, seed in sweep.points(source, method.settings, learns=method.learns):
            named = relevant(values(settings), method.settings)
            unkeyed = tuple(n for n in ("hflip", *LATER) if getattr(settings, n) == getattr(usual, n))
            yield Cell(dataset.name, dataset.protocol, name, shots, seed, named, unkeyed), settings
