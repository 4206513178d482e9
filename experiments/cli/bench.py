"""`kshot bench`: how fast the parts are on this machine."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from experiments.terminal import err
from kshot.errors import KshotError

if TYPE_CHECKING:
    from experiments.sweep.grid import Plan

Quick = Annotated[bool, typer.Option("--quick", help="End within a minute.")]
Json = Annotated[Path | None, typer.Option("--json", help="Where to write (default: results/bench/NAME.json).")]
Root = Annotated[Path | None, typer.Option("--root", help="A folder of class folders; without it, made ones.")]
Device = Annotated[str, typer.Option("--device", help="cpu or cuda.")]
ELSEWHERE = {name: ("overheads", f"measure_{name}") for name in ("serve", "sweep")}  # of a name: module and function


def data(
    quick: Quick = False,
    json_path: Json = None,
    root: Annotated[Path | None, typer.Option("--root", help="A folder of photographs; without it, made ones.")] = None,
) -> None:
    """Images a second, decoded and resized, against plain Pillow."""
    _run("data", json_path, root, quick)


def train(
    quick: Quick = False,
    json_path: Json = None,
    root: Root = None,
    device: Device = "cpu",
    shape: Annotated[str, typer.Option("--shape", help="nano, or with cuda random weights: 2B, 4B, 8B.")] = "nano",
) -> None:
    """Training examples a second, against plain transformers + PEFT and TRL."""
    _run("train", json_path, root, quick, device, shape)


def score(
    quick: Quick = False,
    json_path: Json = None,
    root: Root = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="A folder or model: its vocabulary, with random weights.")
    ] = None,
    device: Device = "cpu",
) -> None:
    """Seconds per image for the exact posterior over class names, against other ways to get one."""
    _run("score", json_path, root, quick, tokenizer, device)


def text(quick: Quick = False, json_path: Json = None) -> None:
    """Training tokens a second on instructions of mixed length, against plain transformers + PEFT and TRL."""
    _run("text", json_path, quick)


def baseline(
    quick: Quick = False,
    json_path: Json = None,
    root: Root = None,
    backbone: Annotated[
        str, typer.Option("--backbone", help="As sweep's; without it, a DINOv2 with random weights.")
    ] = "",
    device: Device = "cpu",
) -> None:
    """Seconds for all heads of a comparison from cached features, and features a second against the bare encoder."""
    _run("baseline", json_path, root, quick, device, backbone)


def serve(quick: Quick = False, json_path: Json = None) -> None:
    """What the server adds to the engine's time, for one client and for many at once."""
    _run("serve", json_path, quick)


def sweep(quick: Quick = False, json_path: Json = None) -> None:
    """What cells and workers share, and whether the time that --plan estimates is right."""
    _run("sweep", json_path, quick, _planned_seconds)


def _planned_seconds(planned: "Plan", out: Path, workers: int) -> float:
    """What --plan says. Raises KshotError where it gives no time."""
    from experiments.plan.estimate import estimate
    from experiments.sweep.config import RunOptions
    from experiments.sweep.workload import of_jobs

    estimated = estimate(of_jobs(planned.jobs, planned.datasets), out, RunOptions(workers=workers))
    if estimated.time is None:
        raise KshotError(f"the plan gives no time: {estimated.no_time}")
    return estimated.time.total


def _run(name: str, json_path: Path | None, *arguments: Any) -> None:
    from experiments.bench.harness import FOLDER, finish

    with err.status("measuring"):
        module, function = ELSEWHERE.get(name, (name, "measure"))
        measured = getattr(import_module(f"experiments.bench.{module}"), function)(*arguments)
    finish(measured, json_path or FOLDER / f"{name}.json")
