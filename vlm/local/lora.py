"""Linear layers with LoRA beside frozen weights, with few passes over memory and no gradient for what is frozen.

Knows no model and no batch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from vlm.local.adapter import Pair

SMALL = 1 << 20  # numbers in a weight that is worth having twice: with its delta, as one product instead of many


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, pair: Pair | None, scale: float, residual: Tensor | None = None
) -> Tensor:
    """(n, out): x W^T + bias + residual, and for each part of the outputs scale · x A^T B^T (Hu et al. 2021).

    x: (n, in). weight: (out, in), frozen: the rows of the parts one after the other. residual: (n, out).
    Where a pass is long and the layer small, the delta is added to the weight once for all positions.
    """
    if pair is None:
        return _frozen(x, weight, bias, residual)
    a, bs = pair
    way = _Merged if _worth_merging(x, weight) else _Beside
    return way.apply(x, weight, bias, residual, a, scale, *bs)


def _worth_merging(x: Tensor, weight: Tensor) -> bool:
    """By operations; in float32 alone, as a sum in another type would lose the small delta."""
    out, into = weight.shape
    return weight.dtype == torch.float32 and weight.numel() <= SMALL and len(x) * (out + into) >= 2 * out * into


def _frozen(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    if residual is None:
        return functional.linear(x, weight, bias)
    out = torch.addmm(residual, x, weight.t())
    return out if bias is None else out + bias


class _Beside(torch.autograd.Function):
    """The narrow products beside the frozen one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        a: Tensor,
        scale: float,
        *bs: Tensor,
    ) -> Tensor:
        out, inner = _frozen(x, weight, bias, residual), x @ a.t()
        for part, narrow, b in zip(_parts(out, bs), inner.chunk(len(bs), 1), bs, strict=True):
            part.addmm_(narrow, b.t(), alpha=scale)
        ctx.save_for_backward(x, weight, inner, a, *bs)
        ctx.scale, ctx.gathered = scale, _gathered(a, *bs)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, inner, a, *bs = ctx.saved_tensors
        back = torch.empty_like(inner)  # the gradient of x A^T
        parts = _parts(gradient, bs)
        for part, into, b in zip(parts, back.chunk(len(bs), 1), bs, strict=True):
            torch.mm(part, b, out=into)
        if ctx.scale != 1:
            back *= ctx.scale
        to_x = (gradient @ weight).addmm_(back, a) if ctx.needs_input_grad[0] else None
        to_residual = gradient if ctx.needs_input_grad[3] else None
        narrow = inner.chunk(len(bs), 1)
        if ctx.needs_input_grad[4] and ctx.gathered:
            of_a, *of_bs = ctx.gathered
            of_a.addmm_(back.t(), x)
            for of_b, part, each in zip(of_bs, parts, narrow, strict=True):
                of_b.addmm_(part.t(), each, alpha=ctx.scale)
        if ctx.gathered or not ctx.needs_input_grad[4]:
            return to_x, None, None, to_residual, None, None, *(None for _ in bs)
        to_bs = ((part.t() @ each).mul_(ctx.scale) for part, each in zip(parts, narrow, strict=True))
        return to_x, None, None, to_residual, back.t() @ x, None, *to_bs


def _gathered(*leaves: Tensor) -> tuple[Tensor, ...]:
    """On a GPU, where starting a kernel costs more than a small sum: what the leaves' gradients are added to."""
    gradients = tuple(leaf.grad for leaf in leaves if leaf.is_cuda and leaf.grad is not None)
    return gradients if len(gradients) == len(leaves) else ()


class _Merged(torch.autograd.Function):
    """The same with W + scale · B A as the weight: its gradient is one product, from which those of A and B follow."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        a: Tensor,
        scale: float,
        *bs: Tensor,
    ) -> Tensor:
        merged = weight.clone()
        for part, each, b in zip(merged.split([len(b) for b in bs]), a.chunk(len(bs)), bs, strict=True):
            part.addmm_(b, each, alpha=scale)
        ctx.save_for_backward(x, merged, a, *bs)
        ctx.scale = scale
        return _frozen(x, merged, bias, residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, merged, a, *bs = ctx.saved_tensors
        to_x = gradient @ merged if ctx.needs_input_grad[0] else None
        to_residual = gradient if ctx.needs_input_grad[3] else None
        if not ctx.needs_input_grad[4]:
            return to_x, None, None, to_residual, None, None, *(None for _ in bs)
        parts = (gradient.t() @ x).mul_(ctx.scale).split([len(b) for b in bs])
        to_a = torch.cat([b.t() @ part for b, part in zip(bs, parts, strict=True)])
        to_bs = (part @ each.t() for part, each in zip(parts, a.chunk(len(bs)), strict=True))
        return to_x, None, None, to_residual, to_a, None, *to_bs


def _parts(whole: Tensor, bs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return whole.split([b.shape[0] for b in bs], 1)
