"""What a model takes on each of N GPUs that serve and train it together, by arithmetic: nothing is loaded."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from experiments.plan.memory import VlmSize, vlm_size
from experiments.terminal import out, plain_table
from kshot.errors import InputError, ModelError

GATHERED = 2  # layers that are whole at once: one in use, and its copy as it is received
LINK = 450e9  # bytes a second that a GPU receives over NVLink of its generation 4, one way
LABELLED = 512  # positions of a training pass whose logits are computed, about


@dataclass(frozen=True)
class RanksPlan:
    """Bytes on each of `count` GPUs that have `memory` of them, in training. divided: whether the weights are."""

    count: int
    memory: float
    divided: bool
    weights: int
    layers: int
    adapter: int
    largest_pass: int
    seconds: float  # of gathering the weights, in a training pass

    @property
    def needed(self) -> int:
        return self.weights + self.layers + self.adapter + self.largest_pass

    @property
    def fits(self) -> bool:
        return self.needed <= self.memory


def plan(size: VlmSize, count: int, memory: float, rank: int) -> RanksPlan:
    """Whole weights on every GPU where they fit, else divided ones. rank: of the LoRA on attention, MLP and head."""
    from vlm import service

    positions, *_ = service.pass_limits()
    largest = size.training_bytes(positions, LABELLED)
    whole = RanksPlan(count, memory, False, size.weight_bytes, 0, size.adapter_bytes(rank), largest, 0.0)
    if whole.fits or count == 1:
        return whole
    layer = size.layer * size.item
    # of what a layer keeps for its gradient there is one layer's, and the inputs of all others
    kept = positions * size.text.num_hidden_layers * size.text.hidden_size * size.item
    largest = largest // size.text.num_hidden_layers + kept
    gathered = 2 * size.weight_bytes * (count - 1) / count  # forwards and backwards
    share = size.weight_bytes // count
    return RanksPlan(count, memory, True, share, GATHERED * layer, size.adapter_bytes(rank), largest, gathered / LINK)


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
    for row in rows(plan(size, count, memory, rank), rank):
        table.add_row(*row)
    out.print(f"{model}, by arithmetic:")
    out.print(table, soft_wrap=False)


def rows(found: RanksPlan, rank: int) -> Iterator[tuple[str, str, str]]:
    """What, how much, of what."""
    how = "divided: each GPU holds a part of every layer" if found.divided else "whole on each GPU"
    yield "weights", _gb(found.weights), how
    if found.divided:
        yield "gathered", _gb(found.layers), "the layer in use, and its copy as it is received"
    yield "adapter", _gb(found.adapter), f"rank {rank}, with gradients, Adam's moments and a snapshot; on each GPU"
    yield "a pass", _gb(found.largest_pass), "what the largest training pass keeps"
    verdict = "fits" if found.fits else "does not fit"
    yield "each GPU", _gb(found.needed), f"of {_gb(found.memory)}: {verdict}"
    if found.divided:
        yield "gathering", f"{found.seconds:.1f} s", f"in a training pass, at {LINK / 1e9:.0f} GB/s to each GPU"


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
