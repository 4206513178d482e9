"""The commands that run sweeps: `kshot sweep`, `demo` and `zero-shot`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from experiments.cli import options as opt
from experiments.cli.helps import completion, methods, sweeps
from experiments.cli.progress import Display
from experiments.cli.report import report_of
from experiments.terminal import err, print_paths
from kshot.errors import InputError

if TYPE_CHECKING:
    from data.dataset import Access
    from experiments.sweep.cells import EncodingJob, Job
    from experiments.sweep.choice import Choice
    from experiments.sweep.config import RunOptions, Sweep
    from experiments.sweep.grid import Plan
    from experiments.sweep.store import Results
    from experiments.sweep.workers import Failure


def demo(
    output: opt.Out = None,
    workers: opt.Workers = None,
    device: opt.Device = "cpu",
    no_images: opt.NoImages = False,
) -> None:
    """Accuracy over shots on the embedded icons with the nano models: minutes on two cores."""
    run(_sweep_of("demo", {}, {}), output, images=not no_images, workers=workers, device=device)


@opt.with_access
def sweep(
    preset: Annotated[
        str | None,
        typer.Argument(
            help="A preset's name or a YAML file; without one, a sweep of your data sets.",
            autocompletion=completion(sweeps),
        ),
    ] = None,
    dataset: opt.AnyDatasets = None,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help="One of those below; repeat for several.", autocompletion=completion(methods)),
    ] = None,
    shots: Annotated[str | None, typer.Option("--shots", help="Labelled examples a class, as 1,2,4.")] = None,
    seeds: Annotated[str | None, typer.Option("--seeds", help="As 0,1,2 or 0-2.")] = None,
    most_shots: Annotated[
        list[str] | None, typer.Option("--most-shots", metavar="DATASET=K", help="For one with fewer images; repeat.")
    ] = None,
    model: opt.Model = None,
    backbone: Annotated[
        list[str] | None, typer.Option("--backbone", help="DINOv2: a name or a timm name; repeat to compare.")
    ] = None,
    readout: Annotated[
        list[str] | None,
        typer.Option("--readout", help="Of DINOv2: cls, cls+mean, last4, last4+mean or pooled; repeat to compare."),
    ] = None,
    image_size: Annotated[
        list[str] | None,
        typer.Option(
            "--image-size",
            metavar="own|PIXELS",
            help="Of DINOv2's input, a square, or each image's own; repeat to compare.",
        ),
    ] = None,
    vlm_features: Annotated[
        list[str] | None,
        typer.Option("--vlm-features", help="For a head on the VLM: tower, hidden or tower+hidden; repeat to compare."),
    ] = None,
    prompt: opt.Prompts = None,
    loss: opt.Losses = None,
    loss_power: opt.LossPowers = None,
    start: opt.Starts = None,
    calibration: opt.Calibration = None,
    thinking: opt.Thinking = None,
    thoughts: opt.Thoughts = None,
    train_on: opt.TrainOn = None,
    service: opt.Service = "local",
    device: Annotated[str | None, typer.Option("--device", help=opt.DEVICES)] = None,
    gpus_per_worker: Annotated[
        int, typer.Option("--gpus-per-worker", min=1, help="With --device cuda: one VLM over so many of them.")
    ] = 1,
    executor: Annotated[str, typer.Option("--executor", help="local, or ray: actors on a Ray cluster.")] = "local",
    limit_test: opt.LimitTest = None,
    allow_fewer: opt.Fewer = False,
    access: "Access | None" = None,
    settings: opt.Set = None,
    output: opt.Out = None,
    workers: opt.Workers = None,
    threads: Annotated[
        int, typer.Option("--threads", min=1, help="Of each worker; more change results by rounding.")
    ] = 1,
    only_failed: Annotated[bool, typer.Option("--only-failed", help="Try only cells that failed.")] = False,
    only_plan: Annotated[bool, typer.Option("--plan", help="Say what it takes, and run nothing.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="With --plan: from stored rates, in seconds, without a measurement.")
    ] = False,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="With --plan: for another machine: h100, h200, a100, l4 or 4090.")
    ] = None,
    count: Annotated[int | None, typer.Option("--count", min=1, help="How many of --gpu (1).")] = None,
    no_images: opt.NoImages = False,
    track: Annotated[str | None, typer.Option("--track", help="Follow it: wandb, trackio or tensorboard.")] = None,
) -> None:
    """Run a grid of data sets, methods, shots and seeds; the same command continues one that was stopped."""
    planned_for = _planned_for(only_plan, quick, gpu, count)
    device = device or ("cuda" if gpu else None)
    grid = {
        "shots": opt.numbers("shots", shots),
        "seeds": opt.numbers("seeds", seeds),
        "most_shots": opt.caps(most_shots),
    }
    fields = {"datasets": dataset, "methods": method, "prompts": prompt, **grid}
    values: dict[str, Any] = {"model": model, "limit_test": limit_test, "allow_fewer": allow_fewer or None}
    values |= {"thinking": thinking, "thoughts": thoughts, "train_on": train_on}
    compared = {"backbone": backbone, "readout": readout, "image_size": image_size, "vlm_features": vlm_features}
    compared |= {"loss": loss, "loss_power": loss_power, "start": start}
    named = _settings({**values, "calibration": calibration, **compared}, settings, fields)
    if gpu and device and device.startswith("cpu"):
        raise InputError(f"--device {device}, but --gpu {gpu} is for a GPU; leave one out")
    chosen = _choice(preset, dataset, method, named, device, service, elsewhere=gpu is not None)
    fields["methods"] = method or list(chosen.methods)
    content = _sweep_of(preset or "demo", fields, {**chosen.settings, **named})
    what: dict[str, Any] = {"service": service, "device": chosen.device, "access": access, "track": track}
    how: dict[str, Any] = {"executor": executor, "workers": workers, "threads": threads, "only_failed": only_failed}
    how["gpus_per_worker"] = gpus_per_worker
    given = [*named, *(["prompt"] if prompt else [])]
    what |= {"said": chosen.lines, "named": given}
    run(content, output, images=not no_images, planned_for=planned_for, **what, **how)


@opt.with_access
def zero_shot(
    dataset: opt.Datasets,
    model: opt.Model = None,
    prompt: opt.Prompts = None,
    calibration: opt.Calibration = None,
    thinking: opt.Thinking = None,
    thoughts: opt.Thoughts = None,
    service: opt.Service = "local",
    device: opt.Device = "cpu",
    limit_test: opt.LimitTest = None,
    access: "Access | None" = None,
    settings: opt.Set = None,
    output: Annotated[Path | None, typer.Option("--out", help="Results folder (default: runs/zero-shot-NAME).")] = None,
) -> None:
    """Accuracy of the model as it is, without any labelled example: a sweep of vlm-zero-shot alone."""
    grid = {"methods": ["vlm-zero-shot"], "shots": [1], "seeds": [0]}  # shots and seeds: this method has none
    fields = {"datasets": dataset, "prompts": prompt, **grid}
    values: dict[str, Any] = {"model": model, "limit_test": limit_test, "calibration": calibration}
    values |= {"thinking": thinking, "thoughts": thoughts}
    named = _settings(values, settings, fields)
    content = _sweep_of("demo", fields, named)
    folder = output or Path("runs") / f"zero-shot-{content.name}"
    run(content, folder, named=[*named], service=service, device=device, access=access)


def run(
    sweep: "Sweep",
    output: Path | None,
    *,
    images: bool = True,
    planned_for: "PlannedFor | None" = None,
    said: Sequence[str] = (),
    named: Sequence[str] = (),
    **options: Any,
) -> None:
    """Run what the folder lacks of the sweep and write its reports; planned_for: only print what that would take.
    images: whether report.html shows some of the data sets'. said: lines to print before it starts. named:
    settings that were given; those that no method reads are said. options: of RunOptions. Raises as `run_sweep` does:
    where cells failed, the reports are there and name them."""
    from experiments.sweep.choice import AUTO
    from experiments.sweep.config import RunOptions
    from experiments.sweep.grid import run_sweep
    from experiments.sweep.preflight import unread

    lone = unread(named, sweep.methods, sweep.variants)
    folder, chosen = output or Path("runs") / sweep.name, RunOptions(**options)
    if chosen.device == AUTO:
        chosen, why = _on_found_devices(sweep, chosen, planned_for)
        said = (*said, why)
    if planned_for:
        _print_plan(sweep, folder, chosen, (*said, *lone), planned_for)
    else:
        run_sweep(sweep, folder, chosen, _Terminal(chosen, images, said, lone))


def _on_found_devices(
    sweep: "Sweep", options: "RunOptions", planned_for: "PlannedFor | None"
) -> tuple["RunOptions", str]:
    """The options with what `--device auto` means on this machine, or on the one that is planned for, and why."""
    from experiments.plan.machines import USABLE, gpu
    from experiments.plan.ranks import automatic, gpus_here

    if options.executor == "ray":
        raise InputError("--device auto looks at the GPUs of this machine; on a Ray cluster give cpu or cuda")
    if options.gpus_per_worker > 1:
        raise InputError("--device auto says how many GPUs a worker gets; leave --gpus-per-worker out, or give cuda")
    if planned_for and planned_for.gpu:
        count, memory = planned_for.number, gpu(planned_for.gpu).memory * USABLE
    else:
        count, memory = gpus_here()
    device, each, why = automatic(sweep, options.service, count, memory)
    return replace(options, device=device, gpus_per_worker=each), why


class PlannedFor(NamedTuple):
    """What --plan answers for. gpu: of the table of machines; None: this machine. number: how many. quick: without a
    measurement."""

    gpu: str | None = None
    number: int = 1
    quick: bool = False


def _planned_for(only_plan: bool, quick: bool, gpu: str | None, count: int | None) -> PlannedFor | None:
    """None where nothing is to be planned. Raises InputError for an option without the one it belongs to, and for a GPU
    that is not in the table."""
    if not only_plan and (given := [n for n, value in (("quick", quick), ("gpu", gpu)) if value]):
        raise InputError(f"--{given[0]} is for --plan; give that too, or leave it out")
    if count is not None and gpu is None:
        raise InputError("--count is for --gpu NAME; give that too, or leave it out")
    if not only_plan:
        return None
    if gpu is not None:
        from experiments.plan.machines import gpu as known

        known(gpu)
    return PlannedFor(gpu, count or 1, quick)


def _settings(options: dict[str, Any], texts: list[str] | None, fields: dict[str, Any]) -> dict[str, Any]:
    """The settings that are named. options: those with an option of their own; several values are compared. texts: of
    --set. fields: of the sweep, which --prompt is one of."""
    several = {name: tuple(value) if isinstance(value, list) else (value,) for name, value in options.items()}
    values = {name: value[0] if len(value) == 1 else value for name, value in several.items()}
    return opt.settings_of(values, texts, *(["prompt"] if fields.get("prompts") else []))


def _sweep_of(preset: str, fields: dict[str, Any], settings: dict[str, Any]) -> "Sweep":
    """The sweep of a preset or file with the fields and the settings that are named over its own."""
    from experiments.sweep.config import load

    overrides = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items() if value}
    if "datasets" in overrides and preset == "demo":
        overrides["name"] = opt.sweep_name(overrides["datasets"])
    return load(preset, overrides, settings)


def _choice(
    preset: str | None,
    datasets: list[str] | None,
    methods: list[str] | None,
    settings: dict[str, Any],
    device: str | None,
    service: str,
    *,
    elsewhere: bool,
) -> "Choice":
    """The models of a sweep without a preset, as far as the settings do not name them."""
    from experiments.sweep.choice import Choice, choose

    if preset is not None:
        return Choice(device or "cpu")
    named = settings.get("model"), settings.get("backbone")
    return choose(datasets or [], methods or [], *named, device or "", service=service, elsewhere=elsewhere)


class _Terminal:
    """Shows on the terminal how a sweep goes, and reports it at its end."""

    def __init__(self, options: "RunOptions", images: bool, said: Sequence[str], later: Sequence[str]) -> None:
        """said, later: lines to print, before the data are read and once there is something to compute."""
        self._options, self._images, self._said, self._later = options, images, said, later

    def planning(self) -> AbstractContextManager[Any]:
        return err.status("reading the data")

    def planned(self, planned: "Plan") -> None:
        for line in self._said:
            err.print(line)

    @contextmanager
    def running(self, planned: "Plan", results: "Results", jobs: "Sequence[Job]") -> "Iterator[None]":
        """Raises InputError where memory or disk are too small for these jobs."""
        from experiments.sweep.preflight import fetch_weights

        if not jobs:
            some = "no cell has failed" if self._options.only_failed else f"all {len(planned.jobs)} cells are there"
            err.print(f"{some}: nothing to compute")
            yield
            return
        check_room(planned, results, jobs, self._options)
        if self._options.executor == "local":
            fetch_weights(jobs)  # once, before the workers; the hub's own bars show it
        for line in (*planned.about_data(), *self._later):
            err.print(line)
        total = len(planned.jobs)
        self._display = Display(jobs, total - len(planned.missing(results)), total)
        with self._display.shown():
            yield

    def started(self, job: "Job | EncodingJob") -> None:
        self._display.started(job)

    def finished(
        self, job: "Job | EncodingJob", failure: "Failure | None", record: Mapping[str, Any] | None, done: int
    ) -> None:
        self._display.finished(job, failure, record, done)

    def complete(self, planned: "Plan", results: "Results", content: dict[str, Any]) -> None:
        paths = report_of(results, content, planned if self._images else None)
        print_paths([results.folder, *paths])


def _print_plan(
    sweep: "Sweep", folder: Path, options: "RunOptions", before: Sequence[str], planned_for: PlannedFor
) -> None:
    """What the cells that are missing will take; where data must be fetched first, what all cells will."""
    from data import catalog
    from data.dataset import Access
    from experiments.plan.estimate import estimate, print_estimate
    from experiments.sweep.grid import continued, gpus_of, plan
    from experiments.sweep.store import Results
    from experiments.sweep.workload import adapt, is_here, of_jobs, of_sweep

    access = options.access or Access()
    where: dict[str, Any] = {"service": options.service, "device": options.device, "access": access}
    with err.status("counting and measuring"):
        accesses = catalog.accesses(sweep.datasets, access, sweep.protocol)
        if all(is_here(*each) for each in accesses.items()):
            results = Results(folder)
            planned = plan(continued(sweep, results), **where, here=False)
            jobs = planned.missing(results, only_failed=options.only_failed)
            workload, said = of_jobs(jobs, planned.datasets), [*planned.about_data()]
        else:
            workload = of_sweep(sweep, **where)
            datasets = {source: info.dataset for source, info in workload.datasets.items()}
            _, said = adapt(sweep, access, datasets)
        if planned_for.gpu or planned_for.quick:
            from experiments.plan.machines import gpu, this_machine
            from experiments.plan.stored import stored_estimate

            machine = gpu(planned_for.gpu) if planned_for.gpu else this_machine(options.device)
            number = planned_for.number if planned_for.gpu else max(1, len(gpus_of(options.device)))
            estimated = stored_estimate(workload, folder, options, machine, number)
        else:
            estimated = estimate(workload, folder, options)
    if options.executor == "ray" and not planned_for.gpu:
        said.append("--executor ray: the cluster is not known here; the plan is of a machine like this one")
    for line in (*before, *said):
        err.print(line)
    print_estimate(estimated)


def check_room(planned: "Plan", results: "Results", jobs: "Sequence[Job]", options: "RunOptions") -> None:
    """Raises InputError where memory or disk are too small for these jobs."""
    from experiments.plan.estimate import check, requirements
    from experiments.sweep.workload import of_jobs

    if options.executor == "local":  # the nodes of a cluster are other machines
        check(requirements(of_jobs(jobs, planned.datasets), results.folder, options))
