"""`kshot train`, `predict`, `export` and `push`: an adapter is trained, classifies images, is written for other
programs, and is sent to the hub; and --push-to-hub of other commands. Without --yes nothing is sent and the hub is not
contacted."""

import json
import os
import shlex
import sys
import time
from collections.abc import Iterable
from contextlib import closing
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from experiments.cli import options as opt
from experiments.terminal import err, fail, out, print_paths, progress_bar
from kshot.errors import INTERRUPTED, InputError, KshotError
from kshot.files import decoded_text
from kshot.untrusted import read_file

if TYPE_CHECKING:
    from data.dataset import Access, Dataset
    from experiments.adapters.predict import Prediction, Window
    from experiments.adapters.train import Step
    from experiments.sweep.cells import Job

MEASURED = 3  # steps after which the time of the others is estimated
LONG = 60  # seconds: what is shorter is not announced
INTERVAL = 10  # seconds between two lines of progress, where there is no terminal
BROKEN_PIPE = 141  # the shells' status of a program whose reader has gone


@opt.with_access
def train(
    dataset: opt.Dataset,
    shots: Annotated[int, typer.Option("--shots", min=1, metavar="K", help="Labelled examples a class.")],
    output: Annotated[Path, typer.Option("--out", metavar="DIR", help="The trained model's folder: new or empty.")],
    method: Annotated[
        str, typer.Option("--method", help="vlm-lora, dinov2-lora, dinov2-logreg or dinov2-ridge.")
    ] = "vlm-lora",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Draws the examples, their order and the adapter.")] = 0,
    model: opt.Model = None,
    backbone: Annotated[str | None, typer.Option("--backbone", help="DINOv2: a name or a timm name.")] = None,
    readout: Annotated[str | None, typer.Option("--readout", help="Of DINOv2, as in kshot sweep.")] = None,
    image_size: Annotated[
        str | None, typer.Option("--image-size", metavar="own|PIXELS", help="Of DINOv2's input, as in kshot sweep.")
    ] = None,
    prompt: opt.Prompt = None,
    loss: opt.Loss = None,
    thinking: opt.Thinking = None,
    train_on: opt.TrainOn = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu (usual), cuda or cuda:N.")] = None,
    allow_fewer: opt.Fewer = False,
    access: "Access | None" = None,
    settings: opt.Set = None,
    only_plan: Annotated[bool, typer.Option("--plan", help="Say what it takes, and train nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a trained model that is there.")] = False,
    push_to_hub: opt.PushToHub = None,
    yes: opt.Yes = False,
    public: opt.Public = False,
) -> None:
    """Train a model as a cell of the sweep does, for kshot predict: an adapter of the VLM, which PEFT loads too, or a
    head on DINOv2."""
    from experiments.adapters.folder import check_target
    from experiments.adapters.train import plan_training
    from experiments.adapters.train import train as run
    from experiments.sweep.choice import choose
    from experiments.sweep.methods import METHODS
    from experiments.sweep.provenance import dataset_notes, notes

    check_target(output, force=force)
    check_push(push_to_hub, yes, public)
    dinov2 = {"backbone": backbone, "readout": readout, "image_size": image_size}
    options: dict[str, Any] = {
        "model": model,
        **dinov2,
        "prompt": prompt,
        "loss": loss,
        "allow_fewer": allow_fewer or None,
    }
    options |= {"thinking": thinking, "train_on": train_on}
    values = opt.settings_of(options, settings)
    chosen = choose([dataset], [method], values.get("model"), values.get("backbone"), device or "")
    values |= chosen.settings
    with err.status("reading the data"):
        job, data = plan_training(dataset, shots, seed, values, method, device=chosen.device, access=access)
    for line in (*chosen.lines, *dataset_notes(data)):
        err.print(line)
    if only_plan:
        _print_plan(job, data, output)
        return
    _check_room(job, data, output)
    err.print(f"training {job.cell}")
    try:
        _show_steps(run(job, data, output, force=force), job.settings.batch_size)
    except KeyboardInterrupt:
        fail("stopped; nothing was written", INTERRUPTED)
    for note in notes(job.settings, {*METHODS[method].settings}):
        out.print(note, style="yellow")
    print_paths([output])
    err.print(f"next: kshot predict IMAGES --adapter {shlex.quote(str(output))}")
    if push_to_hub is not None:
        offer(output, push_to_hub, yes, public)


def _print_plan(job: "Job", data: "Dataset", output: Path) -> None:
    """What training takes; its time is measured with a few images."""
    from experiments.plan.estimate import estimate, print_estimate
    from experiments.sweep.config import RunOptions
    from experiments.sweep.workload import of_jobs

    with err.status("measuring"):
        estimated = estimate(of_jobs([job], {job.source: data}), output, RunOptions(device=job.device))
    print_estimate(estimated)


def _check_room(job: "Job", data: "Dataset", output: Path) -> None:
    """Say what is fetched for a model that is none of ours. Raises InputError where memory or disk are too small."""
    from experiments.plan.estimate import check, requirements, to_download
    from experiments.sweep.config import RunOptions
    from experiments.sweep.methods import METHODS
    from experiments.sweep.provenance import SHIPPED
    from experiments.sweep.workload import of_jobs

    used = {kind: getattr(job.settings, kind) for kind in SHIPPED if kind in METHODS[job.cell.method].settings}
    if all(name == SHIPPED[kind].NAME for kind, name in used.items()):
        return
    needed = requirements(of_jobs([job], {job.source: data}), output, RunOptions(device=job.device))
    for line in to_download(needed):
        err.print(line)
    check(needed)


def _show_steps(steps: Iterable["Step"], batch: int) -> None:
    """A bar on a terminal; else a line for the first and the last step, and now and then between. Once two steps were
    measured (the first loads what it needs), how long the others will take, where that is long. batch: images a
    step."""
    from experiments.plan.estimate import duration

    with progress_bar("step {task.completed}/{task.total}", "{task.description}") as progress:
        task, printed, began = progress.add_task("reading the model", total=None), 0.0, 0.0
        for step in steps:
            if step.number == 1:
                err.print(f"{step.steps:,} steps of {batch} images")
                began = time.monotonic()
            elif step.number == MEASURED and (left := (time.monotonic() - began) * step.left / (MEASURED - 1)) > LONG:
                err.print(f"about {duration(left)} for the other {step.left:,} steps, measured on the first")
            text, due = (
                f"loss {step.loss:.3f} an image",
                time.monotonic() - printed >= INTERVAL or step.number == step.steps,
            )
            progress.update(task, completed=step.number, total=step.steps, description=text)
            if due and not err.is_terminal:
                printed = time.monotonic()
                err.print(f"step {step.number}/{step.steps} {text}")


Images = Annotated[
    list[str],
    typer.Argument(
        metavar="IMAGE",
        help="A file; a folder, which is searched recursively; a quoted pattern such as 'photos/**/*.jpg'; or - for "
        "standard input: an image, or if it is text (UTF-8), a list of these, one a line.",
    ),
]
ClassNames = Annotated[
    list[str] | None, typer.Option("--class", metavar="NAME", help="A class; repeat. In place of the adapter's.")
]
ClassFile = Annotated[
    Path | None, typer.Option("--classes", metavar="FILE", help="Class names, one a line, in place of --class.")
]
Method = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="Of a VLM. constrained (the default): the model restricted to the class names, exactly. likelihood: that "
        "of each whole name, normalised over the classes by softmax.",
    ),
]


def predict(
    images: Images,
    adapter: Annotated[
        Path | None,
        typer.Option("--adapter", metavar="DIR", help="A folder that kshot train wrote, or LoRA as PEFT saves it."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Without --adapter: a Qwen3-VL as it is. With it: where its model is now."),
    ] = None,
    classes: ClassNames = None,
    class_file: ClassFile = None,
    method: Method = None,
    prompt: opt.Prompt = None,
    thinking: opt.Thinking = None,
    thoughts: opt.Thoughts = None,
    temperature: Annotated[float | None, typer.Option("--temperature", min=0, help="Of thoughts; usually 1.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Draws thoughts; usually 0.")] = None,
    top: Annotated[
        int, typer.Option("--top", min=1, metavar="N", help="Classes to show; with --json under the key topN.")
    ] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:N, mps or auto.")] = "cpu",
    max_side: Annotated[
        int | None, typer.Option("--max-side", min=1, help="Longest side in pixels (default: the adapter's, or 480).")
    ] = None,
) -> None:
    """The likeliest classes of images, with probabilities (of dinov2-ridge scores, which rank); what is no image is
    named on stderr, and the status is 1."""
    from experiments.adapters.predict import classifier, pictures

    names, requested = _class_names(classes, class_file), pictures(images, lambda: sys.stdin.buffer)
    given = {"tokens": thinking, "thoughts": thoughts, "temperature": temperature, "seed": seed}
    thought = {name: value for name, value in given.items() if value is not None}
    fitted = adapter, model, names, prompt, max_side, device, method
    try:
        with (
            classifier(*fitted, greedy=as_json, thinking=thought) as loaded,
            closing(loaded.predict(requested)) as windows,
        ):
            failed = _answer(windows, loaded.classes, top, as_json=as_json)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python flushes at its end goes there
        raise typer.Exit(BROKEN_PIPE) from None
    except KeyboardInterrupt:
        sys.stdout.flush()
        fail("stopped", INTERRUPTED)
    if failed:
        raise typer.Exit(KshotError.exit_status)


def _answer(windows: "Iterable[Window]", names: tuple[str, ...], top: int, *, as_json: bool) -> int:
    """Print the answers, flushed by windows; how many images have none."""
    from experiments.adapters.predict import Prediction, in_line

    failed = 0
    if isinstance(sys.stdout, TextIOWrapper):  # what its encoding lacks is escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    for window in windows:
        for answer in window:
            if isinstance(answer, Prediction):
                sys.stdout.write(f"{(_json if as_json else _words)(answer, names, top)}\n")
            else:
                failed += 1
                sys.stdout.flush()  # in order, where both go to one place
                err.print(f"kshot: {in_line(str(answer))}", style="red")
        sys.stdout.flush()
    return failed


def _json(answer: "Prediction", names: tuple[str, ...], top: int) -> str:
    kind = "probability" if answer.probabilities else "score"
    likeliest = [{"label": names[label], kind: value} for label, value in answer.top(top)]
    content: dict[str, Any] = {"image": answer.name, f"top{top}": likeliest}
    if answer.greedy is not None:
        content["greedy"] = names[answer.greedy]
    return json.dumps(content, allow_nan=False)


def _words(answer: "Prediction", names: tuple[str, ...], top: int) -> str:
    from experiments.adapters.predict import in_line

    unit = "" if answer.probabilities else "score "
    likeliest = [f"  {unit}{value:.4f}  {in_line(names[label])}" for label, value in answer.top(top)]
    return "\n".join([in_line(answer.name), *likeliest])


def _class_names(names: list[str] | None, file: Path | None) -> tuple[str, ...] | None:
    """The class names of the options; None without them. Raises InputError."""
    if file is None:
        return tuple(name.strip() for name in names) if names else None
    if names:
        raise InputError("class names are given twice, with --class and with --classes; leave one out")
    try:
        text = decoded_text(read_file(file))
    except OSError as error:
        raise InputError(f"--classes {file} cannot be read ({error.strerror}); give a file of names") from error
    if text is None:
        raise InputError(f"--classes {file} is no text in UTF-8; write one class name a line")
    listed = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not listed:
        raise InputError(f"--classes {file} holds no class name; write one a line")
    return listed


def export(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A folder of kshot train, kshot serve or PEFT.")],
    merged: Annotated[
        Path | None,
        typer.Option("--merged", metavar="OUT", help="A plain checkpoint, which all that reads the model reads."),
    ] = None,
    peft: Annotated[
        Path | None, typer.Option("--peft", metavar="OUT", help="For PEFT; merging it gives the same model.")
    ] = None,
    vllm: Annotated[Path | None, typer.Option("--vllm", metavar="OUT", help="For vLLM's --lora-modules.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Where the adapter's model is now.")] = None,
    device: Annotated[str, typer.Option("--device", help="Where it is checked: cpu, cuda, cuda:N or auto.")] = "cpu",
) -> None:
    """Write an adapter for other programs: a new folder, kept if its logits are kshot's in transformers and PEFT."""
    from experiments.adapters.folder import HEAD, read_card
    from vlm.service import export as write

    targets = {form: path for form, path in (("merged", merged), ("peft", peft), ("vllm", vllm)) if path is not None}
    if len(targets) != 1:
        raise InputError("give one of --merged OUT, --peft OUT and --vllm OUT: what the adapter is for")
    ((form, target),) = targets.items()
    if (card := read_card(adapter)) and card.kind == HEAD:
        raise InputError(f"{adapter} is a head on DINOv2, which is used by kshot predict alone; export writes adapters")
    with err.status("writing and checking"):
        proof = write(adapter, target, form, model, device)
    print_paths([target])
    out.print(
        f"on {proof.prompts} prompts a logit differs by {proof.gap:.2g} at most (the largest is {proof.reach:.3g})"
    )
    if proof.use:
        out.print(proof.use)


def push(
    folder: Annotated[Path, typer.Argument(help="An adapter's folder, or a results folder.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the hub.")],
    yes: opt.Yes = False,
    public: opt.Public = False,
) -> None:
    """Send an adapter or results to the hub; without --yes, say what would be sent."""
    offer(folder, repo, yes, public)


def check_push(repo: str | None, yes: bool, public: bool) -> None:
    """For commands with --push-to-hub, before they begin. Raises InputError for a name that cannot be one, a missing
    token, and for options that mean nothing without it."""
    from experiments.adapters import hub

    if repo is not None:
        hub.check(repo, dry_run=not yes)
    elif yes or public:
        raise InputError(f"{'--yes' if yes else '--public'} is for --push-to-hub REPO; leave it out")


def offer(folder: Path, repo: str, yes: bool, public: bool) -> None:
    """Send a folder that is complete, or say what would be sent. Raises as `hub.push` does."""
    from experiments.adapters import hub

    with err.status(f"sending to {repo}" if yes else "reading the folder"):
        upload = hub.push(folder, repo, private=not public, dry_run=not yes)
    whose = "private" if upload.private else "public"
    out.print(f"{upload.repo}: a {upload.kind} repository of the hub, made {whose} unless it is there")
    cells = [size for name, size in upload.files if name.startswith("cells/")]
    lines = [(size, name) for name, size in upload.files if not name.startswith("cells/")]
    lines += [(sum(cells), f"cells/, {len(cells)} records")] if cells else []
    lines += [(sum(size for _, size in upload.files), f"bytes in {len(upload.files)} files")]
    for size, text in lines:
        out.print(f"{size:>13,}  {text}")
    if upload.skipped:
        out.print(f"stays here: {', '.join(upload.skipped)}")
    if upload.leaks:
        out.print(f"the base model's folder on this machine is named in {', '.join(upload.leaks)}", style="yellow")
    if yes:
        out.print(f"sent: {upload.url}")
    else:
        words = ["kshot", "push", str(folder), repo, *(["--public"] if public else []), "--yes"]
        out.print(f"nothing was sent; this sends it: {shlex.join(words)}")
