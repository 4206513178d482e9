"""How many numbers a model holds and a LoRA adapter over it, by its configuration. Reads no weights and imports none.

The configuration is the model's config.json; of the sizes of Qwen3-VL that are not on this machine it is written here,
as published. Counts are exact, and tests hold them to the stock classes; activations are an estimate.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baselines import nano as nano_dinov2
from kshot.errors import KshotError
from vlm import models
from vlm.models import SIZES

SLACK = 1.1  # more than what is kept: what an allocator holds on to, and the gradients under way; see the tests
ADAM = 16  # bytes a trained number takes: itself, its gradient and two moments, in float32
ITEM = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclass(frozen=True)
class Vlm:
    """A Qwen3-VL: the fields of its text and vision configuration that sizes follow from.

    experts: 0 where the model has none; then `mlp` is the width of the one there is. item: bytes of a weight.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    tied: bool
    item: int
    tower: int  # width of the vision tower
    depth: int
    tower_mlp: int
    deepstack: int  # layers of the tower that have a merger of their own
    patch: int
    temporal: int = 2
    merge: int = 2
    places: int = 2304  # position embeddings of the tower
    experts: int = 0
    active: int = 0  # experts that a position goes through

    @property
    def weights(self) -> int:
        """Numbers of the whole model, a tied head counted once."""
        head = 0 if self.tied else self.vocabulary * self.hidden
        return self._text + self.vocabulary * self.hidden + head + self._tower

    @property
    def weight_bytes(self) -> int:
        return self.weights * self.item

    @property
    def image_bytes_per_token(self) -> int:
        """Of the image features that are kept: the embeds and one more for each deepstack layer."""
        return (1 + self.deepstack) * self.hidden * self.item

    def adapter(self, rank: int) -> int:
        """Numbers of a LoRA adapter on attention, MLP and head, as the local service makes it."""
        h, q, kv = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = (h + q) + 2 * (h + kv) + (q + h)
        dense = 3 * (h + self.mlp)
        sparse = self.experts * ((h + 2 * self.mlp) + (self.mlp + h))
        return rank * (self.layers * (attention + (sparse or dense)) + h + self.vocabulary)

    def adapter_bytes(self, rank: int) -> int:
        """Of a run in training with its snapshot: Adam's, a copy to compute with where that is no float32, and the
        snapshot in float32 and in that type."""
        return self.adapter(rank) * (ADAM + 4 + (2 * self.item + self.item if self.item < 4 else 0))

    def training_bytes(self, positions: int, labelled: int) -> int:
        """What a training pass takes, about: at each position and layer the inputs of every product and norm;
        at each labelled position the logits and their gradient, in float32."""
        h, q, kv = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        mlp = 3 * self.mlp if not self.experts else self.active * (3 * self.mlp + 2 * h)
        layer = 4 * h + 2 * (q + 2 * kv) + 2 * q + mlp
        return int(SLACK * (positions * self.layers * layer * self.item + 3 * labelled * self.vocabulary * 4))

    def scoring_bytes(self, positions: int) -> int:
        """What a pass without a gradient has in memory at once, about: one layer, and all keys and values."""
        mlp = 3 * self.mlp if not self.experts else self.active * (3 * self.mlp + 2 * self.hidden)
        layer = 4 * self.hidden + 4 * self.heads * self.head_dim + mlp
        cache = 2 * self.layers * self.kv_heads * self.head_dim
        return positions * (layer + cache) * self.item

    @property
    def _text(self) -> int:
        h, q, kv = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        one = 3 * h * self.mlp
        mlp = self.experts * one + self.experts * h if self.experts else one
        return self.layers * (h * (q + 2 * kv) + q * h + 2 * self.head_dim + 2 * h + mlp) + h

    @property
    def _tower(self) -> int:
        d, merged = self.tower, self.merge**2 * self.tower
        patch = 3 * self.temporal * self.patch**2 * d + d
        block = 3 * d * d + 3 * d + d * d + d + 2 * d * self.tower_mlp + self.tower_mlp + d + 4 * d
        products = merged * merged + merged + merged * self.hidden + self.hidden
        mergers = products + 2 * d + self.deepstack * (products + 2 * merged)
        return patch + self.places * d + self.depth * block + mergers


@dataclass(frozen=True)
class Vit:
    """A vision transformer of DINOv2's kind, in float32. weights: its numbers. patch: side of one, in pixels."""

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
        return (ADAM + 4) * (rank * self.depth * block + classes * (d + 1))

    def training_bytes(self, tokens: int) -> int:
        """What a training pass over so many tokens takes, about: 17 vectors a block are kept for its gradient."""
        return int(SLACK * 4 * tokens * self.depth * 17 * self.width)


def of_config(config: Mapping[str, Any]) -> Vlm:
    """The sizes of a config.json of Qwen3-VL."""
    text, vision = config["text_config"], config["vision_config"]
    experts = int(text.get("num_experts") or text.get("num_local_experts") or 0)
    said = (each.get(name) for each in (config, text) for name in ("dtype", "torch_dtype"))  # the hub's say it of text
    dtype = next(filter(None, said), "float32")
    return Vlm(
        hidden=text["hidden_size"],
        layers=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        head_dim=text["head_dim"],
        mlp=text["moe_intermediate_size"] if experts else text["intermediate_size"],
        vocabulary=text["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        item=ITEM[str(dtype)],
        tower=vision["hidden_size"],
        depth=vision["depth"],
        tower_mlp=vision["intermediate_size"],
        deepstack=len(vision["deepstack_visual_indexes"]),
        patch=vision["patch_size"],
        temporal=vision.get("temporal_patch_size", 2),
        merge=vision.get("spatial_merge_size", 2),
        places=vision["num_position_embeddings"],
        experts=experts,
        active=int(text.get("num_experts_per_tok") or 0) if experts else 0,
    )


def of_folder(folder: Path) -> Vlm:
    """The sizes of a model's folder. Raises OSError, ValueError and KeyError for what is no configuration of one."""
    return of_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def _published(text: tuple[int, ...], tower: tuple[int, ...], *, tied: bool = False, experts: int = 0) -> Vlm:
    hidden, layers, heads, kv_heads, mlp = text
    width, depth, tower_mlp = tower
    return Vlm(
        *(hidden, layers, heads, kv_heads, 128, mlp, 151936, tied, 2, width, depth, tower_mlp, 3, 16),
        experts=experts,
        active=8 if experts else 0,
    )


SMALL_TOWER, LARGE_TOWER = (1024, 24, 4096), (1152, 27, 4304)
PUBLISHED = {  # hub id → its sizes, as its config.json on the hub says
    SIZES["2B"]: _published((2048, 28, 16, 8, 6144), SMALL_TOWER, tied=True),
    SIZES["4B"]: _published((2560, 36, 32, 8, 9728), SMALL_TOWER, tied=True),
    SIZES["8B"]: _published((4096, 36, 32, 8, 12288), LARGE_TOWER),
    SIZES["30B-A3B"]: _published((2048, 48, 32, 4, 768), LARGE_TOWER, experts=128),
    SIZES["235B-A22B"]: _published((4096, 94, 64, 4, 1536), LARGE_TOWER, experts=128),
}
DINOV2 = {  # a name's beginning → its sizes, as timm makes them for inputs of 518 pixels
    "vit_small_patch14_dinov2": Vit(22056192, 384, 12, 14),
    "vit_base_patch14_dinov2": Vit(86579712, 768, 12, 14),
    "vit_large_patch14_dinov2": Vit(304367616, 1024, 24, 14),
    "vit_giant_patch14_dinov2": Vit(1136479232, 1536, 40, 14),
}


def vlm_of(name: str) -> Vlm | None:
    """The sizes of a vision-language model that is here, or whose sizes are published; None for others."""
    ours = name in models.MODELS or (Path(name) / "config.json").is_file()
    try:
        if ours:
            return of_folder(Path(models.source(name)))
        return PUBLISHED.get(name.partition("@")[0]) or of_folder(Path(models.source(name)))
    except (OSError, ValueError, KeyError, KshotError):  # loading it says what is wrong
        return None


def vit_of(backbone: str) -> Vit | None:
    """The sizes of a backbone in a folder of timm's or with a published name; None for others."""
    folder = nano_dinov2.HERE if backbone == nano_dinov2.NAME else Path(backbone.removeprefix("local-dir:"))
    for start, vit in DINOV2.items():
        if backbone.startswith(f"{start}.") and not folder.exists():
            return vit
    try:
        arguments = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_args"]
        weights = (folder / "model.safetensors").stat().st_size // 4
        return Vit(weights, arguments["embed_dim"], arguments["depth"], arguments["patch_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
