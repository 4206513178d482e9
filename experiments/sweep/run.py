"""Run one job in a worker process: a cell, from its data set to a record and predictions, or the encoding of images.
Data sets and prepared images stay in the process from cell to cell."""

import platform
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np

from data import catalog
from data.dataset import Access, Dataset, Example, Images
from data.fewshot import k_shot
from data.preparation import prepare_all
from experiments.sweep import methods
from experiments.sweep.cells import EncodingJob, Job, predictions, service_kind
from experiments.sweep.config import Settings
from experiments.sweep.methods import METHODS, Outcome, Task
from experiments.sweep.provenance import recorded, relevant
from kshot.errors import DatasetError, KshotError, ModelError

if TYPE_CHECKING:
    import pyarrow as pa

VALIDATION = 4  # images a class, at most
VERSIONS = ("kshot", "torch", "transformers", "peft", "timm", "scikit-learn", "numpy", "pillow", "tinker")


def work(job: Job | EncodingJob) -> "tuple[dict[str, Any], pa.Table] | None":
    """What a worker does."""
    if isinstance(job, Job):
        return run(job)
    encode(job)
    return None


def encode(job: EncodingJob) -> None:
    """Put the features of the job's images where the cells find them. Raises as `run` does."""
    cell_job, settings = job.cell_job, job.cell_job.settings
    train = to_encode(dataset_of(cell_job), job.seeds, job.shots, settings)
    test = {example.key: example for example in examples_to_test(cell_job)}
    keys = sorted({*test, *train})[job.part :: job.parts]
    prepared = _prepared(cell_job, [train[key] for key in keys if key in train])
    images = [image for each in prepared for image in (each.image, each.mirrored) if image]
    images += [test[key].image for key in keys if key in test]
    methods.encode(images, settings, cell_job.device)


def to_encode(dataset: Dataset, seeds: Iterable[int], shots: int, settings: Settings) -> dict[str, Example]:
    """The training images by key that cells of these seeds and at most these shots show."""
    drawn = [draw(dataset, shots, seed, settings) for seed in seeds if shots for draw in (few_shot, validation)]
    return {example.key: example for some in drawn for example in some}


def run(job: Job) -> tuple[dict[str, Any], "pa.Table"]:
    """(record, predictions) of a cell. Raises InputError for what is wrong with its data or settings, KshotError
    where a remote service fails."""
    from experiments.sweep.metrics import metrics

    cell, dataset = job.cell, dataset_of(job)
    if dataset.protocol != cell.protocol:
        raise DatasetError(f"{job.source} has changed since the sweep began; run it again with another --out")
    if cell.settings != relevant(recorded(job.settings), METHODS[cell.method].settings):
        raise ModelError(f"the weights of {cell} have changed since the sweep began; run it again with another --out")
    test = examples_to_test(job)
    before = _forwards(job)
    outcome = _outcome(job, task_of(job, dataset, test))
    table = predictions(test, outcome)
    record = {
        "key": cell.key,
        **cell.identity,
        "test_images": len(test),
        "metrics": metrics(table, len(dataset.classes)),
        "timings": {f"{name}_seconds": round(seconds, 3) for name, seconds in outcome.seconds.items()},
        **({} if before is None else {"work": {"vision_forwards": (_forwards(job) or 0) - before}}),
        "versions": versions(job),
        **({"chosen": dict(outcome.chosen)} if outcome.chosen else {}),
    }
    return record, table


def few_shot(dataset: Dataset, shots: int, seed: int, settings: Settings) -> list[Example]:
    """The k labelled examples a class. Raises TooFewImagesError unless settings.allow_fewer."""
    chosen = k_shot(dataset.train, dataset.classes, shots, seed, allow_fewer=settings.allow_fewer)
    return [dataset.train[n] for n in chosen]


def validation(dataset: Dataset, shots: int, seed: int, settings: Settings) -> list[Example]:
    """The labelled examples on which settings are chosen, if any are: min(shots, VALIDATION) of each class, the next
    ones of the permutation that the k shots come from (as CoOp does, Zhou et al. 2022). Raises TooFewImagesError where
    a class has no more, unless settings.allow_fewer."""
    if settings.calibration != "validated":
        return []
    more = shots + min(shots, VALIDATION)
    taken = {example.key for example in few_shot(dataset, shots, seed, settings)}
    return [example for example in few_shot(dataset, more, seed, settings) if example.key not in taken]


def shown(test: list[Example], job: Job) -> Images:
    """What a method is shown: the test images, or for the control each test image in another's place."""
    if not job.settings.shuffle_test:
        return Images(test)
    order = np.random.default_rng(job.cell.seed).permutation(len(test))
    placed = list(test)
    for here, there in zip(order, np.roll(order, 1), strict=True):  # one round: no image stays where it was
        placed[here] = test[there]
    return Images(placed)


def versions(job: Job) -> dict[str, str]:
    """The versions of what the numbers come from, the kind of machine, and the kind of service that computed."""
    machine = f"{platform.system()} {platform.machine()} {job.device}"
    numbers = {name: metadata.version(name) for name in VERSIONS}
    return {"python": platform.python_version(), **numbers, "machine": machine, "service": service_kind(job.service)}


def task_of(job: Job, dataset: Dataset, test: list[Example]) -> Task:
    """What the cell's method is given. Raises TooFewImagesError, ImageError."""
    method = METHODS[job.cell.method]
    chooses = method.learns and "calibration" in method.settings
    labelled = validation(dataset, job.cell.shots, job.cell.seed, job.settings) if chooses else []
    return Task(
        classes=dataset.classes,
        train=train_examples(job, dataset) if method.learns else [],
        test=shown(test, job),
        seed=job.cell.seed,
        settings=job.settings,
        service=job.service,
        device=job.device,
        validation=_prepared(job, labelled),
    )


def _outcome(job: Job, task: Task) -> Outcome:
    method = METHODS[job.cell.method]
    if job.service == "local":
        return method.run(task)
    import tinker

    try:
        return method.run(task)
    except tinker.TinkerError as error:
        raise KshotError(f"service {job.service} failed with {job}: {error}") from error


def _forwards(job: Job) -> int | None:
    """Images that the vision tower has seen in this process; None where no VLM of this machine looks at any."""
    if job.service != "local" or not METHODS[job.cell.method].uses_vlm:
        return None
    return methods.tower_forwards(job.settings, job.device)


def train_examples(job: Job, dataset: Dataset) -> list[Example]:
    """The cell's examples as every model sees them, mirrored too where hflip > 0; each is prepared once a process."""
    return _prepared(job, few_shot(dataset, job.cell.shots, job.cell.seed, job.settings))


def _prepared(job: Job, chosen: list[Example]) -> list[Example]:
    s, mirrored = job.settings, bool(job.settings.hflip)
    prepared = _prepared_train(job.source, job.access, s.split_seed, s.max_side, mirrored)
    new = [example for example in chosen if example.key not in prepared]
    new = prepare_all(new, max_side=s.max_side, hflip=mirrored)
    prepared.update((example.key, example) for example in new)
    # An image that is in two classes is prepared once; each example keeps its own label.
    return [replace(prepared[example.key], label=example.label) for example in chosen]


def examples_to_test(job: Job) -> list[Example]:
    s = job.settings
    return _prepared_test(job.source, job.access, s.split_seed, s.max_side, s.limit_test)


def dataset_of(job: Job) -> Dataset:
    return _dataset(job.source, job.access, job.settings.split_seed)


@lru_cache(maxsize=1)
def _dataset(source: str, access: Access, split_seed: int) -> Dataset:
    return catalog.load(source, access=access, split_seed=split_seed)


@lru_cache(maxsize=1)
def _prepared_train(source: str, access: Access, split_seed: int, max_side: int, mirrored: bool) -> dict[str, Example]:
    """Prepared training examples of one data set by key; filled as cells ask for them."""
    return {}


@lru_cache(maxsize=1)
def _prepared_test(source: str, access: Access, split_seed: int, max_side: int, limit: int | None) -> list[Example]:
    test = _dataset(source, access, split_seed).test
    # keys are hashes: the smallest are a sample that does not depend on the order of the rows
    chosen = test if limit is None else sorted(test, key=lambda e: e.key)[:limit]
    return prepare_all(chosen, max_side=max_side, hflip=False)
