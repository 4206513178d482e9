"""A few drawings, made in milliseconds: the half minute that all of them take is for none of these tests."""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from data.embedded.icons import Icon, inked, read_icons
from experiments.pretrain.subjects import square_mask

SOLID = "fontawesome6-solid-webfont"
NAMES = ("anchor", "bug", "leaf", "moon", "rocket", "tooth", "tree", "wrench")


def icon(name: str, font: str = SOLID) -> Icon:
    """One icon by name."""
    return next(i for i in read_icons() if i.name == name and i.font.file == font)


@cache
def masks() -> Tensor:
    """(8, 64, 64) uint8: what NAMES stand for, as one designer drew it."""
    return torch.from_numpy(np.stack([square_mask(image) for _, image in inked(map(icon, NAMES))]))
