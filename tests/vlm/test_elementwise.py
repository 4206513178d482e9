"""Norms, rotation and gated activation: torch's way against autograd of their formulas, Triton's against torch's."""

import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from vlm.local.model import ops

EPS = 1e-6
SIZES = [(1, 3, 1, 4), (5, 9, 6, 12), (2, 17, 12, 128)]  # positions, heads, normed ones, width of one
TOLERANCE = {torch.float32: {"atol": 2e-6, "rtol": 1e-5}, torch.bfloat16: {"atol": 2e-2, "rtol": 2e-2}}


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, -left), -1) * sin


def _inputs(size: tuple[int, int, int, int], dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    count, heads, normed, width = size
    rng = torch.Generator().manual_seed(heads)
    angles = torch.rand(count, 1, width // 2, generator=rng).mul(6).repeat(1, 1, 2)
    made = {
        "x": torch.randn(count, heads, width, generator=rng),
        "weight": torch.rand(normed, width, generator=rng) + 0.5,
        "cos": angles.cos(),
        "sin": angles.sin() * torch.ones(width).index_fill_(0, torch.arange(width // 2, width), -1),
        "gradient": torch.randn(count, heads, width, generator=rng),
    }
    return {name: tensor.to(device, dtype) for name, tensor in made.items()}


@pytest.mark.parametrize("size", SIZES)
def test_gradients_are_those_of_the_formulas(size: tuple[int, int, int, int]) -> None:
    exact = _inputs(size, torch.float64)
    x, weight, normed = exact["x"].requires_grad_(), exact["weight"], size[2]
    single = {name: tensor.detach().float() for name, tensor in exact.items()}
    first = _rotated(_norm(x[:, :normed], weight), exact["cos"], exact["sin"])
    flat, row = x.flatten(1), exact["gradient"].flatten(1)
    gate, up = flat.chunk(2, 1)
    wide = torch.ones(flat.shape[1]) * 0.7
    cases: list[tuple[Tensor, Tensor, Any]] = [
        (
            torch.cat((first, x[:, normed:]), 1),
            exact["gradient"],
            lambda y: ops.norm_rope(y, single["weight"], (single["cos"], single["sin"]), EPS),
        ),
        (_norm(flat, wide.double()), row, lambda y: ops.rms_norm(y.flatten(1), wide, EPS)),
        (functional.silu(gate) * up, row[:, ::2], lambda y: ops.swiglu(y.flatten(1))),
    ]
    for expected, gradient, ours in cases:
        y = x.detach().float().requires_grad_()
        out = ours(y)
        torch.testing.assert_close(out.double(), expected, **TOLERANCE[torch.float32])
        (slope,) = torch.autograd.grad(expected, x, gradient)
        (own,) = torch.autograd.grad(out, y, gradient.float())
        torch.testing.assert_close(own.double(), slope, **TOLERANCE[torch.float32])


def _assert_agrees(backend: ModuleType, size: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> None:
    """All six functions of `backend` against torch's, on float32 copies of the same numbers."""
    inputs = _inputs(size, dtype, device)
    exact = {name: tensor.float() for name, tensor in inputs.items()}
    turned = ("weight", "cos", "sin")

    def close(ours: Tensor, expected: Tensor) -> None:
        assert ours.shape == expected.shape
        torch.testing.assert_close(ours.float(), expected.float(), **TOLERANCE[dtype])

    def all_of(backend: Any, named: dict[str, Tensor]) -> Iterator[Tensor]:
        x, gradient = named["x"], named["gradient"]
        out, inverse = backend.rotated_norm(x, *(named[name] for name in turned), EPS)
        yield from (out, inverse, backend.rotated_norm_back(gradient, x, *(named[name] for name in turned), inverse))
        flat, wide = x.flatten(1), named["x"].new_ones(x[0].numel()) * 0.75
        out, inverse = backend.norm(flat, wide, EPS)
        yield from (out, inverse, backend.norm_back(gradient.flatten(1), flat, wide, inverse))
        out, *kept = backend.gated(flat)
        yield from (out, backend.gated_back(gradient.flatten(1)[:, ::2], flat, *kept))

    for ours, expected in zip(all_of(backend, inputs), all_of(ops, exact), strict=True):
        close(ours, expected)


def test_kernels_agree_with_torch() -> None:
    """In a process of its own, in which Triton's interpreter runs them on the CPU: it must be chosen before Triton."""
    pytest.importorskip("triton", reason="torch has no Triton on this system")
    script = "from tests.vlm.test_elementwise import interpreted; interpreted()"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["6", "agree"]


def interpreted() -> None:
    from vlm.local.model import ops_triton

    cases = list(product(SIZES, TOLERANCE))
    for size, dtype in cases:
        _assert_agrees(ops_triton, size, dtype, "cpu")
    print(len(cases), "agree")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [*SIZES, (700, 48, 40, 128)])
def test_compiled_kernels_agree_with_torch(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    backend = ops._on_gpu(torch.device("cuda", 0))
    assert backend is not ops
    _assert_agrees(backend, size, dtype, "cuda")


def test_without_a_compiler_torch_does_it_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vlm.local.model.ops_triton", None)
    monkeypatch.delattr("vlm.local.model.ops_triton", raising=False)
    ops._on_gpu.cache_clear()
    with pytest.warns(UserWarning, match="Triton compiles nothing here"):
        assert ops._on_gpu(torch.device("cpu")) is ops
    ops._on_gpu.cache_clear()
