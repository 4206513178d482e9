"""`kshot train` and `kshot zero-shot`: turn arguments into calls, and show how training goes."""

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from experiments.cli import hub
from experiments.cli.data import Modified, Protocol, Root, Source, SplitFile, access_of
from experiments.cli.hub import Public, PushToHub, Yes
from experiments.cli.options import file_name, pairs
from experiments.terminal import err, out, print_paths
from kshot.errors import INTERRUPTED, InputError

if TYPE_CHECKING:
    from experiments.adapters.train import Step

EVERY = 10  # seconds between two lines of progress, where there is no terminal

DatasetName = Annotated[str, typer.Option("--dataset", help="A name of kshot data list, folder:PATH or hub:ID.")]
Datasets = Annotated[list[str], typer.Option("--dataset", help="See kshot data list; repeat.")]
ModelName = Annotated[str | None, typer.Option("--model", help="Qwen3-VL: a name, a folder or a hub id.")]
Device = Annotated[str, typer.Option("--device", help="cpu or cuda.")]
Phrasing = Annotated[str | None, typer.Option("--prompt", help="recipe, or '{image}QUESTION => ANSWER {label}'.")]
Fewer = Annotated[bool, typer.Option("--allow-fewer", help="Take fewer where a class has no k.")]


def train(
    dataset: DatasetName,
    shots: Annotated[int, typer.Option("--shots", min=1, metavar="K", help="Labelled examples a class.")],
    output: Annotated[Path, typer.Option("--out", metavar="DIR", help="The adapter's folder: new or empty.")],
    seed: Annotated[int, typer.Option("--seed", min=0, help="Draws the examples, their order and the adapter.")] = 0,
    model: ModelName = None,
    prompt: Phrasing = None,
    loss: Annotated[str | None, typer.Option("--loss", help="What is learnt: text or closed-set.")] = None,
    device: Device = "cpu",
    allow_fewer: Fewer = False,
    source: Source = "",
    root: Root = None,
    protocol: Protocol = "",
    split_file: SplitFile = None,
    allow_modified: Modified = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting of training.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an adapter that is there.")] = False,
    push_to_hub: PushToHub = None,
    yes: Yes = False,
    public: Public = False,
) -> None:
    """Train an adapter as the sweep's vlm-lora does, for kshot predict and for PEFT."""
    from experiments.adapters.folder import check_target
    from experiments.adapters.train import planned
    from experiments.adapters.train import train as run
    from experiments.sweep.provenance import notes

    check_target(output, force=force)
    hub.check(push_to_hub, yes, public)
    chosen = {"model": model, "prompt": prompt, "loss": loss, "allow_fewer": allow_fewer or None}
    values = _joined({name: value for name, value in chosen.items() if value is not None}, settings)
    access = access_of(source, root, "", split_file, allow_modified)
    with err.status("reading the data"):
        job, data = planned(dataset, shots, seed, values, protocol=protocol, device=device, access=access)
    err.print(f"training {job.cell}", markup=False, highlight=False)
    try:
        _show(run(job, data, output, force=force))
    except KeyboardInterrupt:
        err.print("kshot: stopped; nothing was written", style="red", highlight=False)
        sys.exit(INTERRUPTED)
    for note in notes(job.settings, {"model"}):
        out.print(note, style="yellow", markup=False, highlight=False)
    print_paths([output])
    if push_to_hub is not None:
        hub.offer(output, push_to_hub, yes, public)


def zero_shot(
    dataset: Datasets,
    model: ModelName = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="As sweep's; repeat to compare.")] = None,
    calibration: Annotated[str | None, typer.Option("--calibration", help="none, contextual or pmi.")] = None,
    service: Annotated[str, typer.Option("--service", help="local, tinker or an http address.")] = "local",
    device: Device = "cpu",
    limit_test: Annotated[str | None, typer.Option(metavar="N", help="Test on this many images.")] = None,
    source: Source = "",
    root: Root = None,
    protocol: Protocol = "",
    split_file: SplitFile = None,
    allow_modified: Modified = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting of the sweep.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--out", help="Results folder (default: runs/zero-shot-NAME).")] = None,
) -> None:
    """Accuracy of the model as it is, without any labelled example: a sweep of vlm-zero-shot alone."""
    from experiments.cli.sweep import sweep

    name = "-".join(file_name(each) for each in dict.fromkeys(dataset))
    sweep(
        dataset=dataset,
        method=["vlm-zero-shot"],
        shots="1",  # of a sweep's grid; this method has none
        seeds="0",
        model=model,
        prompt=prompt,
        calibration=calibration,
        service=service,
        device=device,
        limit_test=limit_test,
        source=source,
        root=root,
        protocol=protocol,
        split_file=split_file,
        allow_modified=allow_modified,
        settings=settings,
        output=output or Path("runs") / f"zero-shot-{name}",
        workers=None,
    )


def _joined(values: dict[str, Any], settings: list[str] | None) -> dict[str, Any]:
    single = pairs(settings)
    if twice := sorted(values.keys() & single.keys()):
        raise InputError(f"{twice[0]} is given twice: as an option and with --set; leave one out")
    return {**single, **values}


def _show(steps: Iterable["Step"]) -> None:
    """A bar on a terminal; else a line for the first and the last step, and now and then between."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    texts = TextColumn("step {task.completed}/{task.total}"), BarColumn(16), TextColumn("{task.description}")
    progress = Progress(*texts, TimeElapsedColumn(), TimeRemainingColumn(), console=err, disable=not err.is_terminal)
    with progress:
        task, said = progress.add_task("reading the model", total=None), 0.0
        for step in steps:
            text, due = f"loss {step.loss:.3f}", time.monotonic() - said >= EVERY or step.number == step.steps
            progress.update(task, completed=step.number, total=step.steps, description=text)
            if due and not err.is_terminal:
                said = time.monotonic()
                err.print(f"step {step.number}/{step.steps} {text}", highlight=False)
