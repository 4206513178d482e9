"""A few drawings, made in milliseconds (the half minute that all of them take is for none of these tests), and models
that have not learnt yet."""

from functools import cache

import torch
from torch import Tensor
from transformers import AutoConfig, Qwen3VLForConditionalGeneration

from data.embedded.icons import Icon, inked, read_icons, thumbnails
from vlm import nano

SOLID = "fontawesome6-solid-webfont"
MATERIAL = "materialdesignicons6-webfont"
NAMES = ("anchor", "bug", "leaf", "moon", "rocket", "tooth", "tree", "wrench")


def icon(name: str, font: str = SOLID) -> Icon:
    """One icon by name."""
    return next(i for i in read_icons() if i.name == name and i.font == font)


@cache
def masks() -> Tensor:
    """(8, 64, 64) uint8: what NAMES stand for, as one designer drew it."""
    return torch.from_numpy(thumbnails((image for _, image in inked(map(icon, NAMES))), 64).reshape(-1, 64, 64))


def fresh() -> Qwen3VLForConditionalGeneration:
    """The stock nano Qwen3-VL with random weights, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3VLForConditionalGeneration(AutoConfig.from_pretrained(nano.HERE))
    model.set_attn_implementation("eager")
    return model.eval()
