"""What a large model takes on several GPUs, against a count by hand from its published sizes; and what a sweep's plan
says of it."""

from pathlib import Path
from typing import Any

import pytest

from baselines import nano as nano_dinov2
from experiments.plan import ranks
from experiments.plan.estimate import requirements
from experiments.plan.memory import LIBRARIES, vit_size, vlm_size
from experiments.sweep.config import RunOptions, load
from experiments.sweep.workload import of_sweep
from kshot.errors import InputError
from vlm import nano

LAYERS, HIDDEN, EXPERTS, INNER, WORDS = 94, 4096, 128, 1536, 151936  # of Qwen3-VL-235B-A22B's config.json
HEADS, KEY_HEADS, DIM = 64, 4, 128


def test_235b_on_eight_gpus() -> None:
    size = vlm_size("235B-A22B")
    assert size is not None
    attention = HIDDEN * DIM * (2 * HEADS + 2 * KEY_HEADS)
    layer = attention + EXPERTS * 3 * HIDDEN * INNER
    assert size.layer == pytest.approx(layer, rel=1e-3)
    assert size.weights == pytest.approx(LAYERS * layer + 2 * WORDS * HIDDEN, rel=5e-3)  # and a tower of 0.6e9
    of_experts = EXPERTS * ((HIDDEN + 2 * INNER) + (INNER + HIDDEN))
    of_attention = 2 * (HIDDEN + HEADS * DIM) + 2 * (HIDDEN + KEY_HEADS * DIM)
    adapter = LAYERS * (of_experts + of_attention) + HIDDEN + WORDS
    assert size.adapter_bytes(8) == pytest.approx(8 * adapter * (4 * 4 + 4 + 3 * 2), rel=1e-3)
    large, small = (ranks.plan(size, 8, memory * 1e9, 8) for memory in (141, 80))
    assert large.divided
    assert large.weights == pytest.approx((LAYERS * layer + 2 * WORDS * HIDDEN) * 2 / 8, rel=5e-3)
    assert large.fits
    assert not small.fits
    assert 95e9 < large.needed < 115e9
    assert not ranks.plan(size, 8, 141e9, 32).fits


def test_what_fits_is_not_divided() -> None:
    size = vlm_size("2B")
    assert size is not None
    found = ranks.plan(size, 2, 80e9, 32)
    assert found.fits
    assert not found.divided
    assert ranks.parsed("8x141GB") == (8, 141e9)
    with pytest.raises(InputError, match="8x141GB"):
        ranks.parsed("8 GPUs")


def test_a_worker_of_two_processes_on_the_cpu_has_the_model_twice(photos: Path, tmp_path: Path) -> None:
    grid = {"datasets": (f"folder:{photos}",), "methods": ("vlm-lora", "dinov2-logreg"), "shots": (1,), "seeds": (0,)}
    workload = of_sweep(load("demo", grid, {}), device="cpu:2")
    needed = requirements(workload, tmp_path, RunOptions(device="cpu:2", workers=1))
    found, one = needed.ranks, requirements(workload, tmp_path, RunOptions(workers=1)).memory
    vlm, vit = vlm_size(nano.NAME, on_cpu=True), vit_size(nano_dinov2.NAME)
    assert found is not None
    assert vlm is not None
    assert vit is not None
    assert (found.count, found.on_cpu, found.divided) == (2, True, False)
    assert found.memory == pytest.approx((one.free or 0) / 2, rel=0.2)
    assert needed.memory.parts["weights"] == 2 * vlm.weight_bytes + vit.weight_bytes
    assert needed.memory.parts["libraries"] == 3 * LIBRARIES
    assert one.parts["weights"] == vlm.weight_bytes + vit.weight_bytes


def test_the_plan_of_a_sweep_on_gpus_that_are_not_here(kshot: Any, tmp_path: Path) -> None:
    """30B-A3B on four of eight H100 a worker, by hand: 31.1e9 weights of two bytes, three of four parts gathered twice
    at 450 GB/s."""

    def table(*words: str) -> str:
        ended = kshot("sweep", "blog", "--model", "30B-A3B", "--set", "rank=8", "--plan", "--gpu", "h100", *words)
        assert ended.status == 0, ended.err
        return " ".join((ended.err + ended.out).split())

    said = table("--count", "8", "--gpus-per-worker", "4")
    assert "ranks 4 of each worker's VLM, one a GPU" in said
    assert "weights 15.5 GB divided: each GPU holds a part of every layer" in said
    assert "of these alone gathering 0.2 s in a training pass, at 450 GB/s to each GPU" in said
    assert "time unknown not known for a VLM over several processes" in said
    automatic = table("--count", "2", "--device", "auto")
    assert "device: cuda, all 2 GPUs for one worker: Qwen/Qwen3-VL-30B-A3B-Instruct takes" in automatic
    assert "ranks 2 of each worker's VLM" in automatic
    few = kshot("sweep", "blog", "--plan", "--gpu", "h100", "--count", "2", "--gpus-per-worker", "4")
    assert (few.status, "--gpus-per-worker 4, but --count 2" in few.err) == (2, True)


def test_a_model_of_several_gpus_is_held_to_its_part_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs of 60 GB: 62 GB of weights fit neither, and their halves do."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (60 * 10**9, 8 * 10**10))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 0)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: type("", (), {"total_memory": 8 * 10**10}))
    workload = of_sweep(load("blog", {"methods": ("vlm-lora",)}, {"model": "30B-A3B", "rank": 8}), device="cuda")
    alone, both = (requirements(workload, tmp_path, RunOptions(device="cuda", gpus_per_worker=each)) for each in (1, 2))
    assert (alone.workers, alone.ranks, alone.memory.fits) == (2, None, False)
    assert both.ranks is not None
    assert (both.workers, both.ranks.divided, both.memory.fits) == (1, True, True)
    assert both.memory.parts["weights"] == both.ranks.weights + both.ranks.layers
