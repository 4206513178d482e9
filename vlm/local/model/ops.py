"""The text model's operations beside its matrix products, with their gradients: norms, rotation, gated activation.

Each gives what the stock operations give, with few passes over memory and no gradient for what is frozen. On a GPU
Triton's kernels compute them (`ops_triton`), elsewhere torch's (`ops_torch`).
"""

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kshot.hub import one_line
from vlm.local.model import ops_torch


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight over the last dimension (Zhang & Sennrich 2019), in float32 inside; weight is frozen.

    x: (n, width). weight: (width,).
    """
    return _RmsNorm.apply(x, weight, eps)


def norm_rope(x: Tensor, weight: Tensor, rope: tuple[Tensor, ...], eps: float) -> Tensor:
    """RMS norm over each of the first heads, then rotation by position (Su et al. 2021); the other heads as they are.

    x: (n, heads, dim). weight: (first heads, dim), frozen. rope: cosines and sines, (n, 1, dim), both halves alike.
    """
    cos, sin = rope
    return _NormRope.apply(x, weight, cos, sin, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """(n, 2 x wide) → (n, wide): silu(gate) · up (Shazeer 2020)."""
    return _SwiGlu.apply(gate_up)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, inverse = _backend(x).rms(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _backend(gradient).rms_back(gradient, *ctx.saved_tensors), None, None


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        out, inverse = _backend(x).norm_rope(x, weight, cos, sin, eps)
        ctx.save_for_backward(x, weight, cos, sin, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _backend(gradient).norm_rope_back(gradient, *ctx.saved_tensors), None, None, None, None


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        out, kept = _backend(gate_up).swiglu(gate_up)
        ctx.save_for_backward(gate_up, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _backend(gradient).swiglu_back(gradient, *ctx.saved_tensors)


def _backend(x: Tensor) -> Any:
    return _on_gpu(x.device) if x.is_cuda else ops_torch


@cache
def _on_gpu(device: torch.device) -> Any:
    """Triton's kernels where they run: torch for Windows has no Triton, and it needs a C compiler."""
    try:
        from vlm.local.model import ops_triton

        ops_triton.swiglu(torch.zeros(1, 2, device=device))
    except Exception as error:  # whatever a missing or broken compiler raises
        message = f"Triton compiles nothing here, so training on {device} is slower: {one_line(error)}"
        warnings.warn(message, stacklevel=2)
        return ops_torch
    return ops_triton
