"""The encoder of `kshot bench baseline`: photographs to features, against the bare forward pass of its backbone.

Bare is the backbone on normalised pixels that are ready, one image at a time or in batches of one size, whichever is
faster. The encoder is given the photographs' bytes: it hashes, decodes, resizes and normalises them as well. On a CPU
all have one thread, as each of the workers of a sweep has.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import timm
import torch

from baselines.backbone import Backbone, load
from baselines.features import Encoder, resized, size_groups
from experiments.bench.harness import in_turn, row
from experiments.bench.train_case import Plan, found, made

SHAPES = {True: "vit_small_patch14_dinov2", False: "vit_base_patch14_dinov2"}  # quick → timm's name
SIZE = 224  # pixels; DINOv2's own 518 takes six times as long, and overheads weigh less there
BATCHES = (1, 8, 64)
COUNT = {("cpu", True): 8, ("cpu", False): 16, ("cuda", True): 512, ("cuda", False): 2048}  # photographs


def measure(root: Path | None, quick: bool, device: str, model: str) -> tuple[list[dict[str, Any]], float]:
    """Rows of images a second, and the encoder's over the fastest bare one's. Raises as `baselines.backbone.load`
    does, and DatasetError."""
    with _random(SHAPES[quick]) as shape, _one_thread(device):
        name = model or shape
        backbone = load(name, device)
        images = _photographs(root, COUNT[device.split(":")[0], quick])
        ready = _ready(backbone, images)
        encoders = [Encoder(name, size=SIZE, device=device) for _ in range(_rounds(quick) + 1)]
        tasks = {f"forward, {batch} at a time": _forward(backbone, ready, batch) for batch in BATCHES}
        seconds = in_turn({"photographs to features": lambda: encoders.pop().features(images), **tasks}, _rounds(quick))
    threads = 1 if device == "cpu" else torch.get_num_threads()
    rates = {what: [len(images) / spent for spent in each] for what, each in seconds.items()}
    facts = {
        "images": len(images),
        "size": SIZE,
        "backbone": Path(model).name if model else f"{SHAPES[quick]} (random)",
    }
    facts |= {"device": device, "threads": threads}
    rows = [row(what, each, "images/s", **facts) for what, each in rates.items()]
    ours, *bare = seconds.values()
    return rows, median(min(times) / mine for mine, *times in zip(ours, *bare, strict=True))


def _rounds(quick: bool) -> int:
    return 3 if quick else 5


@contextmanager
def _one_thread(device: str) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1 if device == "cpu" else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _random(architecture: str) -> Iterator[str]:
    """A folder in timm's hub layout with random weights, drawn from a seed."""
    with tempfile.TemporaryDirectory() as folder:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            module = timm.create_model(architecture, num_classes=0)
        timm.models.save_for_hf(module, folder, safe_serialization=True)
        yield folder


def _photographs(root: Path | None, count: int) -> list[bytes]:
    plan, rng = Plan(classes=8, shots=min(count // 8, 8), batch=1, epochs=1, rounds=1), np.random.default_rng(0)
    _, shots = made(plan, rng) if root is None else found(root, plan, rng)
    images = [image for image, _ in shots]
    # More are the same with another tail: other bytes, so another key, and the same work.
    return [images[n % len(images)] + b"\0" * (n // len(images)) for n in range(count)]


def _ready(backbone: Backbone, images: Sequence[bytes]) -> list[torch.Tensor]:
    pixels = [resized(image, backbone.patch, SIZE) for image in images]
    return [backbone.normalised([pixels[n]]) for group in size_groups(pixels) for n in group]


def _forward(backbone: Backbone, ready: Sequence[torch.Tensor], batch: int) -> Any:
    batches = [torch.cat(list(ready[n : n + batch])) for n in range(0, len(ready), batch)]

    @torch.inference_mode()
    def task() -> None:
        for each in batches:
            backbone.features(backbone.module, each)
        if backbone.mean.is_cuda:
            torch.cuda.synchronize()

    return task
