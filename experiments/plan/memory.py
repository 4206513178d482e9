"""How much memory a worker needs, how much is free, and how many workers fit. Loads no model.

A worker holds one model of each kind that its cells use. Activations are an estimate from the shapes of a pass; what a
measurement has seen a worker take counts where it is more.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.sweep.config import Settings
from experiments.sweep.shapes import Vlm, vit_of, vlm_of
from experiments.sweep.workload import Workload, alike, images, sides

if TYPE_CHECKING:
    import torch

LIBRARIES = 1 << 30  # a process with torch, transformers, timm and scikit-learn, before it holds a model
PACK = 4096  # positions of a training pass of the local engine
SCORED = 1 << 15  # positions of a pass of it that scores, at most
ROWS = 64  # prompts in it, at most
CHUNK = 32  # images of a training pass of the backbone, see baselines.lora
TEXT, ANSWER = 48, 16  # tokens around the image of a training example and of its answer, about


PASS = "a training or scoring pass"  # noqa: S105 - not a password


@dataclass(frozen=True)
class Memory:
    """Bytes. parts: what a worker holds, by name. free: where the workers are to be. place: what that is called.

    workers: how many are asked for; a GPU has one. unknown: models whose size nobody knows.
    """

    parts: Mapping[str, int]
    free: int
    place: str
    workers: int
    unknown: tuple[str, ...] = ()
    seen: int = 0  # what a worker took when it was measured

    @property
    def worker(self) -> int:
        return max(sum(self.parts.values()), self.seen)

    @property
    def needed(self) -> int:
        return self.worker * self.workers

    @property
    def fitting(self) -> int:
        """Workers that there is room for."""
        return int(self.free // self.worker) if self.worker else self.workers

    @property
    def fits(self) -> bool:
        return self.fitting >= self.workers


def memory(
    todo: Workload, workers: int, *, device: str | None = None, free: int | None = None, seen: int = 0
) -> Memory:
    """Of `workers` processes on the CPU, or one on each GPU; of these the one counts that has the least free.

    device: as the user names it, cuda being every visible GPU; the todo's own unless given. free: bytes, where the
    machine is not to be asked. seen: bytes that a measured worker took in the CPU's memory.
    """
    on_cpu, at = todo.device == "cpu", _tightest(device or todo.device, workers)
    place = "the CPU's memory" if on_cpu else f"the memory of {at}"
    parts, unknown = {"libraries": LIBRARIES, "weights": 0}, list[str]()
    passes = [0]  # of what one cell uses at a time, only the largest counts
    for name, size in (*_vlm(todo, unknown, at), *_vit(todo, unknown)):
        if name == PASS:
            passes.append(size)
        else:
            parts[name] = parts.get(name, 0) + size
    room = free_bytes(at) if free is None else free
    return Memory({**parts, PASS: max(passes)}, room, place, workers if on_cpu else 1, (*unknown,), seen * on_cpu)


def free_bytes(device: "torch.device") -> int:
    """What new processes can take: of the machine's memory as far as its control group allows, or of a GPU's."""
    from vlm import service

    return service.free_bytes(device)


def _tightest(device: str, workers: int) -> "torch.device":
    """Of the devices that these workers get the one with the least free memory. Raises ModelError for none."""
    from vlm import service

    found = service.devices(device)
    every = service.devices("auto") if device == "cuda" else found  # one a worker, in this order
    return min(every[:workers], key=service.free_bytes)


def _cached(device: "torch.device") -> int:
    """Bytes of image features that a process keeps in the memory of its device, at most."""
    from vlm import service

    return service.feature_memory(device)


def _vlm(todo: Workload, unknown: list[str], at: "torch.device") -> Iterator[tuple[str, int]]:
    """The local service's model; a worker has one."""
    parts = todo.where(lambda part: part.looks) if todo.service == "local" else []
    for name in dict.fromkeys(part.settings.model for part in parts):
        shape, own = vlm_of(name), [part for part in parts if part.settings.model == name]
        if shape is None:
            unknown.append(name)
            continue
        yield "weights", shape.weight_bytes
        tokens = {source: _tokens(todo, shape, source, own[0].settings) for source in {part.source for part in own}}
        longest = TEXT + max(tokens.values())
        if trained := [part for part in own if part.trains]:
            s = trained[0].settings
            yield "adapter and optimizer", shape.adapter_bytes(s.rank)
            positions = min(s.batch_size * longest, max(PACK, longest))
            yield PASS, shape.training_bytes(positions, ANSWER * positions // longest)
        yield PASS, shape.scoring_bytes(min(SCORED, ROWS * longest))
        count = {source: each.shown + each.test for source, each in images(own, todo).items()}
        most = max(count[source] * tokens[source] for source in tokens) * shape.image_bytes_per_token
        yield "image features", min(int(most), _cached(at))


def _tokens(todo: Workload, shape: Vlm, source: str, settings: Settings) -> int:
    """Of an image, about: without the processor's rounding."""
    width, height = sides(todo.sets[source], settings.max_side)
    return max(1, int(width * height / (shape.patch * shape.merge) ** 2))


def _vit(todo: Workload, unknown: list[str]) -> Iterator[tuple[str, int]]:
    parts = todo.where(lambda part: part.encodes)
    for name in dict.fromkeys(part.settings.backbone for part in parts):
        vit, own = vit_of(name), [part for part in parts if part.settings.backbone == name]
        if vit is None:
            unknown.append(name)
            continue
        yield "weights", vit.weight_bytes
        for source, part in {part.source: part for part in own if part.trains}.items():
            s, known = part.settings, todo.sets[source]
            width, height = (s.image_size, s.image_size) if s.image_size else sides(known, s.max_side)
            tokens = int(width // vit.patch * (height // vit.patch)) + 1
            together = min(CHUNK, s.batch_size) * (1.0 if s.image_size else alike(known))
            yield PASS, vit.training_bytes(math.ceil(together) * tokens)
        if trained := [part for part in own if part.trains]:
            classes = max(todo.sets[part.source].classes for part in trained)
            yield "adapter and optimizer", vit.adapter_bytes(trained[0].settings.rank, classes)
