"""What `kshot sweep` does: plan, run, report, with what is seen of it in the terminal. Parses no options."""

from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.executors import EXECUTORS
from experiments.terminal import err, print_paths, print_summary, progress_bar
from kshot_errors import InputError, KshotError, UnknownNameError

if TYPE_CHECKING:
    from data.row import Access
    from experiments.config import Sweep
    from experiments.job import Job
    from experiments.store import Results
    from experiments.sweep import Plan
    from experiments.tracking import Tracker


@dataclass(frozen=True)
class How:
    """Who computes a sweep, what of it, and what is told of it. only_plan: nothing, but what it would take. images:
    whether report.html shows some of the data sets'. track: a row of `experiments.tracking.TRACKERS`."""

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


def run(sweep: "Sweep", output: Path | None, how: How) -> None:
    """Run what the folder lacks of the sweep and write its reports. Raises KshotError where cells failed: the report is
    there then, and says which."""
    from experiments.store import Results
    from experiments.sweep import plan

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
    from experiments.command import command
    from experiments.report import write_report

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


def _execute(planned: "Plan", results: "Results", jobs: "list[Job]", how: How, follow: "Tracker | None") -> None:
    from experiments.job import Job
    from experiments.methods import METHODS
    from experiments.sweep import execute

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


def _tracker(how: How) -> "Tracker | None":
    from experiments.tracking import tracker

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


def _say_plan(sweep: "Sweep", results: "Results", how: How) -> None:
    """Print what the cells that are missing will take; where data must be fetched first, what all cells will."""
    from data.row import Access
    from experiments.estimate import estimate, of_jobs, of_sweep
    from experiments.estimate_parts import is_here
    from experiments.estimate_table import print_estimate
    from experiments.sweep import gpus_of, plan, ways_of

    with err.status("counting and measuring"):
        if all(is_here(*way) for way in ways_of(sweep, how.access or Access()).items()):
            planned = plan(sweep, service=how.service, device=how.device, access=how.access)
            todo = of_jobs(planned.missing(results, only_failed=how.only_failed), planned.datasets)
        else:
            todo = of_sweep(sweep, service=how.service, device=how.device, access=how.access)
        gpus = gpus_of(how.device)
        found = estimate(todo, results.folder, how.workers, threads=how.threads, gpus=gpus, device=how.device)
    print_estimate(found)


def _check_room(planned: "Plan", results: "Results", jobs: "list[Job]", how: How) -> None:
    """Raises InputError where memory or disk are too small for these jobs."""
    from experiments.estimate import check, of_jobs, room
    from experiments.sweep import gpus_of

    if how.executor == "local":  # the nodes of a cluster are other machines
        todo = of_jobs(jobs, planned.datasets)
        gpus = gpus_of(how.device)
        check(room(todo, results.folder, how.workers, threads=how.threads, gpus=gpus, device=how.device))
