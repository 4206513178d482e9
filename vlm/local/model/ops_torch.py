"""Norms, rotation and gated activation by torch's operations, and their gradients. What each means:
`vlm.local.model.ops`.

Functions named `…_back` give the gradient of the first argument of their namesake from that of its result.
"""

import torch
from torch import Tensor
from torch.nn import functional


def rms(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normed x, and what its gradient needs: (n, 1) 1 / rms in float32."""
    inverse = _inverse_rms(x, eps)
    return (x * inverse).to(x.dtype).mul_(weight), inverse


def rms_back(gradient: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    return _norm_back(gradient * weight, x, inverse)


def norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The same heads with the first ones normed and rotated, and (n, first heads, 1) 1 / rms in float32."""
    first, out = x[:, : len(weight)], torch.empty_like(x)
    inverse = _inverse_rms(first, eps)
    _rotate((first * inverse).to(x.dtype).mul_(weight), cos, sin, 1, out[:, : len(weight)])
    out[:, len(weight) :] = x[:, len(weight) :]
    return out, inverse


def norm_rope_back(gradient: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, inverse: Tensor) -> Tensor:
    out, count = torch.empty_like(x), len(weight)
    rotated = _rotate(gradient[:, :count], cos, sin, -1, out[:, :count]).mul_(weight)
    rotated.copy_(_norm_back(rotated, x[:, :count], inverse))
    out[:, count:] = gradient[:, count:]
    return out


def swiglu(gate_up: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """silu(gate) · up, and what its gradient needs beside gate_up."""
    gate, up = gate_up.chunk(2, -1)
    open_ = functional.silu(gate)
    return open_ * up, (open_,)


def swiglu_back(gradient: Tensor, gate_up: Tensor, open_: Tensor) -> Tensor:
    (gate, up), out = gate_up.chunk(2, -1), torch.empty_like(gate_up)
    to_gate, to_up = out.chunk(2, -1)
    torch.mul(gradient, open_, out=to_up)
    torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=to_gate)
    return out


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return x.float().square().mean(-1, keepdim=True).add_(eps).rsqrt_()


def _norm_back(gradient: Tensor, x: Tensor, inverse: Tensor) -> Tensor:
    """The gradient of x from that of x · inverse."""
    normal = x * inverse
    along = (gradient * normal).mean(-1, keepdim=True)
    return torch.addcmul(gradient.float(), normal, along, value=-1).mul_(inverse).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int, out: Tensor) -> Tensor:
    """Into out."""
    half = x.shape[-1] // 2
    torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-direction)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=direction)
    return out
