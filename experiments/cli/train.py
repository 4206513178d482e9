"""`kshot train`: an adapter, and how its training goes."""

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from experiments.cli import hub
from experiments.cli import options as opt
from experiments.terminal import err, out, print_paths
from kshot.errors import INTERRUPTED

if TYPE_CHECKING:
    from experiments.adapters.train import Step

INTERVAL = 10  # seconds between two lines of progress, where there is no terminal


def train(
    dataset: opt.Dataset,
    shots: Annotated[int, typer.Option("--shots", min=1, metavar="K", help="Labelled examples a class.")],
    output: Annotated[Path, typer.Option("--out", metavar="DIR", help="The adapter's folder: new or empty.")],
    seed: Annotated[int, typer.Option("--seed", min=0, help="Draws the examples, their order and the adapter.")] = 0,
    model: opt.Model = None,
    prompt: opt.Prompt = None,
    loss: opt.Loss = None,
    device: opt.Device = "cpu",
    allow_fewer: opt.Fewer = False,
    source: opt.Source = "",
    root: opt.Root = None,
    protocol: opt.Protocol = "",
    split_file: opt.SplitFile = None,
    allow_modified: opt.Modified = False,
    settings: opt.Set = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an adapter that is there.")] = False,
    push_to_hub: opt.PushToHub = None,
    yes: opt.Yes = False,
    public: opt.Public = False,
) -> None:
    """Train an adapter as the sweep's vlm-lora does, for kshot predict and for PEFT."""
    from experiments.adapters.folder import check_target
    from experiments.adapters.train import plan_training
    from experiments.adapters.train import train as run
    from experiments.sweep.provenance import notes

    check_target(output, force=force)
    hub.check_options(push_to_hub, yes, public)
    options = {"model": model, "prompt": prompt, "loss": loss, "allow_fewer": allow_fewer or None}
    values = opt.settings_of(options, settings)
    access = opt.access_of(source, root, "", split_file, allow_modified)
    with err.status("reading the data"):
        job, data = plan_training(dataset, shots, seed, values, protocol=protocol, device=device, access=access)
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


def _show(steps: Iterable["Step"]) -> None:
    """A bar on a terminal; else a line for the first and the last step, and now and then between."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    texts = TextColumn("step {task.completed}/{task.total}"), BarColumn(16), TextColumn("{task.description}")
    progress = Progress(*texts, TimeElapsedColumn(), TimeRemainingColumn(), console=err, disable=not err.is_terminal)
    with progress:
        task, printed = progress.add_task("reading the model", total=None), 0.0
        for step in steps:
            text, due = f"loss {step.loss:.3f}", time.monotonic() - printed >= INTERVAL or step.number == step.steps
            progress.update(task, completed=step.number, total=step.steps, description=text)
            if due and not err.is_terminal:
                printed = time.monotonic()
                err.print(f"step {step.number}/{step.steps} {text}", highlight=False)
