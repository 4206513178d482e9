"""The functions of `vlm.local.model.ops`, and their gradients, as one Triton kernel each.

One pass over memory, in float32 inside, rounded where torch's operations round; `gated_back` needs gate_up alone. Needs
Triton; tensors may be of any GPU.
"""

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

HEADS = 8  # that one program works on
WIDE = 1024  # numbers of a gated row that one program works on


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, inverse = x.new_empty(x.shape), x.new_empty((len(x), 1), dtype=torch.float32)
    _start(_norm, (len(x),), x, weight, out, inverse, eps, **_row(x))
    return out, inverse


def norm_back(gradient: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    out = x.new_empty(x.shape)
    _start(_norm_back, (len(x),), gradient, x, weight, inverse, out, **_row(x))
    return out


def rotated_norm(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, inverse = x.new_empty(x.shape), x.new_empty((len(x), len(weight), 1), dtype=torch.float32)
    _start(_rotated_norm, _heads(x), x, weight, cos, sin, out, inverse, eps, **_sizes(x, weight))
    return out, inverse


def rotated_norm_back(gradient: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, inverse: Tensor) -> Tensor:
    out = x.new_empty(x.shape)
    _start(_rotated_norm_back, _heads(x), gradient, x, weight, cos, sin, inverse, out, **_sizes(x, weight))
    return out


def gated(gate_up: Tensor) -> tuple[Tensor, ...]:
    wide = gate_up.shape[-1] // 2
    out = gate_up.new_empty(len(gate_up), wide)
    _start(_gated, (len(out), triton.cdiv(wide, WIDE)), gate_up, out, wide, block=WIDE)
    return (out,)


def gated_back(gradient: Tensor, gate_up: Tensor) -> Tensor:
    out, wide = gate_up.new_empty(gate_up.shape), gate_up.shape[-1] // 2
    _start(_gated_back, (len(out), triton.cdiv(wide, WIDE)), gradient, gate_up, out, wide, block=WIDE)
    return out


def _start(kernel: Any, grid: tuple[int, ...], *values: Any, **sizes: int) -> None:
    """Kernels take contiguous tensors, and start on the current device, whatever their tensors are on."""
    tensors = [value.contiguous() if isinstance(value, Tensor) else value for value in values]
    with torch.cuda.device(values[0].device) if values[0].is_cuda else nullcontext():
        kernel[grid](*tensors, **sizes)


def _row(x: Tensor) -> dict[str, int]:
    block = triton.next_power_of_2(x.shape[-1])
    return {"width": x.shape[-1], "block": block, "num_warps": min(16, max(1, block // 512))}


def _heads(x: Tensor) -> tuple[int, int]:
    return len(x), triton.cdiv(x.shape[1], HEADS)


def _sizes(x: Tensor, weight: Tensor) -> dict[str, int]:
    half = x.shape[-1] // 2
    sizes = {"heads": x.shape[1], "normed": len(weight), "half": half}
    return {**sizes, "columns": triton.next_power_of_2(half), "rows": HEADS}


@triton.jit
def _norm(x, weight, out, inverse, eps, width, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    there = column < width
    value = tl.load(x + row * width + column, there, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    tl.store(inverse + row, scale)
    normal = (value * scale).to(x.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + column, normal * tl.load(weight + column, there, 0.0).to(tl.float32), there)


@triton.jit
def _norm_back(gradient, x, weight, inverse, out, width, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    there = column < width
    scale = tl.load(inverse + row)
    normal = tl.load(x + row * width + column, there, 0.0).to(tl.float32) * scale
    back = tl.load(gradient + row * width + column, there, 0.0).to(tl.float32)
    back = back * tl.load(weight + column, there, 0.0).to(tl.float32)
    along = tl.sum(back * normal, 0) / width
    tl.store(out + row * width + column, (back - normal * along) * scale, there)


@triton.jit
def _rotated_norm(  # type: ignore[no-untyped-def]
    x, weight, cos, sin, out, inverse, eps, heads, normed,
    half: tl.constexpr, columns: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    position, column = tl.program_id(0).to(tl.int64), tl.arange(0, columns)[None, :]
    head = (tl.program_id(1) * rows + tl.arange(0, rows))[:, None]
    there, first = (head < heads) & (column < half), (head < normed) & (column < half)
    at, own = (position * heads + head) * 2 * half + column, head * 2 * half + column
    left = tl.load(x + at, there, 0.0).to(tl.float32)
    right = tl.load(x + at + half, there, 0.0).to(tl.float32)
    scale = tl.rsqrt((tl.sum(left * left, 1) + tl.sum(right * right, 1)) / (2 * half) + eps)[:, None]
    tl.store(inverse + position * normed + head, scale, head < normed)
    c = tl.load(cos + position * 2 * half + column, column < half, 0.0).to(tl.float32)
    s = tl.load(sin + position * 2 * half + column, column < half, 0.0).to(tl.float32)
    a = (left * scale).to(x.dtype.element_ty).to(tl.float32) * tl.load(weight + own, first, 0.0).to(tl.float32)
    b = (right * scale).to(x.dtype.element_ty).to(tl.float32) * tl.load(weight + own + half, first, 0.0).to(tl.float32)
    a, b = a.to(x.dtype.element_ty).to(tl.float32), b.to(x.dtype.element_ty).to(tl.float32)
    tl.store(out + at, tl.where(first, a * c - b * s, left), there)
    tl.store(out + at + half, tl.where(first, b * c + a * s, right), there)


@triton.jit
def _rotated_norm_back(  # type: ignore[no-untyped-def]
    gradient, x, weight, cos, sin, inverse, out, heads, normed,
    half: tl.constexpr, columns: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    position, column = tl.program_id(0).to(tl.int64), tl.arange(0, columns)[None, :]
    head = (tl.program_id(1) * rows + tl.arange(0, rows))[:, None]
    there, first = (head < heads) & (column < half), (head < normed) & (column < half)
    at, own = (position * heads + head) * 2 * half + column, head * 2 * half + column
    scale = tl.load(inverse + position * normed + head, head < normed, 0.0)
    a = tl.load(x + at, first, 0.0).to(tl.float32) * scale
    b = tl.load(x + at + half, first, 0.0).to(tl.float32) * scale
    left = tl.load(gradient + at, there, 0.0).to(tl.float32)
    right = tl.load(gradient + at + half, there, 0.0).to(tl.float32)
    c = tl.load(cos + position * 2 * half + column, column < half, 0.0).to(tl.float32)
    s = tl.load(sin + position * 2 * half + column, column < half, 0.0).to(tl.float32)
    to_a = (left * c + right * s) * tl.load(weight + own, first, 0.0).to(tl.float32)
    to_b = (right * c - left * s) * tl.load(weight + own + half, first, 0.0).to(tl.float32)
    along = ((tl.sum(to_a * a, 1) + tl.sum(to_b * b, 1)) / (2 * half))[:, None]
    tl.store(out + at, tl.where(first, (to_a - a * along) * scale, left), there)
    tl.store(out + at + half, tl.where(first, (to_b - b * along) * scale, right), there)


@triton.jit
def _gated(gate_up, out, wide, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * block + tl.arange(0, block)
    there = column < wide
    gate = tl.load(gate_up + row * 2 * wide + column, there, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * wide + wide + column, there, 0.0).to(tl.float32)
    opened = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * wide + column, opened * up, there)


@triton.jit
def _gated_back(gradient, gate_up, out, wide, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * block + tl.arange(0, block)
    there, at = column < wide, row * 2 * wide + column
    gate = tl.load(gate_up + at, there, 0.0).to(tl.float32)
    up = tl.load(gate_up + at + wide, there, 0.0).to(tl.float32)
    back = tl.load(gradient + row * wide + column, there, 0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    tl.store(out + at, back * up * share * (1 + gate * (1 - share)), there)
    tl.store(out + at + wide, back * gate * share, there)
