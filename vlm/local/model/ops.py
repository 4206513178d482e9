"""The text model's operations beside its matrix products, with their gradients: norms, rotation, gated activation.

Each gives what the stock operations give, with few passes over memory and no gradient for what is frozen. On a GPU
Triton's kernels compute them (`ops_triton`), elsewhere torch's operations, below. Functions named `…_back` give the
gradient of x from that of their namesake's result.
"""

import sys
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from kshot.hub import one_line


def wide(x: Tensor) -> Tensor:
    """In float32, as logits are; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight over the last dimension (Zhang & Sennrich 2019), in float32 inside; weight is frozen.

    x: (n, width). weight: (width,).
    """
    return _Operation.apply("norm", eps, x, weight)


def norm_rope(x: Tensor, weight: Tensor, rope: tuple[Tensor, ...], eps: float) -> Tensor:
    """RMS norm over each of the first heads, then rotation by position (Su et al. 2021); the other heads as they are.

    x: (n, heads, dim). weight: (first heads, dim), frozen. rope: cosines and sines, (n, 1, dim), both halves alike
    but for the sign of the sines: negative in the second.
    """
    return _Operation.apply("rotated_norm", eps, x, weight, *rope)


def rope_only(x: Tensor, count: int, rope: tuple[Tensor, ...]) -> Tensor:
    """Rotation of the first `count` heads by position, without a norm; the other heads as they are. x, rope: as there.

    It is linear, so nothing of x is kept for its gradient; on a GPU torch's operations compute it too.
    """
    return _Rotation.apply(x, count, *rope)


def swiglu(gate_up: Tensor) -> Tensor:
    """(n, 2 x wide) → (n, wide): silu(gate) · up (Shazeer 2020)."""
    return _Operation.apply("gated", None, gate_up)


class _Operation(torch.autograd.Function):
    """A function by name of this module or of `ops_triton`, and its `…_back`."""

    @staticmethod
    def forward(ctx: Any, name: str, eps: float | None, *inputs: Tensor) -> Tensor:
        out, *kept = getattr(_backend(inputs[0]), name)(*inputs, *([] if eps is None else [eps]))
        ctx.name, ctx.frozen = name, len(inputs) - 1
        ctx.save_for_backward(*inputs, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        back = getattr(_backend(gradient), f"{ctx.name}_back")
        return None, None, back(gradient, *ctx.saved_tensors), *(None for _ in range(ctx.frozen))


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.count = count
        return _rotated(x, count, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _rotated(gradient, ctx.count, cos, sin, -1), None, None, None


def _backend(x: Tensor) -> Any:
    return _on_gpu(x.device) if x.is_cuda else sys.modules[__name__]


@cache
def _on_gpu(device: torch.device) -> Any:
    """Triton's kernels where they run: torch for Windows has no Triton, and it needs a C compiler."""
    try:
        from vlm.local.model import ops_triton

        ops_triton.gated(torch.zeros(1, 2, device=device))
    except Exception as error:  # whatever a missing or broken compiler raises
        message = f"Triton compiles nothing here, so training on {device} is slower: {one_line(error)}"
        warnings.warn(message, stacklevel=2)
        return sys.modules[__name__]
    return ops_triton


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normed x, and what its gradient needs: (n, 1) 1 / rms in float32."""
    inverse = _inverse_rms(x, eps)
    return (x * inverse).to(x.dtype).mul_(weight), inverse


def norm_back(gradient: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    return _scaled_back(scaled := gradient * weight, x, inverse, scaled)


def rotated_norm(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The same heads with the first ones normed and rotated, and (n, first heads, 1) 1 / rms in float32."""
    first, out = x[:, : len(weight)], torch.empty_like(x)
    inverse = _inverse_rms(first, eps)
    _rotate((first * inverse).to(x.dtype).mul_(weight), cos, sin, 1, out[:, : len(weight)])
    out[:, len(weight) :] = x[:, len(weight) :]
    return out, inverse


def rotated_norm_back(gradient: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, inverse: Tensor) -> Tensor:
    out, count = torch.empty_like(x), len(weight)
    rotated = _rotate(gradient[:, :count], cos, sin, -1, out[:, :count]).mul_(weight)
    _scaled_back(rotated, x[:, :count], inverse, rotated)
    out[:, count:] = gradient[:, count:]
    return out


def gated(gate_up: Tensor) -> tuple[Tensor, ...]:
    """silu(gate) · up, and what its gradient needs beside gate_up."""
    gate, up = gate_up.chunk(2, -1)
    opened = functional.silu(gate)
    return opened * up, opened


def gated_back(gradient: Tensor, gate_up: Tensor, opened: Tensor) -> Tensor:
    (gate, up), out = gate_up.chunk(2, -1), torch.empty_like(gate_up)
    to_gate, to_up = out.chunk(2, -1)
    torch.mul(gradient, opened, out=to_up)
    torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=to_gate)
    return out


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return wide(x).square().mean(-1, keepdim=True).add_(eps).rsqrt_()


def _scaled_back(gradient: Tensor, x: Tensor, inverse: Tensor, out: Tensor) -> Tensor:
    """The gradient of x from that of x · inverse, into `out`."""
    gradient, x = wide(gradient), wide(x)
    along = (gradient * x).mean(-1, keepdim=True).mul_(inverse.square())
    return torch.mul(torch.addcmul(gradient, x, along, value=-1), inverse, out=out)


def _rotated(x: Tensor, count: int, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    out = torch.empty_like(x)
    _rotate(x[:, :count], cos, sin, direction, out[:, :count])
    out[:, count:] = x[:, count:]
    return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int, out: Tensor) -> Tensor:
    swapped = x.roll(x.shape[-1] // 2, -1)
    return torch.mul(x, cos, out=out).addcmul_(swapped, sin, value=-direction)
