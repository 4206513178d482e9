"""`kshot serve`: the training and sampling API for Tinker and OpenAI clients."""

from pathlib import Path
from typing import Annotated

import typer

from experiments.terminal import err, out


def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="NAME[=PATH]",
            help="A model's name, and where it is; repeat for several (default: the nano VLM).",
        ),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8000,
    state: Annotated[Path | None, typer.Option("--state", help="Where runs and checkpoints are kept.")] = None,
    keep: Annotated[
        str,
        typer.Option(
            "--keep",
            metavar="TIME",
            help="How long what is over is kept: sessions, their runs and losses; 12h, 30d, 8w. Checkpoints, and the "
            "runs that have one, stay until they are deleted.",
        ),
    ] = "30d",
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file",
            help="Accepted keys, one a line; each has runs and checkpoints of its own. Without it: any, on loopback.",
        ),
    ] = None,
    shared: Annotated[
        bool, typer.Option("--shared", help="All keys of the file see and change all runs and checkpoints.")
    ] = False,
    allow_host: Annotated[
        list[str] | None, typer.Option("--allow-host", help="A further name that this server has; repeat.")
    ] = None,
    allow_urls: Annotated[bool, typer.Option("--allow-urls", help="Fetch images from http addresses.")] = False,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda:N, auto, or a place of several.")] = "cpu",
    shard: Annotated[
        str, typer.Option("--shard", help="Over several: whole (weights on each), divided, or auto: by what fits.")
    ] = "auto",
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32 or bfloat16.")] = None,
    train_vision: Annotated[bool, typer.Option("--train-vision", help="LoRA covers the vision tower too.")] = False,
    image_log_probs: Annotated[
        float,
        typer.Option(
            "--image-log-probs",
            help="At image positions of prompts: nan, or 0 for clients that sum all (the recipe's test NLL).",
        ),
    ] = float("nan"),
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Of the model on a CPU (default: the fewest that are fast).")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="BYTES|4GB",
            help="What clients may make the server hold, beside its models (default: a quarter of the machine's).",
        ),
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option("--plan", metavar="NxGB", help="Say what the model takes on N such GPUs (8x141GB), and end."),
    ] = None,
    plan_rank: Annotated[int, typer.Option("--plan-rank", min=1, help="Of the LoRA that --plan counts.")] = 32,
    features: Annotated[Path | None, typer.Option("--features", help="Keep image features in this folder.")] = None,
) -> None:
    """Serve the Tinker API, an OpenAI-compatible one at /v1, and a page that shows what is going on."""
    from kshot.errors import InputError

    if plan is not None:
        from experiments.plan.ranks import print_plan
        from vlm.server.serve import model_paths

        paths, _ = model_paths(model or [])
        for path in paths.values():
            print_plan(path, plan, plan_rank)
        return
    from vlm.server.app import Options
    from vlm.server.guard import Keys
    from vlm.server.limits.memory import Memory, readable, size_of
    from vlm.server.retention import seconds_of
    from vlm.server.serve import engine_registry, follow
    from vlm.server.serve import serve as run

    if shared and api_key_file is None:
        raise InputError("--shared is for the keys of --api-key-file; give one, or leave it out: all is shared without")
    keys = Keys() if api_key_file is None else Keys.read(api_key_file, shared=shared)
    hosts, kept = tuple(allow_host or ()), seconds_of(keep)
    budget = Memory(None if memory is None else size_of(memory))
    options = Options(host, port, keys, hosts, allow_urls, image_log_probs, keep=kept)
    registry = engine_registry(
        model or [], state, device, dtype, train_vision=train_vision, features=features, threads=threads, shard=shard
    )

    if follow(registry):
        return

    def print_address(address: str) -> None:
        line = f"kshot serves {', '.join(registry.model_paths or ())} at {address}  (state: {registry.state}"
        line += f"; runs that are over go after {keep}, saved ones stay; clients may make it hold "
        line += f"{readable(budget.limit)} of memory beside its models, by --memory)"
        out.print(line)

    run(registry, options, print_address, err.status(f"loading {', '.join(registry.model_paths or ())}"), budget)
