"""What a model takes on each of N GPUs, or in each of N processes on the CPU, that serve and train it together, by
arithmetic: nothing is loaded. And which GPUs a sweep's workers get with `--device auto`."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from experiments.plan.machines import CPU_BANDWIDTH
from experiments.plan.memory import VlmSize, vlm_size
from experiments.sweep.config import Sweep
from experiments.sweep.methods import METHODS
from experiments.sweep.workload import Workload
from experiments.terminal import out, plain_table
from kshot.errors import InputError, ModelError

GATHERED = 2  # layers that are whole at once: one in use, and its copy as it is received
LINK = 450e9  # bytes a second that a GPU receives over NVLink of its generation 4, one way
LABELLED = 512  # positions of a training pass whose logits are computed, about


@dataclass(frozen=True)
class RanksPlan:
    """Bytes on each of `count` GPUs that have `memory` of them, in training a LoRA of this rank. divided: whether the
    weights are. on_cpu: whether it is in processes that share the CPU's memory instead."""

    rank: int
    count: int
    memory: float
    divided: bool
    weights: int
    layers: int
    adapter: int
    largest_pass: int
    seconds: float  # of gathering the weights, in a training pass
    on_cpu: bool = False

    @property
    def each(self) -> str:
        """What has it."""
        return "each process" if self.on_cpu else "each GPU"

    @property
    def needed(self) -> int:
        return self.weights + self.layers + self.adapter + self.largest_pass

    @property
    def fits(self) -> bool:
        return self.needed <= self.memory


def plan(size: VlmSize, count: int, memory: float, rank: int, *, on_cpu: bool = False) -> RanksPlan:
    """Whole weights on every GPU where they fit, else divided ones, as the engine chooses them. rank: of the LoRA on
    attention, MLP and head."""
    from vlm import service

    positions, *_ = service.pass_limits()
    largest = size.training_bytes(positions, LABELLED)
    adapter = size.adapter_bytes(rank)
    whole = RanksPlan(rank, count, memory, False, size.weight_bytes, 0, adapter, largest, 0.0, on_cpu)
    if whole.fits or count == 1:
        return whole
    layer = size.layer * size.item
    # of what a layer keeps for its gradient there is one layer's, and the inputs of all others
    kept = positions * size.text.num_hidden_layers * size.text.hidden_size * size.item
    largest = largest // size.text.num_hidden_layers + kept
    seconds = 2 * size.weight_bytes * (count - 1) / count / _link(on_cpu)  # forwards and backwards
    share = size.weight_bytes // count
    return RanksPlan(rank, count, memory, True, share, GATHERED * layer, adapter, largest, seconds, on_cpu)


def _link(on_cpu: bool) -> float:
    """Bytes a second that each receives from the others."""
    return CPU_BANDWIDTH if on_cpu else LINK


def of_workload(workload: Workload, count: int, memory: float | None) -> RanksPlan | None:
    """Of the VLM of a sweep's worker over `count` processes. memory: of each GPU, or of the whole CPU; None where it is
    not known. None for one process, and where the size of the model or the memory is not known."""
    cells, on_cpu = workload.local_vlm_cells, workload.device == "cpu"
    size = vlm_size(cells[0].settings.model, on_cpu=on_cpu) if cells and count > 1 else None
    if size is None or memory is None:
        return None
    return plan(size, count, memory // count if on_cpu else memory, cells[0].settings.rank, on_cpu=on_cpu)


def gpus_here() -> tuple[int, float]:
    """How many GPUs torch sees, and what is free of each, in bytes."""
    import torch

    from vlm import service

    count = torch.cuda.device_count()
    return count, min(map(service.free_bytes, service.devices("auto"))) if count else 0


def automatic(sweep: Sweep, service: str, count: int, memory: float) -> tuple[str, int, str]:
    """What `--device auto` means on a machine with so many GPUs of `memory` free bytes: the device, the GPUs of each
    worker, and a line that says why. A worker gets all of them where the VLM, an adapter in training and the largest
    pass do not fit one."""
    if not count:
        return "cpu", 1, "device: cpu, since torch sees no GPU"
    alone = f"device: cuda, {f'a worker on each of {count} GPUs' if count > 1 else 'one worker on the one GPU'}"
    if service != "local" or not any(METHODS[name].uses_vlm for name in sweep.methods if name in METHODS):
        return "cuda", 1, f"{alone}: no vision-language model computes here"
    model, rank = sweep.settings.model, sweep.settings.rank
    if (size := vlm_size(model)) is None:
        return "cuda", 1, f"{alone}: the size of {model} is not known before it is loaded"
    one = plan(size, 1, memory, rank)
    parts = f"{_gb(one.weights)} of weights, {_gb(one.adapter)} of an adapter of rank {rank} in training"
    sums = f"{model} takes {_gb(one.needed)} ({parts}, {_gb(one.largest_pass)} of the largest pass)"
    sums += f", and a GPU has {_gb(memory)} free"
    if one.fits or count == 1:
        return "cuda", 1, f"{alone}: {sums}"
    divided = f"divided it takes {_gb(plan(size, count, memory, rank).needed)} on each"
    return "cuda", count, f"device: cuda, all {count} GPUs for one worker: {sums}; {divided}"


def parsed(text: str) -> tuple[int, float]:
    """The GPUs and the bytes of each of 8x141GB. Raises InputError."""
    found = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)GB", text)
    if found is None or not int(found[1]):
        raise InputError(f"--plan {text!r} is no number of GPUs and their memory; write it as 8x141GB")
    return int(found[1]), float(found[2]) * 1e9


def print_plan(model: str, text: str, rank: int) -> None:
    """Say what a model takes on these GPUs. Raises InputError, and ModelError for a model whose size is not known."""
    count, memory = parsed(text)
    size = vlm_size(model)
    if size is None:
        raise ModelError(f"the size of model {model} is not known before it is loaded; name a Qwen3-VL or Qwen3.5")
    table = plain_table(["", "", ""])
    table.show_header = False
    for row in rows(plan(size, count, memory, rank)):
        table.add_row(*row)
    out.print(f"{model}, by arithmetic:")
    out.print(table, soft_wrap=False)


def rows(found: RanksPlan, *, alone: bool = True) -> Iterator[tuple[str, str, str]]:
    """What, how much, of what. alone: whether nothing else is on the GPUs, so that this says whether it fits."""
    each, preposition = found.each, "in" if found.on_cpu else "on"
    how = f"divided: {each} holds a part of every layer" if found.divided else f"whole {preposition} {each}"
    yield "weights", _gb(found.weights), how
    if found.divided:
        yield "gathered", _gb(found.layers), "the layer in use, and its copy as it is received"
    kept = f"rank {found.rank}, with gradients, Adam's moments and a snapshot"
    yield "adapter", _gb(found.adapter), f"{kept}; {preposition} {each}"
    yield "a pass", _gb(found.largest_pass), "what the largest training pass keeps"
    verdict = "fits" if found.fits else "does not fit"
    yield each, _gb(found.needed), f"of {_gb(found.memory)}: {verdict}" if alone else "of these alone"
    if found.divided:
        link = f"at {_link(found.on_cpu) / 1e9:.0f} GB/s to {each}"
        yield "gathering", f"{found.seconds:.1f} s", f"in a training pass, {link}"


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
