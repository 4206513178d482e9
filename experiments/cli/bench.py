"""`kshot bench`: how fast the parts are on this machine. Turns arguments into calls."""

from pathlib import Path
from typing import Annotated

import typer

from experiments.terminal import err

app = typer.Typer(name="bench", help="How fast the parts are on this machine.")

Quick = Annotated[bool, typer.Option("--quick", help="End within a minute.")]
Json = Annotated[Path | None, typer.Option("--json", help="Where to write (default: results/bench/NAME.json).")]


@app.command("data")
def data(
    quick: Quick = False,
    json_path: Json = None,
    root: Annotated[Path | None, typer.Option("--root", help="A folder of photographs; without it, made ones.")] = None,
) -> None:
    """Images a second, decoded and resized, against plain Pillow."""
    from experiments.bench.data import bench

    with err.status("measuring"):
        bench(root, quick, json_path)


@app.command("train")
def train(
    quick: Quick = False,
    json_path: Json = None,
    root: Annotated[
        Path | None, typer.Option("--root", help="A folder of class folders; without it, made ones.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    shape: Annotated[str, typer.Option("--shape", help="nano, or with cuda random weights: 2B, 4B, 8B.")] = "nano",
) -> None:
    """Training examples a second, against plain transformers + PEFT and TRL."""
    from experiments.bench.train import bench

    with err.status("measuring"):
        bench(root, quick, json_path, device, shape)


@app.command("score")
def score(
    quick: Quick = False,
    json_path: Json = None,
    root: Annotated[
        Path | None, typer.Option("--root", help="A folder of class folders; without it, made ones.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="A folder or model: its vocabulary, with random weights.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
) -> None:
    """Seconds per image for the exact posterior over class names, against other ways to get one."""
    from experiments.bench.score import bench

    with err.status("measuring"):
        bench(root, quick, json_path, tokenizer, device)


@app.command("baseline")
def baseline(
    quick: Quick = False,
    json_path: Json = None,
    root: Annotated[
        Path | None, typer.Option("--root", help="A folder of class folders; without it, made ones.")
    ] = None,
    backbone: Annotated[
        str, typer.Option("--backbone", help="As sweep's; without it, a DINOv2 with random weights.")
    ] = "",
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
) -> None:
    """Seconds for all heads of a comparison from cached features, and features a second against the bare encoder."""
    from experiments.bench.baseline import bench

    with err.status("measuring"):
        bench(root, quick, json_path, device, backbone)


@app.command("serve")
def serve(quick: Quick = False, json_path: Json = None) -> None:
    """What the server adds to the engine's time, for one client and for many at once."""
    from experiments.bench.serve import bench

    with err.status("measuring"):
        bench(quick, json_path)


@app.command("sweep")
def sweep(quick: Quick = False, json_path: Json = None) -> None:
    """What cells and workers share, and whether --plan told the time."""
    from experiments.bench.sweep import bench

    with err.status("measuring"):
        bench(quick, json_path)
