"""The command line. Turns arguments into calls and errors into one line; computes nothing itself.

Nothing heavy is imported before a command needs it: `kshot --help` and `kshot data list` answer at once.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments import cli_hub
from experiments.cli_bench import app as bench_app
from experiments.cli_data import Modified, Protocol, Root, Source, SplitFile, access_of
from experiments.cli_data import app as data_app
from experiments.cli_hub import Public, PushToHub, Yes
from experiments.cli_options import caps, file_name, numbers, pairs
from experiments.cli_predict import predict
from experiments.cli_run import How, report_of, run
from experiments.cli_serve import serve
from experiments.cli_train import train, zero_shot
from experiments.terminal import err, out, print_paths, print_summary
from kshot_errors import InputError, KshotError

app = typer.Typer(
    name="kshot",
    help="Few-shot image classification with a vision-language model that answers in text, against DINOv2 with a head.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app)
app.add_typer(bench_app)
# Typer carries a click of its own; the base of its usage errors has no public name.
UsageError: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
INTERRUPTED = 130  # the shells' status of a program that Ctrl-C ended

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


@app.callback(invoke_without_command=True)
@data_app.callback(invoke_without_command=True)
@bench_app.callback(invoke_without_command=True)
def help_or_version(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        out.print(f"kshot {installed('kshot')}", highlight=False)
        raise typer.Exit
    if context.invoked_subcommand is None:
        out.print(context.get_help(), markup=False, highlight=False)
        raise typer.Exit


@app.command()
def demo(output: Out = None, workers: Workers = None, no_images: NoImages = False) -> None:
    """Accuracy over shots on the embedded icons with the nano models: minutes on two cores."""
    from experiments.config import load

    run(load("demo", {}, {}), output, How(workers=workers, images=not no_images))


@app.command()
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
    from experiments.config import load

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
    how = How(service, device, access, executor, workers, threads, only_failed, only_plan, not no_images, track)
    run(load(preset, overrides, {**single, **values}), output, how)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A results folder.")],
    push_to_hub: PushToHub = None,
    yes: Yes = False,
    public: Public = False,
) -> None:
    """Compute the metrics of a results folder from its stored predictions, draw the figures and write the reports,
    without example images: those are in the reports that kshot sweep writes."""
    from experiments.store import Results

    cli_hub.check(push_to_hub, yes, public)
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
        cli_hub.offer(folder, push_to_hub, yes, public)


app.command("train")(train)
app.command("push")(cli_hub.push)
app.command("predict")(predict)
app.command("zero-shot")(zero_shot)
app.command("serve")(serve)


def main() -> None:
    """Entry point of the console script: one line for every error, status 2 for bad input and 1 for a failure."""
    try:
        status = app(standalone_mode=False)
    except KshotError as error:
        _fail(str(error), error.exit_status)
    except UsageError as error:
        _fail(f"{error.format_message()} (see kshot --help)", InputError.exit_status)
    except OSError as error:  # a disk that is full or gone
        _fail(str(error), KshotError.exit_status)
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    if status == INTERRUPTED:  # Typer turns Ctrl-C into this status from 0.26 on
        _fail("stopped; what was finished is kept, the same command goes on from there", INTERRUPTED)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int) -> None:
    err.print(f"kshot: {' '.join(message.split())}", style="red", markup=False, highlight=False)
    sys.exit(status)
