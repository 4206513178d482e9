"""How much memory the workers of a sweep need, and how much is free.

A worker holds one model of each kind that its cells use. Weights and adapters are counted exactly, on a model that is
built without memory (torch's meta device). What a pass takes is an estimate from the sizes of its layers; where a
worker was measured to take more than all estimates together, that counts.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baselines import nano as nano_dinov2
from experiments.sweep.grid import gpus_of
from experiments.sweep.workload import (
    CellSpec,
    ImageFeatures,
    Workload,
    image_counts,
    image_features,
    image_sizes,
    item_bytes,
    mean_size,
    model_config,
)
from kshot.errors import KshotError
from kshot.untrusted import parse_json, read_file
from vlm.places import first_device

if TYPE_CHECKING:
    import torch

    from experiments.plan.ranks import RanksPlan

LIBRARIES = 1 << 30  # a process with torch, transformers, timm and scikit-learn, before it holds a model
TEXT, ANSWER = 48, 16  # tokens around the image of a training example and of its answer, about
PASS = "a training or scoring pass"  # noqa: S105 - not a password
SLACK = 1.1  # more than what is kept: what an allocator holds on to, and the gradients under way; see the tests
ADAM = 16  # bytes of a trained number: itself, its gradient and two moments, in float32
SNAPSHOT = 4  # bytes of it in the snapshot that is sampled from
ATTENTION, CHUNK = "full_attention", 64  # of layers, in transformers' words; of its code for Gated DeltaNet
ACTIVATIONS = 17  # vectors that a block of a vision transformer keeps of each token for its gradient


@dataclass(frozen=True)
class Memory:
    """Bytes. parts: what a worker holds, by name. free: in `location`, where the workers will be; None if not here.
    measured: what a worker took in a measurement. workers: how many share it; a GPU has one. unknown: models of unknown
    size."""

    parts: Mapping[str, int]
    free: int | None
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
        known = self.free is not None and self.per_worker > 0
        return int((self.free or 0) // self.per_worker) if known else self.workers

    @property
    def fits(self) -> bool:
        return self.possible_workers >= self.workers


def memory(workload: Workload, workers: int, device: str = "cpu", ranks: "RanksPlan | None" = None) -> Memory:
    """The memory of `workers` processes on the CPU, or of one on each GPU: then of the GPU with the least free memory.

    device: as the user names it, cuda being every visible GPU. It need not be here: the image features that a GPU keeps
    are then left out, since they take a share of what it has. ranks: what the VLM takes on each, where it is over
    several processes: those of a worker on the CPU count together.
    """
    from vlm import service

    on_cpu, nearest = workload.device == "cpu", tightest(device, workers * (ranks.count if ranks else 1))
    copies = ranks.count if ranks and on_cpu else 1
    parts, unknown = {"libraries": LIBRARIES * (1 + copies if copies > 1 else 1), "weights": 0}, list[str]()
    passes = [0]  # a cell has one at a time: the largest counts
    of_vlm = ((name, copies * size) for name, size in _vlm(workload, unknown, nearest, ranks))
    for name, size in (*of_vlm, *_backbones(workload, unknown)):
        if name == PASS:
            passes.append(size)
        else:
            parts[name] = parts.get(name, 0) + size
    location = "the CPU's memory" if on_cpu else f"the memory of {nearest or device}"
    parts[PASS] = max(passes)
    free = service.free_bytes(nearest) if nearest else None
    return Memory(parts, free, location, workers if on_cpu else 1, (*unknown,))


def tightest(device: str, count: int) -> "torch.device | None":
    """The device with the least free memory among the first `count` of those that it names; None where they are not
    here."""
    from vlm import service

    if not device.startswith("cpu") and not gpus_of(device, here=False):
        return None
    named = service.devices(first_device(device))
    every = service.devices("auto") if device == "cuda" else named  # in this order
    return min(every[:count], key=service.free_bytes)


def _vlm(
    workload: Workload, unknown: list[str], device: "torch.device | None", ranks: "RanksPlan | None"
) -> Iterator[tuple[str, int]]:
    """What the VLM takes in a process, by name."""
    from vlm import service

    for name in dict.fromkeys(cell.settings.model for cell in workload.local_vlm_cells):
        model = vlm_size(name, on_cpu=workload.device == "cpu")
        cells = [cell for cell in workload.local_vlm_cells if cell.settings.model == name]
        if model is None:
            unknown.append(name)
            continue
        yield "weights", ranks.weights + ranks.layers if ranks else model.weight_bytes
        sides = {c.source: mean_size(workload.datasets[c.source], c.settings.max_side) for c in cells}
        tokens = {source: int(model.features.tokens(*side)) for source, side in sides.items()}
        longest, (training, scoring, prompts) = TEXT + max(tokens.values()), service.pass_limits()
        if trained := [cell.settings for cell in cells if cell.spec.trains]:
            yield "adapter and optimizer", model.adapter_bytes(trained[0].rank)
            positions = min(trained[0].batch_size * longest, max(training, longest))
            kept = model.training_bytes(positions, ANSWER * positions // longest)
            yield PASS, ranks.largest_pass if ranks and ranks.divided else kept
        yield PASS, model.scoring_bytes(min(scoring, prompts * longest), prompts)
        if device is None:
            continue
        images = {source: each.train_views + each.test for source, each in image_counts(cells, workload).items()}
        features = max(images[source] * tokens[source] for source in tokens) * model.features.token_bytes
        yield "image features", min(int(features), service.feature_memory(device))


def _backbones(workload: Workload, unknown: list[str]) -> Iterator[tuple[str, int]]:
    cells = workload.select(lambda cell: cell.spec.uses_backbone)
    for name in dict.fromkeys(cell.settings.backbone for cell in cells):
        model = vit_size(name)
        if model is None:
            unknown.append(name)
            continue
        yield "weights", model.weight_bytes
        trained = {cell.source: cell for cell in cells if cell.settings.backbone == name and cell.spec.trains}
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
    from baselines.lora import TRAIN_CHUNK

    s, info = cell.settings, workload.datasets[cell.source]
    if s.image_size:
        return min(TRAIN_CHUNK, s.batch_size), s.image_size, s.image_size
    sizes = Counter(image_sizes(info))
    commonest = sizes.most_common(1)[0][1] / sizes.total()
    return min(TRAIN_CHUNK, math.ceil(s.batch_size * commonest)), *mean_size(info, s.max_side)


@dataclass(frozen=True)
class VlmSize:
    """A Qwen3-VL or Qwen3.5. weights, adapter: numbers; of LoRA on attention, MLP and head, of rank 1. item: bytes of a
    weight. features: of its images. text: the configuration of its text model. unused: numbers that are in its files
    alone, of the layers that predict more than one token ahead. layer: numbers of the largest decoder layer."""

    weights: int
    adapter: int
    item: int
    features: ImageFeatures
    text: Any
    unused: int = 0
    layer: int = 0

    @property
    def weight_bytes(self) -> int:
        return self.weights * self.item

    @property
    def file_bytes(self) -> int:
        return (self.weights + self.unused) * self.item

    def adapter_bytes(self, rank: int) -> int:
        """Of a run in training with its snapshot; both have a copy in the model's type where that is no float32, and
        the run one for the gradient."""
        return rank * self.adapter * (ADAM + SNAPSHOT + (3 * self.item if self.item < 4 else 0))

    def training_bytes(self, positions: int, labelled: int) -> int:
        """Of a training pass: what each layer keeps at each position; at each labelled position the logits and their
        gradient, in float32."""
        layers = sum(map(self._layer, self._mixers))
        return int(SLACK * (positions * layers + 3 * labelled * self.text.vocab_size * 4))

    def scoring_bytes(self, positions: int, prompts: int) -> int:
        """Of a pass without a gradient: one layer, all keys and values, and the states of linear attention."""
        t, (q, kv) = self.text, self._widths
        attending = self._mixers.count(ATTENTION)
        pass_ = positions * (4 * t.hidden_size + 4 * q + self._mlp + 2 * attending * kv) * self.item
        if attending == t.num_hidden_layers:
            return pass_
        state = t.linear_num_value_heads * t.linear_key_head_dim * t.linear_value_head_dim * 4
        return pass_ + prompts * (t.num_hidden_layers - attending) * state

    @property
    def _mixers(self) -> list[str]:
        """What each layer mixes positions by."""
        return list(getattr(self.text, "layer_types", None) or [ATTENTION] * self.text.num_hidden_layers)

    def _layer(self, mixer: str) -> int:
        """Bytes that a layer keeps at a position: the inputs of every product and norm. Of a linear attention also what
        transformers' own code of it keeps, in float32, in chunks of CHUNK positions; its factors are measured."""
        t, (q, kv) = self.text, self._widths
        around = 4 * t.hidden_size + self._mlp
        if mixer == ATTENTION:
            gate = 3 * q if t.model_type.startswith("qwen3_5") else 0
            return int((around + 2 * (q + 2 * kv) + 2 * q + gate) * self.item)
        heads, values = t.linear_num_value_heads, t.linear_num_value_heads * t.linear_value_head_dim
        keys = t.linear_num_key_heads * t.linear_key_head_dim
        recurrent = 11 * heads * t.linear_key_head_dim + 5 * heads * CHUNK
        return int((around + 5.5 * keys + 11.5 * values) * self.item) + 4 * recurrent

    @property
    def _widths(self) -> tuple[int, int]:
        return self.text.num_attention_heads * self.text.head_dim, self.text.num_key_value_heads * self.text.head_dim

    @property
    def _mlp(self) -> int:
        """Numbers that the MLP keeps at a position, of the experts that it goes through."""
        if not getattr(self.text, "num_experts", 0):
            return 3 * int(self.text.intermediate_size)
        shared = 3 * int(getattr(self.text, "shared_expert_intermediate_size", 0) or 0)
        expert = 3 * self.text.moe_intermediate_size + 2 * self.text.hidden_size
        return int(self.text.num_experts_per_tok * expert) + shared


def vlm_size(name: str, *, on_cpu: bool = False) -> VlmSize | None:
    """The size of a Qwen3-VL or Qwen3.5 that is here, on the hub or published; None for other models. on_cpu: see
    `item_bytes`."""
    config = model_config(name)
    features = image_features(config, on_cpu=on_cpu)
    if config is None or features is None:
        return None
    try:
        return _counted(json.dumps(config), item_bytes(config, on_cpu=on_cpu), features)
    except (ValueError, KeyError, AttributeError, KshotError):  # loading it says what is wrong
        return None


@cache  # the largest takes a second
def _counted(config_json: str, item: int, features: ImageFeatures) -> VlmSize:
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from vlm import service

    values = json.loads(config_json)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa", trust_remote_code=False)
    adapter = service.adapter_parameters(model, rank=1)
    text, ahead = config.text_config, _ahead(model, config.text_config)
    layer = max(map(parameters, model.model.language_model.layers))
    return VlmSize(parameters(model), adapter, item, features, text, ahead, layer)


def _ahead(model: Any, text: Any) -> int:
    """Numbers of the layers that predict tokens further ahead (MTP), which transformers leaves out: an attention layer
    each, a product of two hidden states to one, and three norms."""
    count, width = getattr(text, "mtp_num_hidden_layers", 0), text.hidden_size
    return (count * parameters(model.model.language_model.layers[-1]) + 2 * width**2 + 3 * width) if count else 0


@dataclass(frozen=True)
class VitSize:
    """A vision transformer of DINOv2's kind, in float32. weights: numbers. patch: side of one, in pixels."""

    weights: int
    width: int
    depth: int
    patch: int

    @property
    def weight_bytes(self) -> int:
        return 4 * self.weights

    @property
    def file_bytes(self) -> int:
        return self.weight_bytes

    def adapter_bytes(self, rank: int, classes: int) -> int:
        """LoRA on every linear layer of its blocks and a linear head, in training, with its snapshot."""
        d = self.width
        block = (d + 3 * d) + (d + d) + 2 * (d + 4 * d)
        return (ADAM + SNAPSHOT) * (rank * self.depth * block + classes * (d + 1))

    def training_bytes(self, tokens: int) -> int:
        """Of a training pass over so many tokens."""
        return int(SLACK * 4 * tokens * self.depth * ACTIVATIONS * self.width)


def vit_size(backbone: str) -> VitSize | None:
    """The size of a backbone: a folder of timm's, or a name of timm's; None for others."""
    folder = nano_dinov2.HERE if backbone == nano_dinov2.NAME else Path(backbone.removeprefix("local-dir:"))
    try:
        if not folder.exists():
            return None if backbone.startswith("hf-hub:") else _of_timm(backbone.partition("@")[0])
        arguments = parse_json(read_file(folder / "config.json"))["model_args"]
        weights = (folder / "model.safetensors").stat().st_size // 4
        return VitSize(weights, arguments["embed_dim"], arguments["depth"], arguments["patch_size"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):  # loading it says what is wrong
        return None


@cache
def _of_timm(name: str) -> VitSize:
    import timm
    import torch

    with torch.device("meta"):
        module: Any = timm.create_model(name, pretrained=False, num_classes=0)
    return VitSize(parameters(module), module.embed_dim, len(module.blocks), module.patch_embed.patch_size[0])


def parameters(model: Any) -> int:
    """Numbers of a model; a tied one counts once."""
    return sum(parameter.numel() for parameter in model.parameters())
