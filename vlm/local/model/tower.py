"""The vision tower's forward pass: pixels → features.

The weights stay in the stock module; what it computes is computed here for all images of one size at once. The stock
forward has a Conv3d for patches (its stride is its kernel: a matrix product, many times faster as one, pytorch#174051),
makes its position tables anew every time, and runs attention image by image in every layer.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from vlm.local.model.ops import wide

Linear = Callable[[str, nn.Module, Tensor], Tensor]
Grid = tuple[int, int, int]  # patches: time, height, width
Tables = tuple[Tensor, Tensor, Tensor]  # of a grid: position embeddings, cosines, signed sines

GRIDS = 64  # grids of a tower whose tables are kept: at 1,320 patches of 1,152 channels in bfloat16 about 4 MB each


def plain(name: str, layer: nn.Module, x: Tensor) -> Tensor:
    """The layer as it is."""
    return layer(x)


def tower(
    visual: Any,
    pixels: Tensor,
    tables: Tables,
    count: int,
    linear: Linear = plain,
    opened: Callable[[Any], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    """The features of `count` images of one grid: (count, 1 + deepstack layers, tokens, hidden), the embeds first.

    visual: the stock Qwen3VLVisionModel of a dense or a mixture-of-experts model.
    pixels: (count x height x width, channels x time x patch x patch), as the stock image processor orders them.
    tables: `grid_tables` of each image's patches (1, height, width).
    linear: computes layer(x) for each linear layer, which it gets with its name in the tower ("blocks.0.attn.qkv",
        "blocks.0.attn.proj", "blocks.0.mlp.linear_fc1", "merger.linear_fc1", "deepstack_merger_list.0.linear_fc2").
    opened: around what is computed with a block's weights.
    """
    positions, *rotation = tables
    x = _patches(visual.patch_embed.proj, pixels).unflatten(0, (count, -1)) + positions
    merged: dict[int, Tensor] = {}
    for number, block in enumerate(visual.blocks):
        name = f"blocks.{number}"
        with opened(block):
            x = x + _attention(f"{name}.attn", block.attn, _norm(block.norm1, x), rotation, linear)
            inner = block.mlp.act_fn(linear(f"{name}.mlp.linear_fc1", block.mlp.linear_fc1, _norm(block.norm2, x)))
            x = x + linear(f"{name}.mlp.linear_fc2", block.mlp.linear_fc2, inner)
        if number in visual.deepstack_visual_indexes:
            level = visual.deepstack_visual_indexes.index(number)
            merged[level] = _merge(f"deepstack_merger_list.{level}", visual.deepstack_merger_list[level], x, linear)
    embeds = _merge("merger", visual.merger, x, linear)
    return torch.stack([embeds, *(merged[level] for level in sorted(merged))], 1)


def stock_features(core: Any, pixels: Tensor, grid: Grid, count: int) -> Tensor:
    """The same of any model whose images are cut into such patches, by its stock forward. core: with text and tower."""
    grids = torch.tensor([grid] * count, device=pixels.device)
    out = core.get_image_features(pixels, image_grid_thw=grids, return_dict=True)
    levels = [out.pooler_output, *(getattr(out, "deepstack_features", None) or ())]
    return torch.stack([torch.cat([*level]).unflatten(0, (count, -1)) for level in levels], 1)


def _patches(convolution: Any, pixels: Tensor) -> Tensor:
    weight = convolution.weight
    return functional.linear(pixels.to(weight.dtype), weight.flatten(1), convolution.bias)


def _attention(name: str, attention: Any, x: Tensor, rotation: list[Tensor], linear: Linear) -> Tensor:
    qkv = linear(f"{name}.qkv", attention.qkv, x).unflatten(-1, (3, attention.num_heads, -1))
    query, key = _rotate(qkv[:, :, :2], *rotation).transpose(1, 3).unbind(2)  # (images, heads, patches, channels)
    value = qkv[:, :, 2].transpose(1, 2)
    out = functional.scaled_dot_product_attention(query, key, value, scale=attention.scaling)
    return linear(f"{name}.proj", attention.proj, out.transpose(1, 2).flatten(2))


def _rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """x: (images, patches, 2, heads, channels). In float32, as the stock tower does; the sines bring their signs."""
    first, second = wide(x).chunk(2, -1)
    return (x * cosines + torch.cat((second, first), -1) * sines).to(x.dtype)


def _norm(norm: Any, x: Tensor) -> Tensor:
    return functional.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _merge(name: str, merger: Any, x: Tensor, linear: Linear) -> Tensor:
    """Neighbouring patches become one token: they lie side by side already."""
    after = merger.use_postshuffle_norm
    joined = (x if after else _norm(merger.norm, x)).reshape(len(x), -1, merger.hidden_size)
    joined = _norm(merger.norm, joined) if after else joined
    inner = merger.act_fn(linear(f"{name}.linear_fc1", merger.linear_fc1, joined))
    return linear(f"{name}.linear_fc2", merger.linear_fc2, inner)


@torch.inference_mode(False)  # tables made in inference mode would be useless to a later backward pass
@torch.no_grad()
def grid_tables(visual: Any, grid: Grid) -> Tables:
    """By the stock functions: position embeddings (patches, hidden); cosines and sines (patches, 1, 1, channels)."""
    weight, merge = visual.pos_embed.weight, visual.spatial_merge_size
    grids = torch.tensor([grid], device=weight.device)
    indices, shares = get_vision_interpolation_indices_and_weights(
        grids,
        num_grid_per_side=visual.num_grid_per_side,
        mode=visual.interpolation_mode,
        align_corners=visual.interpolation_align_corners,
        spatial_merge_size=merge,
    )
    positions = (visual.pos_embed(indices) * shares[:, :, None]).sum(1).to(weight.dtype)
    cosines, sines = visual.rotary_pos_emb(positions, get_vision_position_ids(grids, merge))
    half = sines.shape[-1] // 2
    signed = torch.cat((-sines[:, :half], sines[:, half:]), -1)  # rotate_half(x) * sin = swapped(x) * signed
    return positions, cosines[:, None, None].float(), signed[:, None, None].float()


@dataclass(frozen=True)
class ImageFeatures:
    """One image. values: (1 + deepstack layers, tokens, hidden), the embeds first."""

    grid: Grid
    values: Tensor

    @property
    def tokens(self) -> int:
        return self.values.shape[1]

    def to(self, device: torch.device) -> "ImageFeatures":
        """The same on a device."""
        return self if self.values.device == device else ImageFeatures(self.grid, self.values.to(device))

    def compact(self, host: bool = True) -> "ImageFeatures":
        """In memory of its own, the host's unless told: a view would keep a whole pass, or a padded file, alive."""
        values = self.values.cpu() if host else self.values
        whole = values.untyped_storage().nbytes() == values.nbytes
        return ImageFeatures(self.grid, values if whole else values.clone())
