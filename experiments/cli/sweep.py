"""What `kshot sweep` does: plan, run, report, with what is seen of it in the terminal. Parses no options."""

from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from experiments.cli import hub
from experiments.cli.data import Modified, Protocol, Root, Source, SplitFile, access_of
from experiments.cli.hub import Public, PushToHub, Yes
from experiments.cli.options import caps, file_name, numbers, pairs
from experiments.sweep.workers import EXECUTORS
from experiments.terminal import err, out, plain_table, print_paths, progress_bar
from kshot.errors import InputError, KshotError, UnknownNameError

if TYPE_CHECKING:
    from data.dataset import Access
    from experiments.sweep.cells import Job
    from experiments.sweep.config import Sweep
    from experiments.sweep.grid import Plan
    from experiments.sweep.intervals import Score
    from experiments.sweep.store import Results
    from experiments.sweep.tracking import Tracker


@dataclass(frozen=True)
class RunOptions:
    """Who computes a sweep, what of it, and what is told of it. only_plan: nothing, but what it would take. images:
    whether report.html shows some of the data sets'. track: a row of `experiments.sweep.tracking.TRACKERS`."""

    service: str = "local"
    device: str = "cpu"
    access: "Access | None" = None
    executor: str = "local"
    workers: int | None = None
    threads: int = 1
    only_failed: bool = False
    only_plan: bool = False
    images: bool = True
    track: str | None = None


def run(sweep: "Sweep", output: Path | None, how: RunOptions) -> None:
    """Run what the folder lacks of the sweep and write its reports. Raises KshotError where cells failed: the report is
    there then, and says which."""
    from experiments.sweep.grid import plan
    from experiments.sweep.store import Results

    if how.executor not in EXECUTORS:
        raise UnknownNameError("executor", how.executor, EXECUTORS)
    results = Results(output or Path("runs") / sweep.name)
    if how.only_plan:
        _say_plan(sweep, results, how)
        return
    tracker = _tracker(how)
    with err.status("reading the data"):
        planned = plan(sweep, service=how.service, device=how.device, access=how.access)
    with results.writing():
        content = results.begin(planned.describe())
        jobs = planned.missing(results, only_failed=how.only_failed)
        if jobs:
            _check_room(planned, results, jobs, how)
            with _followed(tracker, sweep.name, content, results) as follow:
                _execute(planned, results, jobs, how, follow)
        elif how.only_failed:
            err.print("no cell has failed: nothing to compute", highlight=False)
        else:
            err.print(f"all {len(planned.jobs)} cells are there: nothing to compute", highlight=False)
        paths = report_of(results, content, planned if how.images else None)
    print_summary(content, results.cells())
    print_paths([results.folder, *paths])
    _check_failures(results, jobs)


def report_of(results: "Results", content: dict[str, Any], planned: "Plan | None" = None) -> list[Path]:
    """Write the reports of what is stored. planned: where their example images come from; None: they have none."""
    from experiments.report.report import write_report
    from experiments.sweep.config import command

    with err.status("drawing the report"):
        cells, classes = results.cells(), content["classes"]
        images = {cell["dataset"]: cell["test_images"] for cell in cells}
        counts = {dataset: len(names) for dataset, names in classes.items()}
        described = {**content, "command": command(content)}
        shown = _album(planned) if planned else {}
        failures = {(f["dataset"], f["method"], f["shots"], f["seed"]): f["error"] for f in results.failures()}
        return write_report(results.folder, described, cells, images, n_classes=counts, failures=failures, **shown)


def _album(planned: "Plan") -> dict[str, Any]:
    """Where the report gets images: a test image by its key, and the first training image of a class."""
    sets = {dataset.name: dataset for dataset in planned.datasets.values()}
    tests = {name: {example.key: example for example in dataset.test} for name, dataset in sets.items()}

    def test(name: str, key: str) -> bytes | None:
        return tests[name][key].image if key in tests.get(name, {}) else None

    def training(name: str, label: int) -> bytes | None:
        return next((e.image for e in sets[name].train if e.label == label), None) if name in sets else None

    return {"pictures": test, "training": training}


def _execute(planned: "Plan", results: "Results", jobs: "list[Job]", how: RunOptions, follow: "Tracker | None") -> None:
    from experiments.sweep.cells import Job
    from experiments.sweep.grid import execute
    from experiments.sweep.methods import METHODS

    total = len(planned.jobs)
    done, cost = total - len(planned.missing(results)), sum(METHODS[job.cell.method].cost for job in jobs)
    answers = execute(planned, results, jobs, how.executor, how.workers, how.threads)
    with progress_bar() as progress, closing(answers):
        task = progress.add_task("starting", total=cost, count=f"{done}/{total}")
        for job, failure in answers:
            name, spent = str(job), 0.0
            if isinstance(job, Job):
                done += failure is None
                name, spent = f"{job.cell.method}, k={job.cell.shots}", METHODS[job.cell.method].cost
                if follow and not failure:
                    follow.cell(results.cell(job.cell.key), done, total)
            progress.update(task, advance=spent, description=name, count=f"{done}/{total}")
            if failure:
                err.print(f"failed: {job}: {failure.message}", style="yellow", markup=False, highlight=False)
            elif not err.is_terminal:
                err.print(f"{done}/{total} {job}", markup=False, highlight=False)


def _tracker(how: RunOptions) -> "Tracker | None":
    from experiments.sweep.tracking import tracker

    return None if how.track is None else tracker(how.track)


@contextmanager
def _followed(
    tracker: "Tracker | None", name: str, content: dict[str, Any], results: "Results"
) -> "Iterator[Tracker | None]":
    if tracker is None:
        yield None
        return
    tracker.start(name, content, results.folder)
    try:
        yield tracker
    finally:
        tracker.finish()


def _check_failures(results: "Results", jobs: "Iterable[Job]") -> None:
    """Raises KshotError where cells of this run failed, InputError where input was wrong with all of them."""
    keys = {job.cell.key for job in jobs}
    if failed := [record for record in results.failures() if record["key"] in keys]:
        first, wrong = failed[0], all(record["exit_status"] == InputError.exit_status for record in failed)
        cell = f"{first['method']} on {first['dataset']}, {first['shots']} shots, seed {first['seed']}"
        raise (InputError if wrong else KshotError)(
            f"{len(failed)} of {len(keys)} cells failed, first {cell}: {first['error']} (the same command tries them "
            "again, and --only-failed them alone)"
        )


def _say_plan(sweep: "Sweep", results: "Results", how: RunOptions) -> None:
    """Print what the cells that are missing will take; where data must be fetched first, what all cells will."""
    from data.dataset import Access
    from experiments.plan.estimate import estimate, of_jobs, of_sweep, print_estimate
    from experiments.sweep.grid import gpus_of, plan, ways_of
    from experiments.sweep.workload import is_here

    with err.status("counting and measuring"):
        if all(is_here(*way) for way in ways_of(sweep, how.access or Access()).items()):
            planned = plan(sweep, service=how.service, device=how.device, access=how.access)
            todo = of_jobs(planned.missing(results, only_failed=how.only_failed), planned.datasets)
        else:
            todo = of_sweep(sweep, service=how.service, device=how.device, access=how.access)
        gpus = gpus_of(how.device)
        found = estimate(todo, results.folder, how.workers, threads=how.threads, gpus=gpus, device=how.device)
    print_estimate(found)


def _check_room(planned: "Plan", results: "Results", jobs: "list[Job]", how: RunOptions) -> None:
    """Raises InputError where memory or disk are too small for these jobs."""
    from experiments.plan.estimate import check, of_jobs, room
    from experiments.sweep.grid import gpus_of

    if how.executor == "local":  # the nodes of a cluster are other machines
        todo = of_jobs(jobs, planned.datasets)
        gpus = gpus_of(how.device)
        check(room(todo, results.folder, how.workers, threads=how.threads, gpus=gpus, device=how.device))


def print_summary(content: dict[str, Any], cells: list[dict[str, Any]]) -> None:
    """Accuracy by method (and what is compared) and shots for each data set, and what must be said of the models."""
    from experiments.sweep.metrics import scores
    from experiments.sweep.series import by_series, from_zero, method_of

    sweep, records = by_series(content, cells)
    numbers = _numbers(sweep["methods"])
    for dataset in content["datasets"]:
        found = from_zero(scores(records, dataset))
        shots = sorted({k for row in found.values() for k in row})
        table = plain_table(["method", *(f"k={k}" for k in shots)])
        for series in sweep["methods"]:
            under = _under(series)
            title = method_of(series) + (f" #{numbers[under]}" if under else "")  # 80 columns are few
            table.add_row(title, *(_mean(found.get(series, {}).get(k)) for k in shots))
        out.print(f"{dataset}: accuracy in %, ± 95% over seeds", style="bold", markup=False, highlight=False)
        out.print(table, soft_wrap=False)
        out.print()
    for under, number in numbers.items():
        out.print(f"#{number}: {under}", markup=False, highlight=False)
    for note in content["notes"]:
        out.print(note, style="yellow", markup=False, highlight=False)


def _numbers(methods: Iterable[str]) -> dict[str, int]:
    """What series are run under → the number that stands for it, from 1: prompts first, as they are numbered."""
    from experiments.sweep.series import PROMPT, choices_of

    series = sorted(methods, key=lambda each: PROMPT not in {choice.setting for choice in choices_of(each)})
    found = dict.fromkeys(under for each in series if (under := _under(each)))
    return {under: number for number, under in enumerate(found, 1)}


def _under(series: str) -> str:
    """What a series is run under of what is compared, a prompt with its words."""
    from experiments.sweep.series import PROMPT, choices_of, said

    return ", ".join(f"prompt {c.value}" if c.setting == PROMPT else said(c) for c in choices_of(series))


def _mean(score: "Score | None") -> str:
    if score is None:
        return ""
    half = "" if score.half_width is None else f"±{100 * score.half_width:.1f}"
    return f"{100 * score.mean:.1f}{half}"


Out = Annotated[Path | None, typer.Option("--out", help="Results folder (default: runs/NAME).")]
Workers = Annotated[int | None, typer.Option("--workers", min=1, help="Processes (default: one a core, or one a GPU).")]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Of each worker; more change results by rounding.")]
Prompts = Annotated[
    list[str] | None,
    typer.Option("--prompt", help="recipe, or '{image}QUESTION => ANSWER {label}'; repeat to compare."),
]
Backbones = Annotated[
    list[str] | None, typer.Option("--backbone", help="DINOv2: a name or a timm name; repeat to compare.")
]
Readouts = Annotated[
    list[str] | None,
    typer.Option("--readout", help="Of DINOv2: cls, cls+mean, last4, last4+mean or pooled; repeat to compare."),
]
ImageSizes = Annotated[
    list[str] | None,
    typer.Option(
        "--image-size",
        metavar="own|PIXELS",
        help="Of DINOv2's input, a square, or each image's own; repeat to compare.",
    ),
]
Features = Annotated[
    list[str] | None,
    typer.Option("--vlm-features", help="For a head on the VLM: tower, hidden or tower+hidden; repeat to compare."),
]
LossName = Annotated[str | None, typer.Option("--loss", help="What LoRA learns: text or closed-set.")]
Calibration = Annotated[
    str | None, typer.Option("--calibration", help="Of the VLM's scores: none, contextual, pmi or validated.")
]
NoImages = Annotated[bool, typer.Option("--no-images", help="No example images in report.html.")]
Force = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting of the sweep.")]


def demo(output: Out = None, workers: Workers = None, no_images: NoImages = False) -> None:
    """Accuracy over shots on the embedded icons with the nano models: minutes on two cores."""
    from experiments.sweep.config import load

    run(load("demo", {}, {}), output, RunOptions(workers=workers, images=not no_images))


def sweep(
    preset: Annotated[str, typer.Argument(help="A preset's name or a YAML file.")] = "demo",
    dataset: Annotated[list[str] | None, typer.Option("--dataset", help="See kshot data list; repeat.")] = None,
    method: Annotated[list[str] | None, typer.Option("--method", help="Repeat for several.")] = None,
    shots: Annotated[str | None, typer.Option("--shots", help="Labelled examples a class, as 1,2,4.")] = None,
    seeds: Annotated[str | None, typer.Option("--seeds", help="As 0,1,2.")] = None,
    most_shots: Annotated[
        list[str] | None, typer.Option("--most-shots", metavar="DATASET=K", help="For one with fewer images; repeat.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Qwen3-VL: 2B, 4B, 8B, 30B-A3B, 235B-A22B, a folder or a hub id.")
    ] = None,
    backbone: Backbones = None,
    readout: Readouts = None,
    image_size: ImageSizes = None,
    vlm_features: Features = None,
    prompt: Prompts = None,
    loss: LossName = None,
    calibration: Calibration = None,
    service: Annotated[str, typer.Option("--service", help="local, tinker or an http address.")] = "local",
    device: Annotated[str, typer.Option("--device", help="cpu, cuda (all GPUs, one a worker) or cuda:N.")] = "cpu",
    executor: Annotated[str, typer.Option("--executor", help="local, or ray: a Ray cluster.")] = "local",
    limit_test: Annotated[str | None, typer.Option(metavar="N", help="Test on this many images.")] = None,
    allow_fewer: Annotated[bool, typer.Option("--allow-fewer", help="Take fewer where a class has no k.")] = False,
    source: Source = "",
    root: Root = None,
    protocol: Protocol = "",
    split_file: SplitFile = None,
    allow_modified: Modified = False,
    settings: Force = None,
    output: Out = None,
    workers: Workers = None,
    threads: Threads = 1,
    only_failed: Annotated[bool, typer.Option("--only-failed", help="Try only cells that failed.")] = False,
    only_plan: Annotated[bool, typer.Option("--plan", help="Say what it takes, and run nothing.")] = False,
    no_images: NoImages = False,
    track: Annotated[str | None, typer.Option("--track", help="Follow it: wandb, trackio or tensorboard.")] = None,
) -> None:
    """Run a grid of data sets, methods, shots and seeds; the same command continues one that was stopped."""
    from experiments.sweep.config import load

    grid = {"shots": numbers("shots", shots), "seeds": numbers("seeds", seeds)}
    several: dict[str, Any] = {"datasets": dataset, "methods": method, "prompts": prompt, **grid}
    overrides: dict[str, Any] = {name: tuple(value) for name, value in several.items() if value}
    if dataset and preset == "demo":
        overrides["name"] = "-".join(file_name(name) for name in dict.fromkeys(dataset))
    chosen = {"model": model, "limit_test": limit_test, "allow_fewer": allow_fewer or None}
    chosen |= {"loss": loss, "calibration": calibration}
    repeated = {"backbone": backbone, "readout": readout, "image_size": image_size, "vlm_features": vlm_features}
    values: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    values |= {name: given[0] if len(given) == 1 else tuple(given) for name, given in repeated.items() if given}
    single = pairs(settings)
    if twice := sorted({*values, *(["prompt"] if prompt else [])} & single.keys()):
        raise InputError(f"{twice[0]} is given twice: as an option and with --set; leave one out")
    if protocol:
        overrides["protocol"] = protocol
    if most_shots:
        overrides["most_shots"] = caps(most_shots)
    access = access_of(source, root, "", split_file, allow_modified)
    how = RunOptions(service, device, access, executor, workers, threads, only_failed, only_plan, not no_images, track)
    run(load(preset, overrides, {**single, **values}), output, how)


def report(
    folder: Annotated[Path, typer.Argument(help="A results folder.")],
    push_to_hub: PushToHub = None,
    yes: Yes = False,
    public: Public = False,
) -> None:
    """Compute the metrics of a results folder from its stored predictions, draw the figures and write the reports,
    without example images: those are in the reports that kshot sweep writes."""
    from experiments.sweep.store import Results

    hub.check(push_to_hub, yes, public)
    results = Results(folder)
    content = results.sweep()
    with results.writing():
        if not results.has_predictions():
            out.print(f"{folder} has no predictions: its metrics are taken as they are recorded", style="yellow")
        elif wrong := results.recompute():
            out.print(f"metrics of {wrong} cells did not fit their predictions and are corrected", style="yellow")
        paths = report_of(results, content)
    print_summary(content, results.cells())
    print_paths(paths)
    if push_to_hub is not None:
        hub.offer(folder, push_to_hub, yes, public)
