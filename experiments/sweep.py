"""A sweep: the grid of cells, checked before anything runs; those that are missing are run and stored as they finish.

Knows no method and no model; what runs the cells is an executor.
"""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from baselines import nano as nano_dinov2
from data import catalog
from data.core import Dataset
from experiments import executors
from experiments.cell import Cell
from experiments.config import Sweep
from experiments.methods import METHODS
from experiments.run import Job, few_shot, run
from experiments.store import Results
from kshot_errors import UnknownNameError
from vlm import models, nano

NOTES = {  # what a report must say of a model wherever its numbers stand
    "model": {nano.NAME: nano.NOTE},
    "backbone": {nano_dinov2.NAME: nano_dinov2.NOTE},
}


@dataclass(frozen=True)
class Plan:
    """The cells of a sweep with the data sets they need, all checked. jobs: in an order that keeps workers busy."""

    sweep: Sweep
    datasets: dict[str, Dataset]
    jobs: list[Job]

    def describe(self) -> dict[str, Any]:
        """The content of sweep.json."""
        names = [dataset.name for dataset in self.datasets.values()]
        return {
            "name": self.sweep.name,
            "command": self._command(names),
            "datasets": names,
            "methods": list(self.sweep.methods),
            "shots": sorted(self.sweep.shots),
            "seeds": sorted(self.sweep.seeds),
            "settings": self.sweep.settings.model_dump(),
            "classes": {dataset.name: list(dataset.classes) for dataset in self.datasets.values()},
            "notes": notes(self.sweep),
        }

    def _command(self, names: list[str]) -> str:
        sweep = self.sweep
        options = [("--dataset", n) for n in names] + [("--method", m) for m in sweep.methods]
        options += [("--shots", _list(sweep.shots)), ("--seeds", _list(sweep.seeds))]
        options += [("--set", f"{k}={v}") for k, v in sweep.settings.model_dump(exclude_defaults=True).items()]
        return "kshot sweep " + " ".join(f"{name} {shlex.quote(value)}" for name, value in options)


def plan(sweep: Sweep, *, service: str = "local", device: str = "cpu") -> Plan:
    """Every cell of the grid. Loads the data sets and raises for whatever can be known to be wrong before a start:
    UnknownNameError (data set, method, model), DatasetError, ImageError, TooFewImagesError."""
    for method in sweep.methods:
        if method not in METHODS:
            raise UnknownNameError("method", method, METHODS)
    if any("model" in METHODS[method].settings for method in sweep.methods) and service == "local":
        models.check(sweep.settings.model)
    datasets = {source: catalog.load(source, split_seed=sweep.settings.split_seed) for source in sweep.datasets}
    if any(METHODS[method].learns for method in sweep.methods):
        for dataset in datasets.values():
            for seed in sweep.seeds:
                few_shot(dataset, max(sweep.shots), seed, sweep.settings)
    jobs = [job for source, dataset in datasets.items() for job in _jobs(sweep, source, dataset, service, device)]
    jobs.sort(key=lambda job: -METHODS[job.cell.method].cost)  # the long ones first: no worker waits at the end
    return Plan(sweep, datasets, jobs)


def execute(planned: Plan, results: Results, workers: int | None = None) -> Iterator[Job]:
    """Run and store what `results` lacks of the plan, yielding each job when it is stored."""
    missing = [job for job in planned.jobs if not results.has(job.cell.key)]
    for job, (record, table) in executors.local(run, missing, workers):
        results.add(record, table)
        yield job


def notes(sweep: Sweep) -> list[str]:
    """The sentences a report must show because of the models that the sweep's methods use."""
    used = {setting for method in sweep.methods for setting in METHODS[method].settings}
    chosen: Mapping[str, Any] = sweep.settings.model_dump()
    return [NOTES[kind][chosen[kind]] for kind in NOTES if kind in used and chosen[kind] in NOTES[kind]]


def _jobs(sweep: Sweep, source: str, dataset: Dataset, service: str, device: str) -> Iterator[Job]:
    values = sweep.settings.model_dump()
    for name in sweep.methods:
        method = METHODS[name]
        grid = [(k, s) for k in sweep.shots for s in sweep.seeds] if method.learns else [(0, 0)]
        for shots, seed in grid:
            settings = {key: values[key] for key in method.settings}
            cell = Cell(dataset.name, dataset.protocol, name, shots, seed, settings)
            yield Job(cell, sweep.settings, source, service, device)


def _list(values: tuple[int, ...]) -> str:
    return ",".join(map(str, values))
