"""`kshot serve`: the training and sampling API for Tinker and OpenAI clients."""

from pathlib import Path
from typing import Annotated

import typer

from experiments.terminal import err, out


def serve(
    model: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="NAME[=PATH]", help="A model's name, and where it is; repeat for several."),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8000,
    state: Annotated[Path | None, typer.Option("--state", help="Where runs and checkpoints are kept.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", help="Accepted keys, one a line. Without it: any, on loopback.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option("--allow-host", help="A further name that this server has; repeat.")
    ] = None,
    allow_urls: Annotated[bool, typer.Option("--allow-urls", help="Fetch images from http addresses.")] = False,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:N or auto.")] = "cpu",
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
    features: Annotated[Path | None, typer.Option("--features", help="Keep image features in this folder.")] = None,
) -> None:
    """Serve the Tinker API, an OpenAI-compatible one at /v1, and a page that shows what is going on."""
    from vlm.server.app import Options
    from vlm.server.guard import Keys
    from vlm.server.serve import engine_registry
    from vlm.server.serve import serve as run

    keys = Keys() if api_key_file is None else Keys.read(api_key_file)
    options = Options(host, port, keys, tuple(allow_host or ()), allow_urls, image_log_probs)
    registry = engine_registry(
        model or [], state, device, dtype, train_vision=train_vision, features=features, threads=threads
    )

    def print_address(address: str) -> None:
        line = f"kshot serves {', '.join(registry.model_paths or ())} at {address}  (state: {registry.state})"
        out.print(line)

    run(registry, options, print_address, err.status(f"loading {', '.join(registry.model_paths or ())}"))
