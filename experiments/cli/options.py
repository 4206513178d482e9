"""Options that several commands share: their declarations, and the meaning of their texts."""

import os
import re
from collections.abc import Callable, Sequence
from functools import wraps
from inspect import Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from experiments.cli.helps import completion, datasets, models
from kshot.errors import InputError

if TYPE_CHECKING:
    from data.dataset import Access

RANGE = 1000  # numbers of a range such as 0-2, at most
PROMPT = "recipe, or '{image}QUESTION => ANSWER {label}'"

# The data
DatasetName = Annotated[
    str, typer.Argument(help="A name of `kshot data list`, a folder, or hub:ID[@REVISION][#CONFIG].")
]
_SETS = completion(datasets)
Dataset = Annotated[
    str, typer.Option("--dataset", help="A name of kshot data list, a folder, or hub:ID.", autocompletion=_SETS)
]
Datasets = Annotated[list[str], typer.Option("--dataset", help="See kshot data list; repeat.", autocompletion=_SETS)]
AnyDatasets = Annotated[
    list[str] | None,
    typer.Option("--dataset", help="A name of kshot data list, a folder, or hub:ID; repeat.", autocompletion=_SETS),
]
Source = Annotated[str, typer.Option("--source", help="hub, or archive: the original files in --root.")]
Root = Annotated[Path | None, typer.Option("--root", help="Folder of the original files.")]
Protocol = Annotated[str, typer.Option("--protocol", help="recipe, official or coop.")]
SplitFile = Annotated[Path | None, typer.Option("--split-file", help="For coop: its JSON file.")]
Modified = Annotated[bool, typer.Option("--allow-modified", help="Take files whose checksums are not the originals'.")]
Shared = Annotated[
    bool, typer.Option("--allow-shared", help="Take a folder with an image in two classes, or in train and test.")
]
LabelColumn = Annotated[str, typer.Option("--label-column", help="For hub:ID: where its classes are.")]
SplitSeed = Annotated[int, typer.Option("--split-seed", min=0, help="Draws the split of a set without one.")]
LimitTest = Annotated[str | None, typer.Option(metavar="N", help="Test on this many images.")]
Fewer = Annotated[bool, typer.Option("--allow-fewer", help="Take fewer where a class has no k.")]

# The model and what computes
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Qwen3-VL: 2B, 4B, 8B, 30B-A3B, 235B-A22B, a folder or a hub id.",
        autocompletion=completion(models),
    ),
]
Prompt = Annotated[str | None, typer.Option("--prompt", help=f"{PROMPT}.")]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", help=f"{PROMPT}; repeat to compare.")]
Loss = Annotated[str | None, typer.Option("--loss", help="What LoRA learns: text or closed-set.")]
Losses = Annotated[
    list[str] | None, typer.Option("--loss", help="What LoRA learns: text or closed-set; repeat to compare.")
]
LossPowers = Annotated[
    list[str] | None,
    typer.Option("--loss-power", metavar="Q", help="Of closed-set: 0 (-log p) to 1 (the reward); repeat to compare."),
]
Starts = Annotated[
    list[str] | None,
    typer.Option("--start", metavar="N", help="First steps with loss text: a share or number; repeat to compare."),
]
Calibration = Annotated[
    str | None, typer.Option("--calibration", help="Of the VLM's scores: none, contextual, pmi or validated.")
]
Thinking = Annotated[
    int | None,
    typer.Option("--thinking", min=0, metavar="N", help="Let the VLM think before it answers, for N tokens at most."),
]
Thoughts = Annotated[
    int | None, typer.Option("--thoughts", min=1, metavar="M", help="About an image; probabilities are their mean.")
]
TrainOn = Annotated[
    str | None, typer.Option("--train-on", help="With --thinking: the answer alone, or all: the thought too.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any setting, listed below; repeat. hflip=0: mirror no image."),
]
Service = Annotated[str, typer.Option("--service", help="local, tinker or an http address.")]
DEVICES = "cpu (usual), cpu:N (a VLM over N processes), cuda (all GPUs, one a worker), cuda:N, or auto."
Device = Annotated[str, typer.Option("--device", help=DEVICES)]

# A run and its results
Out = Annotated[Path | None, typer.Option("--out", help="Results folder (default: runs/NAME).")]
Workers = Annotated[int | None, typer.Option("--workers", min=1, help="Processes (default: one a core, or one a GPU).")]
NoImages = Annotated[bool, typer.Option("--no-images", help="No example images in report.html.")]
PushToHub = Annotated[
    str | None,
    typer.Option("--push-to-hub", metavar="REPO", help="Offer it to OWNER/NAME on the hub; without --yes a dry run."),
]
Yes = Annotated[bool, typer.Option("--yes", help="Really send it.")]
Public = Annotated[bool, typer.Option("--public", help="Make the repository public; otherwise it is private.")]


def access_of(
    source: Source = "",
    root: Root = None,
    protocol: Protocol = "",
    split_file: SplitFile = None,
    allow_modified: Modified = False,
    allow_shared: Shared = False,
    label_column: LabelColumn = "",
) -> "Access":
    """How a data set is had."""
    from data.dataset import Access

    return Access(source, root, protocol, split_file, allow_modified, label_column, allow_shared)


def with_access(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of `access_of` in the place of its parameter `access`."""
    own, options = signature(command).parameters, signature(access_of).parameters
    all_options = [each for name in own for each in (options.values() if name == "access" else [own[name]])]

    @wraps(command)
    def run(**values: Any) -> None:
        access = access_of(**{name: values.pop(name) for name in options})
        command(access=access, **values)

    run.__signature__ = Signature(all_options)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in all_options}
    return run


def numbers(name: str, text: str | None) -> list[int] | None:
    """The numbers of an option such as --shots 1,2,4 or --seeds 0-2. Raises InputError."""
    if text is None:
        return None
    found = list[int]()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if dash and first.isdecimal() and last.isdecimal() and int(first) <= int(last) < int(first) + RANGE:
            found += range(int(first), int(last) + 1)
        else:
            try:
                found.append(int(part))
            except ValueError as error:
                ways = "write it as 1,2,4 or as 0-2"
                raise InputError(f"--{name} {text!r} is not a list of whole numbers; {ways}") from error
    return found


def settings_of(options: dict[str, Any], texts: list[str] | None, *also: str) -> dict[str, Any]:
    """The settings that options of their own give (those that are not None), and those of --set KEY=VALUE. Raises
    InputError for a text without a value, and for a setting that is given twice. also: others that an option gives."""
    from experiments.sweep.config import Settings

    for text in texts or []:
        if "=" not in text:
            names = ", ".join(Settings.model_fields)
            raise InputError(f"--set {text!r} has no value; write it as KEY=VALUE with one of: {names}")
    values = {name: value for name, value in options.items() if value is not None}
    single = dict(text.partition("=")[::2] for text in texts or [])
    if twice := sorted({*values, *also} & single.keys()):
        raise InputError(f"{twice[0]} is given twice: as an option and with --set; leave one out")
    return {**single, **values}


def caps(texts: list[str] | None) -> dict[str, str]:
    """{data set: most shots} of --most-shots DATASET=K. Raises InputError for a text without a number."""
    parts = [text.rpartition("=") for text in texts or []]
    for text, (dataset, _, most) in zip(texts or [], parts, strict=True):
        if not dataset or not most.isdecimal():
            raise InputError(f"--most-shots {text!r} caps nothing; write it as DATASET=K, such as flowers=10")
    return {dataset: most for dataset, _, most in parts}


def sweep_name(datasets: Sequence[str]) -> str:
    """The name of a sweep of these data sets: of a folder the last part of its path, in letters that need no quotes."""
    from data.catalog import full_name

    datasets = [full_name(name) for name in datasets]
    folders = {name: os.path.basename(os.path.abspath(name.partition(":")[2])) for name in datasets if ":" in name}
    names = (folders.get(name, name) for name in dict.fromkeys(datasets))
    return "-".join(re.sub(r"[^\w.-]", "-", name).lstrip("-.") or "folder" for name in names)
