"""What training needs at least, in floating-point operations, and what this machine's matrix product reaches.

A multiplication with its addition counts as two. Counted are matrix products alone: norms, activations, softmax,
rotary embeddings, the embedding look-up, image decoding and AdamW are left out, and so is everything that a better
program would not do (padding, logits without a label, images seen before). So the share of the peak that
follows from it is a lower bound on how busy the machine was. Knows configurations, no weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from tinker import types

from experiments.bench.train_case import RANK, Case, prompt_of
from vlm.models import source

SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices whose product sets the peak
TIMES = 10


@dataclass(frozen=True)
class Work:
    """What a training goes through. lengths: positions of each view. answers: positions with a label, in all views.

    patches: of each distinct image, before the tower merges them.
    """

    lengths: Sequence[int]
    answers: int
    patches: Sequence[int]


def work_of(case: Case) -> Work:
    """The work of a case: an image goes through the tower once, however often it is seen."""
    prompt = prompt_of(case)
    data = [prompt.datum(*shot) for shot in case.photographs]
    answers = [int((datum.loss_fn_inputs["weights"].to_numpy() > 0).sum()) for datum in data]
    seen = [number for batch in case.batches for number in batch]
    merged = prompt.rule.settings["merge_size"] ** 2
    images = {case.photographs[n][0]: data[n].model_input.chunks for n in seen}
    patches = [merged * c.length for chunks in images.values() for c in chunks if isinstance(c, types.ImageChunk)]
    return Work([data[n].model_input.length for n in seen], sum(answers[n] for n in seen), patches)


def needed(case: Case) -> dict[str, float]:
    """Floating-point operations of the case by part of the model."""
    from transformers import AutoConfig

    config, work = AutoConfig.from_pretrained(source(case.model)), work_of(case)
    return {**text(config.text_config, work, RANK), "tower": tower(config.vision_config, work.patches)}


def text(config: Any, work: Work, rank: int) -> dict[str, float]:
    """The text model's parts. With T positions, layers of weights W (in x out each) and rank r:

    * forward: 2 T W.
    * backward: 2 T W for the gradient of the inputs; that of the frozen weights is not needed, nor is that of the
      inputs of the first layer's q, k and v, below which nothing is trained.
    * lora: 2 T r (in + out) forward and twice that backward (inputs, and A and B); the same exception.
    * attention: a position attends to itself and those before it: 4 d for each such pair and head (scores, values),
      and twice that backward (queries, keys, values, probabilities).
    * head: 4 x hidden x vocabulary at each position with a label (forward, and the gradient of its input).
    """
    hidden, heads, width = config.hidden_size, config.num_attention_heads, config.head_dim
    queries, keys, mlp = heads * width, config.num_key_value_heads * width, config.intermediate_size
    into = [(hidden, queries), (hidden, keys), (hidden, keys)]
    layer = [*into, (queries, hidden), (hidden, mlp), (hidden, mlp), (mlp, hidden)]
    layers, positions = config.num_hidden_layers, sum(work.lengths)
    weights, first = sum(i * o for i, o in layer), sum(i * o for i, o in into)
    adapters, first_adapters = sum(i + o for i, o in layer), sum(i for i, _ in into)
    pairs = sum(length * (length + 1) // 2 for length in work.lengths)
    return {
        "forward": 2.0 * positions * weights * layers,
        "backward": 2.0 * positions * (weights * layers - first),
        "lora": 2.0 * positions * rank * (3 * adapters * layers - first_adapters),
        "attention": 12.0 * pairs * queries * layers,
        "head": 4.0 * work.answers * hidden * config.vocab_size,
    }


def tower(config: Any, patches: Sequence[int]) -> float:
    """The frozen vision tower, forward, for images of these numbers of patches.

    For n patches: the patch embedding; in each layer 2 n (4 hidden² + 2 hidden x mlp) and attention of all patches to
    all, 4 n² hidden; a merger at the end and at each deepstack layer: two products over n/merge² positions.
    """
    hidden, merged = config.hidden_size, config.spatial_merge_size**2
    pixels = config.in_channels * config.temporal_patch_size * config.patch_size**2
    layer = 4 * hidden**2 + 2 * hidden * config.intermediate_size
    merger = hidden * (merged * hidden + config.out_hidden_size)
    mergers = 1 + len(config.deepstack_visual_indexes)
    each = 2.0 * (pixels * hidden + config.depth * layer + mergers * merger)
    return sum(n * each + 4.0 * n**2 * hidden * config.depth for n in patches)


def dtype_of(case: Case) -> torch.dtype:
    """What the case is computed in: the type of its checkpoint."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(source(case.model)).dtype


def peak(device: str, dtype: torch.dtype) -> list[float]:
    """Operations a second of a large matrix product with the threads that training has; the best is the peak."""
    side = SIDE[torch.device(device).type]
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator).to(device, dtype) for _ in range(2))
    return [2.0 * side**3 / _seconds(a, b) for _ in range(TIMES + 1)][1:]


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    start = perf_counter()
    torch.mm(a, b)
    synchronize(a.device.type)
    return perf_counter() - start


def synchronize(device: str) -> None:
    """Wait for what was sent to the device."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
