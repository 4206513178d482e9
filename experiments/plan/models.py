"""How much memory models take: their weights, LoRA adapters over them, and a pass.

Weights and adapters are counted exactly, on a model that is built without memory (torch's meta device). What a pass
takes is an estimate from the sizes of its layers.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from baselines import nano as nano_dinov2
from experiments.sweep.encoding import ImageFeatures, image_features, item_bytes, model_config
from kshot.errors import KshotError

SLACK = 1.1  # more than what is kept: what an allocator holds on to, and the gradients under way; see the tests
ADAM = 16  # bytes of a trained number: itself, its gradient and two moments, in float32
SNAPSHOT = 4  # bytes of it in the snapshot that is sampled from
ACTIVATIONS = 17  # vectors that a block of a vision transformer keeps of each token for its gradient


@dataclass(frozen=True)
class VlmSize:
    """A Qwen3-VL. weights: numbers. adapter: numbers of a LoRA adapter on attention, MLP and head, of rank 1. item:
    bytes of a weight. features: of its images. text: the configuration of its text model."""

    weights: int
    adapter: int
    item: int
    features: ImageFeatures
    text: Any

    @property
    def weight_bytes(self) -> int:
        return self.weights * self.item

    def adapter_bytes(self, rank: int) -> int:
        """Of a run in training with its snapshot; both have a copy in the model's type where that is no float32, and
        the run one for the gradient."""
        return rank * self.adapter * (ADAM + SNAPSHOT + (3 * self.item if self.item < 4 else 0))

    def training_bytes(self, positions: int, labelled: int) -> int:
        """Of a training pass: at each position and layer the inputs of every product and norm; at each labelled
        position the logits and their gradient, in float32."""
        t, (q, kv) = self.text, self._widths
        layer = 4 * t.hidden_size + 2 * (q + 2 * kv) + 2 * q + self._mlp
        return int(SLACK * (positions * t.num_hidden_layers * layer * self.item + 3 * labelled * t.vocab_size * 4))

    def scoring_bytes(self, positions: int) -> int:
        """Of a pass without a gradient: one layer, and all keys and values."""
        t, (q, kv) = self.text, self._widths
        return positions * (4 * t.hidden_size + 4 * q + self._mlp + 2 * t.num_hidden_layers * kv) * self.item

    @property
    def _widths(self) -> tuple[int, int]:
        return self.text.num_attention_heads * self.text.head_dim, self.text.num_key_value_heads * self.text.head_dim

    @property
    def _mlp(self) -> int:
        """Numbers that the MLP keeps at a position, of the experts that it goes through."""
        if not getattr(self.text, "num_experts", 0):
            return 3 * int(self.text.intermediate_size)
        return int(self.text.num_experts_per_tok * (3 * self.text.moe_intermediate_size + 2 * self.text.hidden_size))


def vlm_size(name: str) -> VlmSize | None:
    """The size of a Qwen3-VL that is here, on the hub or published; None for other models."""
    config = model_config(name)
    features = image_features(config)
    if config is None or features is None:
        return None
    try:
        return _counted(json.dumps(config), item_bytes(config), features)
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
        model = AutoModelForImageTextToText.from_config(config)
    adapter = service.adapter_parameters(model, rank=1)
    return VlmSize(parameters(model), adapter, item, features, config.text_config)


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
            return None if backbone.startswith("hf-hub:") else _of_timm(backbone)
        arguments = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_args"]
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
