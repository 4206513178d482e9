"""A sweep: the grid of cells, checked before anything runs; those that are missing are run and stored as they finish.

Knows no method and no model; what runs the cells is an executor.
"""

import shlex
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from baselines import nano as nano_dinov2
from data import catalog
from data.core import Dataset
from data.row import Access
from experiments import executors
from experiments.cell import Cell
from experiments.config import COMPARED, MODELS, OWN, Settings, Sweep, load
from experiments.job import Job
from experiments.methods import METHODS, check_left_out
from experiments.run import few_shot, run, validation
from experiments.store import Results
from experiments.weights import notes, recorded, relevant
from kshot_errors import DatasetError, InputError, UnknownNameError
from vlm import models


@dataclass(frozen=True)
class Plan:
    """The cells of a sweep with the data sets they need, all checked. jobs: in an order that keeps workers busy."""

    sweep: Sweep
    datasets: dict[str, Dataset]
    jobs: list[Job]

    def describe(self) -> dict[str, Any]:
        """The content of sweep.json."""
        names = [dataset.name for dataset in self.datasets.values()]
        settings, compared = self._settings(), _compared(self.sweep)
        return {
            "name": self.sweep.name,
            "datasets": names,
            "methods": list(self.sweep.methods),
            "shots": sorted(self.sweep.shots),
            "seeds": sorted(self.sweep.seeds),
            "settings": settings,
            **({"prompts": list(self.sweep.prompts)} if len(self.sweep.prompts) > 1 else {}),
            **({"compare": {name: settings[name] for name in compared}} if compared else {}),
            "protocols": {dataset.name: dataset.protocol for dataset in self.datasets.values()},
            "classes": {dataset.name: list(dataset.classes) for dataset in self.datasets.values()},
            "data": {dataset.name: dict(dataset.facts) for dataset in self.datasets.values() if dataset.facts},
            "notes": self._notes(),
        }

    def _settings(self) -> dict[str, Any]:
        """What the settings were; of one that has several values, and of its revision, each in a list."""
        values = recorded(self.sweep.variants[0])
        for name in self.sweep.axes:
            first, *others = each = _recorded_along(self.sweep, name)
            values |= {key: [one[key] for one in each] for key in values if any(o[key] != first[key] for o in others)}
        return values

    def _notes(self) -> list[str]:
        of_settings = dict.fromkeys(line for s in self.sweep.variants for line in notes(s, _used(self.sweep)))
        of_files = [line for dataset in self.datasets.values() for line in _of_its_files(dataset)]
        return [*of_settings, *of_files]

    def missing(self, results: Results) -> list[Job]:
        """The jobs whose cells are not stored yet."""
        return [job for job in self.jobs if not results.has(job.cell.key)]


def plan(sweep: Sweep, *, service: str = "local", device: str = "cpu", access: Access | None = None) -> Plan:
    """Every cell of the grid. Loads the data sets and raises for whatever can be known to be wrong before a start:
    UnknownNameError (data set, method, model), PromptError, ModelError, DatasetError, ImageError, TooFewImagesError,
    InputError (an image size that does not fit a backbone, two that results could not tell apart).

    access: for the data sets that can be had in several ways; InputError where none of them can.
    """
    for method in sweep.methods:
        if method not in METHODS:
            raise UnknownNameError("method", method, METHODS)
    if service != "local" and (alone := [name for name in sweep.methods if METHODS[name].local]):
        raise InputError(f"{alone[0]} needs features, which the Tinker API does not give; use --service local")
    _check_machine(service, device)
    _check_models(sweep, service)
    _check_asking(sweep, service)
    ways = _ways(sweep, access or Access())
    seed = sweep.settings.split_seed
    datasets = {source: catalog.load(source, access=way, split_seed=seed) for source, way in ways.items()}
    _check_names(datasets)
    if any(METHODS[method].learns for method in sweep.methods):
        for dataset in datasets.values():
            for seed in sweep.seeds:
                chosen = few_shot(dataset, max(sweep.shots), seed, sweep.settings)
                if any(METHODS[method].leaves_out for method in sweep.methods):
                    check_left_out(dataset.classes, chosen)
                validation(dataset, max(sweep.shots), seed, sweep.settings)
    jobs: list[Job] = []
    for source, dataset in datasets.items():
        make = partial(Job, source=source, service=service, device=device, access=ways[source])
        jobs += (make(cell, settings) for cell, settings in _cells(sweep, dataset))
    jobs.sort(key=lambda job: -METHODS[job.cell.method].cost)  # the long ones first: no worker waits at the end
    return Plan(sweep, datasets, jobs)


def execute(planned: Plan, results: Results, workers: int | None = None) -> Generator[Job, None, None]:
    """Run and store what `results` lacks of the plan, yielding each job when it is stored."""
    with closing(executors.local(run, planned.missing(results), workers)) as finished:
        for job, (record, table) in finished:
            results.add(record, table)
            yield job


def command(content: Mapping[str, Any]) -> str:
    """What to type for a sweep of this content (sweep.json): every setting in which it is not the demo.

    Where a folder of images lies is not recorded: its path is to be filled in.
    """
    recorded_of = {kind: content["settings"][kind] for kind in MODELS}
    models_of = {kind: tuple(value) if isinstance(value, list) else value for kind, value in recorded_of.items()}
    base = load("demo", {}, models_of).settings.model_dump()
    base.update({kind: value for kind, value in load("demo", {}, {}).settings if kind in MODELS})
    places = [name.replace("folder:", "folder:PATH/TO/", 1) for name in content["datasets"]]
    options = [("--dataset", name) for name in places] + [("--method", m) for m in content["methods"]]
    options += [(f"--{field}", ",".join(map(str, content[field]))) for field in ("shots", "seeds")]
    changed = {k: v for k, v in content["settings"].items() if k in base and v != base[k]}
    asked = changed.pop("prompt", [])
    options += [("--prompt", text) for text in ([asked] if isinstance(asked, str) else asked)]
    compared = {name: changed.pop(name) for name in COMPARED if isinstance(changed.get(name), list)}
    for name, values in compared.items():
        options += [(f"--{name.replace('_', '-')}", OWN if value is None else str(value)) for value in values]
    options += [("--set", f"{k}={v}") for k, v in changed.items()]
    facts = content.get("data", {})
    options += _access_options(facts.values())
    modified = any("-modified-" in protocol for protocol in content["protocols"].values())
    flags = " --allow-modified" if modified else ""
    return "kshot sweep " + " ".join(f"{name} {shlex.quote(value)}" for name, value in options) + flags


def _of_its_files(dataset: Dataset) -> Iterator[str]:
    """What a report must say of a data set's files."""
    if "-modified-" in dataset.protocol:
        changed = ", ".join(dataset.facts["modified"]) or "what was unpacked"
        yield f"{dataset.name}: {changed} is not the published file (--allow-modified)."
    if shared := dataset.facts.get("shared"):
        yield f"{dataset.name}: images that are in both train and test: {shared}."


def _access_options(facts: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The options by which the data sets were had; where the files lay is not recorded."""
    options: dict[str, str] = {}
    for fact in facts:
        if "protocol" in fact:
            options |= {"--source": fact["source"], "--protocol": fact["protocol"]}
        if fact.get("source") == "archive":
            options |= {"--root": "PATH/TO/THE/ORIGINAL/FILES"}
        if fact.get("protocol") == "coop":
            options |= {"--split-file": "PATH/TO/THE/SPLIT.json"}
    return list(options.items())


def _check_machine(service: str, device: str) -> None:
    if service != "local":
        from vlm.service import check

        check(service)
    if device == "cpu":
        return
    import torch

    if device.split(":")[0] != "cuda" or not torch.cuda.is_available():
        raise InputError(f"device {device!r} is not available here; use --device cpu")


def _check_models(sweep: Sweep, service: str) -> None:
    used = _used(sweep)
    if "model" in used and service == "local":
        models.check(sweep.settings.model)
    if "backbone" in used:
        usual = Settings(backbone=nano_dinov2.NAME)
        encoders = dict.fromkeys((s.backbone, s.readout, s.image_size) for s in sweep.variants)
        if [*encoders] != [(usual.backbone, usual.readout, usual.image_size)]:  # that needs no second of importing
            from baselines.backbone import check

            for encoder in encoders:
                check(*encoder)
    for name in _compared(sweep):
        _check_apart(name, sweep.axes[name], [each[name] for each in _recorded_along(sweep, name)])


def _check_apart(setting: str, values: Iterable[Any], names: Iterable[Any]) -> None:
    """Series are told apart by what results call a value; two folders may share their name."""
    first: dict[Any, Any] = {}
    for value, name in zip(values, names, strict=True):
        twin = first.setdefault(name, value)
        if twin != value:
            raise InputError(f"{setting} {twin} and {value} would both be called {name}; rename one or leave it out")


def _check_names(datasets: Mapping[str, Dataset]) -> None:
    """Results are told apart by the name of their data set; two folders may share theirs."""
    first: dict[str, str] = {}
    for source, dataset in datasets.items():
        twin = first.setdefault(dataset.name, source)
        if twin != source:
            raise DatasetError(f"{twin} and {source} would both be called {dataset.name}; rename one or leave it out")


def _ways(sweep: Sweep, access: Access) -> dict[str, Access]:
    """Data set → how it is had: `access` where there is a choice."""
    access = replace(access, protocol=sweep.protocol) if sweep.protocol else access
    rows = {source: catalog.find(source) for source in sweep.datasets}
    if access != Access() and not any(row.sources for row in rows.values()):
        catalog.load(sweep.datasets[0], access=access)  # says what is wrong with that
    return {source: access if row.sources else Access() for source, row in rows.items()}


def _check_asking(sweep: Sweep, service: str) -> None:
    used = _used(sweep)
    if "prompt" in used:
        from vlm.prompts import template

        for text in sweep.phrasings:
            template(text)
    if "loss" in used and sweep.settings.loss == "closed-set" and service == "tinker":
        raise InputError("the loss closed-set is none of the hosted service's; use --service local or --loss text")
    asking = [METHODS[name] for name in sweep.methods if "calibration" in METHODS[name].settings]
    if asking and sweep.settings.calibration == "validated" and not any(method.learns for method in asking):
        raise InputError(
            "calibration validated chooses on labelled images, and zero-shot has none; give contextual, pmi or none"
        )


def _cells(sweep: Sweep, dataset: Dataset) -> Iterator[tuple[Cell, Settings]]:
    """Each cell with the settings it is run under."""
    for settings in sweep.variants:
        values = recorded(settings)
        moved = {name for name, taken in sweep.axes.items() if getattr(settings, name) != taken[0]}
        for name in sweep.methods:
            method = METHODS[name]
            if not moved <= set(method.settings):  # it does not read what has moved: it was there before
                continue
            grid = [(k, s) for k in sweep.shots for s in sweep.seeds] if method.learns else [(0, 0)]
            named = relevant(values, method.settings)
            yield from ((Cell(dataset.name, dataset.protocol, name, k, s, named), settings) for k, s in grid)


def _compared(sweep: Sweep) -> list[str]:
    """The settings, besides the prompt, that have several values."""
    return [name for name, values in sweep.compare if len(values) > 1]


def _recorded_along(sweep: Sweep, setting: str) -> list[dict[str, Any]]:
    """The sweep's first settings as results state them, with each value of one setting in turn."""
    first = sweep.variants[0]
    return [recorded(first.model_copy(update={setting: value})) for value in sweep.axes[setting]]


def _used(sweep: Sweep) -> set[str]:
    """The settings that any of the methods reads."""
    return {name for method in sweep.methods for name in METHODS[method].settings}
