"""The tower of the nano Qwen3-VL: the stock module, run on a batch of pictures of one size; taught before any text.

It learns as the nano DINOv2 does, from what `teacher` says of drawings.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision

from experiments.nano.learning import Plan, Report, distil


class LinearPatchEmbed(nn.Module):
    """The patch embedding as a matrix product, with the stock module's own parameters: its Conv3d has a stride equal
    to its kernel, and as a product it is many times faster (pytorch#174051)."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.proj: Any = stock.proj

    def forward(self, patches: Tensor) -> Tensor:
        """(patches, channels x time x height x width) → (patches, hidden)."""
        return nn.functional.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class Tower(nn.Module):
    """Qwen3-VL's vision model; `visual` is the stock module, whose parameters these are."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.visual, config = visual, visual.config
        self.patch, self.merge, self.frames = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
        visual.patch_embed = LinearPatchEmbed(visual.patch_embed)
        for block in visual.blocks:
            block.attn.forward = partial(_attention, block.attn)

    def forward(self, pictures: Tensor) -> Tensor:
        """(N, 3, side, side) of 0 to 1 → (N, D): the mean over an image's tokens, as the text model gets them."""
        return self.tokens(pictures)[0].mean(1)

    def tokens(self, pictures: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(N, tokens, D): the image's tokens, and what is added to them in the first layers of the text model."""
        n, grid = len(pictures), pictures.shape[-1] // self.patch
        grids = torch.tensor([[1, grid, grid]] * n, device=pictures.device)
        out = self.visual(self.patches(pictures), grids)
        return out.pooler_output.view(n, -1, out.pooler_output.shape[-1]), list(out.deepstack_features)

    def patches(self, pictures: Tensor) -> Tensor:
        """(N, 3, side, side) of 0 to 1 → (N * patches, 3 * frames * patch * patch): as the stock processor orders them,
        blocks of `merge` x `merge` patches together, a picture being as many equal frames as the tower takes."""
        n, (p, m), grid = len(pictures), (self.patch, self.merge), pictures.shape[-1] // self.patch
        cut = (pictures * 2 - 1).view(n, 3, grid // m, m, p, grid // m, m, p)
        ordered = cut.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(n * grid * grid, 3, 1, p, p)
        return ordered.expand(-1, -1, self.frames, -1, -1).reshape(n * grid * grid, -1)


def _attention(
    self: Any, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any
) -> Tensor:
    """The stock attention for images of one size: all in one product, where the stock one takes image by image."""
    images, length = len(cu_seqlens) - 1, len(hidden_states)
    q, k, v = self.qkv(hidden_states).view(length, 3, self.num_heads, -1).unbind(1)
    q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
    q, k, v = (each.view(images, length // images, self.num_heads, -1).transpose(1, 2) for each in (q, k, v))
    weights = ((q * self.scaling) @ k.transpose(2, 3)).softmax(-1)
    attended: Tensor = self.proj((weights.to(v.dtype) @ v).transpose(1, 2).reshape(length, -1))
    return attended


def train(visual: Any, masks: Tensor, described: Tensor, plan: Plan, report: Report) -> None:
    """Teach the stock module in place."""
    distil(Tower(visual), visual.config.out_hidden_size, masks, described, plan, report)
