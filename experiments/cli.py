"""The command line. Turns arguments into calls and errors into one line; computes nothing itself.

Nothing heavy is imported before a command needs it: `kshot --help` and `kshot data list` answer at once.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kshot_errors import InputError, KshotError, UnknownNameError

if TYPE_CHECKING:
    from experiments.config import Sweep
    from experiments.metrics import Score
    from experiments.sweep import Plan

app = typer.Typer(
    name="kshot",
    help="Few-shot image classification with a vision-language model that answers in text, against DINOv2 with a head.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(name="data", help="The data sets.", no_args_is_help=True)
app.add_typer(data_app)
# Typer carries a click of its own; the base of its usage errors has no public name.
UsageError: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
out, err = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)

Out = Annotated[Path | None, typer.Option("--out", help="Results folder (default: runs/NAME).")]
Workers = Annotated[int | None, typer.Option("--workers", min=1, help="Processes (default: one a core).")]
Force = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting of the sweep.")]


@app.command()
def demo(output: Out = None, workers: Workers = None) -> None:
    """Accuracy over shots on the embedded icons with the nano models: minutes on two cores."""
    from experiments.config import load

    _run(load("demo", {}, {}), output, workers)


@app.command()
def sweep(
    preset: Annotated[str, typer.Argument(help="A preset's name or a YAML file.")] = "demo",
    dataset: Annotated[list[str] | None, typer.Option("--dataset", help="icons, digits or folder:PATH.")] = None,
    method: Annotated[list[str] | None, typer.Option("--method", help="Repeat for several.")] = None,
    shots: Annotated[str | None, typer.Option("--shots", help="Labelled examples a class, as 1,2,4.")] = None,
    seeds: Annotated[str | None, typer.Option("--seeds", help="As 0,1,2.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Qwen3-VL: a name, a folder or a hub id.")] = None,
    backbone: Annotated[str | None, typer.Option("--backbone", help="DINOv2: a name or a timm name.")] = None,
    service: Annotated[str, typer.Option("--service", help="local, tinker or an http address.")] = "local",
    device: Annotated[str, typer.Option("--device", help="cpu, or cuda with one worker.")] = "cpu",
    limit_test: Annotated[int | None, typer.Option("--limit-test", help="Test on this many images.")] = None,
    allow_fewer: Annotated[bool, typer.Option("--allow-fewer", help="Take fewer where a class has no k.")] = False,
    settings: Force = None,
    output: Out = None,
    workers: Workers = None,
) -> None:
    """Run a grid of data sets, methods, shots and seeds; the same command continues one that was stopped."""
    from experiments.config import load

    numbers = {"shots": _numbers("shots", shots), "seeds": _numbers("seeds", seeds)}
    given: dict[str, Any] = {"datasets": dataset, "methods": method, **numbers}
    overrides: dict[str, Any] = {name: tuple(value) for name, value in given.items() if value}
    if dataset and preset == "demo":
        overrides["name"] = "-".join(_file_name(name) for name in dataset)
    chosen = {"model": model, "backbone": backbone, "limit_test": limit_test, "allow_fewer": allow_fewer or None}
    values = {name: value for name, value in chosen.items() if value is not None}
    _run(load(preset, overrides, {**_pairs(settings), **values}), output, workers, service, device)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A results folder.")]) -> None:
    """Draw the figures and write the reports of a results folder anew, from its stored predictions."""
    from experiments.store import Results

    results = Results(folder)
    content = results.sweep()
    with results.writing():
        paths = _report(results, content)
    _summary(content, results.cells())
    _print_paths(paths)


@data_app.command("list")
def list_data() -> None:
    """The data sets that can be named, with their sizes and licences."""
    from data.catalog import DATASETS

    table = Table("name", "classes", "train", "test", "licence", "title", box=None, pad_edge=False)
    for row in DATASETS.values():
        classes = str(len(row.classes)) if row.classes else "?"
        table.add_row(row.name, classes, str(row.train), str(row.test), row.licence, row.title)
    table.add_row("folder:PATH", "?", "?", "?", "yours", "PATH/{train,test}/<class>/* or PATH/<class>/*")
    out.print(table)


def main() -> None:
    """Entry point of the console script: one line for every error, status 2 for bad input and 1 for a failure."""
    try:
        status = app(standalone_mode=False)
    except KshotError as error:
        _fail(str(error), error.exit_status)
    except UsageError as error:
        _fail(f"{error.format_message()} (see kshot --help)", InputError.exit_status)
    except (KeyboardInterrupt, typer.Abort):
        _fail("stopped; what was finished is kept, the same command goes on from there", 130)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int) -> None:
    err.print(f"kshot: {' '.join(message.split())}", style="red", markup=False, highlight=False)
    sys.exit(status)


def _run(sweep: "Sweep", output: Path | None, workers: int | None, service: str = "local", device: str = "cpu") -> None:
    from experiments.store import Results
    from experiments.sweep import plan

    with err.status("reading the data"):
        planned = plan(sweep, service=service, device=device)
    results = Results(output or Path("runs") / sweep.name)
    with results.writing():
        content = results.begin(planned.describe())
        _execute(planned, results, workers if device == "cpu" else 1)
        paths = _report(results, content)
    _summary(content, results.cells())
    for note in content["notes"]:
        out.print(note, style="yellow", markup=False, highlight=False)
    _print_paths([results.folder, *paths])


def _execute(planned: "Plan", results: Any, workers: int | None) -> None:
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from experiments.methods import METHODS
    from experiments.sweep import execute

    done = sum(results.has(job.cell.key) for job in planned.jobs)
    left = TimeRemainingColumn(), TextColumn("left"), TextColumn("{task.description}", style="dim")
    columns = TextColumn("cells"), BarColumn(), TextColumn("{task.fields[count]}"), TimeElapsedColumn(), *left
    total = sum(METHODS[job.cell.method].cost for job in planned.jobs if not results.has(job.cell.key))
    with Progress(*columns, console=err) as progress:
        task = progress.add_task("starting", total=total, count=f"{done}/{len(planned.jobs)}")
        for job in execute(planned, results, workers):
            done += 1
            count = f"{done}/{len(planned.jobs)}"
            progress.update(task, advance=METHODS[job.cell.method].cost, description=str(job), count=count)


def _report(results: Any, content: dict[str, Any]) -> list[Path]:
    from experiments.report import write_report

    with err.status("drawing the report"):
        cells, classes = results.cells(), content["classes"]
        images = {cell["dataset"]: results.predictions(cell["key"]).num_rows for cell in cells}
        counts = {dataset: len(names) for dataset, names in classes.items()}
        return write_report(results.folder, content, cells, images, n_classes=counts)


def _summary(content: dict[str, Any], cells: list[dict[str, Any]]) -> None:
    from experiments.metrics import scores

    for dataset in content["datasets"]:
        found = scores(cells, dataset)
        shots = sorted({k for row in found.values() for k in row})
        table = Table("method", *(f"k={k}" for k in shots), title=f"{dataset}: accuracy in %, ± 95% over seeds")
        for method in content["methods"]:
            table.add_row(method, *(_mean(found.get(method, {}).get(k)) for k in shots))
        out.print(table)


def _mean(score: "Score | None") -> str:
    if score is None:
        return ""
    half = "" if score.half_width is None else f" ± {100 * score.half_width:.1f}"
    return f"{100 * score.mean:.1f}{half}"


def _print_paths(paths: list[Path]) -> None:
    for path in paths:
        out.print(f"wrote {path}", markup=False, highlight=False)


def _numbers(name: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--{name} {text!r} is not a list of whole numbers; write it as 1,2,4") from error


def _pairs(settings: list[str] | None) -> dict[str, str]:
    from experiments.config import Settings

    pairs = dict(text.partition("=")[::2] for text in settings or [])
    for key in pairs:
        if key not in Settings.model_fields:
            raise UnknownNameError("setting", key, Settings.model_fields)
    return pairs


def _file_name(dataset: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(dataset).name)
