"""How much memory the workers of a sweep need, and how much is free.

A worker holds one model of each kind that its cells use. What a pass takes is an estimate; where a worker was measured
to take more than all estimates together, that counts.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.plan.models import VlmSize, vit_size, vlm_size
from experiments.sweep.workload import CellSpec, Workload, image_counts, image_sizes, mean_size

if TYPE_CHECKING:
    import torch

LIBRARIES = 1 << 30  # a process with torch, transformers, timm and scikit-learn, before it holds a model
TEXT, ANSWER = 48, 16  # tokens around the image of a training example and of its answer, about
PASS = "a training or scoring pass"  # noqa: S105 - not a password


@dataclass(frozen=True)
class Memory:
    """Bytes. parts: what a worker holds, by name. free: in `location`, where the workers will be. measured: what a
    worker took in a measurement. workers: how many share it; a GPU has one. unknown: models of unknown size."""

    parts: Mapping[str, int]
    free: int
    location: str
    workers: int
    unknown: tuple[str, ...] = ()
    measured: int = 0

    @property
    def per_worker(self) -> int:
        return max(sum(self.parts.values()), self.measured)

    @property
    def needed(self) -> int:
        return self.per_worker * self.workers

    @property
    def possible_workers(self) -> int:
        return int(self.free // self.per_worker) if self.per_worker else self.workers

    @property
    def fits(self) -> bool:
        return self.possible_workers >= self.workers


def memory(workload: Workload, workers: int, device: str = "cpu") -> Memory:
    """The memory of `workers` processes on the CPU, or of one on each GPU: then of the GPU with the least free memory.

    device: as the user names it, cuda being every visible GPU. Raises ModelError for one that is not here.
    """
    from vlm import service

    on_cpu, tightest = workload.device == "cpu", _tightest(device, workers)
    parts, unknown = {"libraries": LIBRARIES, "weights": 0}, list[str]()
    passes = [0]  # a cell has one at a time: the largest counts
    for name, size in (*_vlm(workload, unknown, tightest), *_backbones(workload, unknown)):
        if name == PASS:
            passes.append(size)
        else:
            parts[name] = parts.get(name, 0) + size
    location = "the CPU's memory" if on_cpu else f"the memory of {tightest}"
    parts[PASS] = max(passes)
    return Memory(parts, service.free_bytes(tightest), location, workers if on_cpu else 1, (*unknown,))


def _tightest(device: str, workers: int) -> "torch.device":
    """The device with the least free memory among those that these workers get."""
    from vlm import service

    named = service.devices(device)
    every = service.devices("auto") if device == "cuda" else named  # one a worker, in this order
    return min(every[:workers], key=service.free_bytes)


def _vlm(workload: Workload, unknown: list[str], device: "torch.device") -> Iterator[tuple[str, int]]:
    from vlm import service

    for name in dict.fromkeys(cell.settings.model for cell in workload.local_vlm_cells):
        model, cells = vlm_size(name), [cell for cell in workload.local_vlm_cells if cell.settings.model == name]
        if model is None:
            unknown.append(name)
            continue
        yield "weights", model.weight_bytes
        tokens = {cell.source: _image_tokens(workload, model, cell) for cell in cells}
        longest, limits = TEXT + max(tokens.values()), service.pass_limits()
        if trained := [cell.settings for cell in cells if cell.trains]:
            yield "adapter and optimizer", model.adapter_bytes(trained[0].rank)
            positions = min(trained[0].batch_size * longest, max(limits.training, longest))
            yield PASS, model.training_bytes(positions, ANSWER * positions // longest)
        yield PASS, model.scoring_bytes(min(limits.scoring, limits.prompts * longest))
        images = {source: each.train_views + each.test for source, each in image_counts(cells, workload).items()}
        features = max(images[source] * tokens[source] for source in tokens) * model.features.token_bytes
        yield "image features", min(int(features), service.feature_memory(device))


def _image_tokens(workload: Workload, model: VlmSize, cell: CellSpec) -> int:
    """Of an image, about: without the processor's rounding."""
    width, height = mean_size(workload.datasets[cell.source], cell.settings.max_side)
    return max(1, int(width * height / model.features.side**2))


def _backbones(workload: Workload, unknown: list[str]) -> Iterator[tuple[str, int]]:
    cells = workload.select(lambda cell: cell.uses_backbone)
    for name in dict.fromkeys(cell.settings.backbone for cell in cells):
        model = vit_size(name)
        if model is None:
            unknown.append(name)
            continue
        yield "weights", model.weight_bytes
        trained = {cell.source: cell for cell in cells if cell.settings.backbone == name and cell.trains}
        for cell in trained.values():
            images, width, height = _images_of_a_pass(cell, workload)
            tokens = int(width // model.patch * (height // model.patch)) + 1
            yield PASS, model.training_bytes(images * tokens)
        if trained:
            classes = max(workload.datasets[source].classes for source in trained)
            rank = next(iter(trained.values())).settings.rank
            yield "adapter and optimizer", model.adapter_bytes(rank, classes)


def _images_of_a_pass(cell: CellSpec, workload: Workload) -> tuple[int, float, float]:
    """How many images of a batch a backbone trains on at once, and their width and height: images of one size share
    a pass, so of images of several sizes the share of the commonest."""
    from baselines.lora import CHUNK

    s, info = cell.settings, workload.datasets[cell.source]
    together = min(CHUNK, s.batch_size)
    if s.image_size:
        return together, s.image_size, s.image_size
    sizes = Counter(image_sizes(info))
    commonest = sizes.most_common(1)[0][1] / sizes.total()
    return math.ceil(together * commonest), *mean_size(info, s.max_side)
