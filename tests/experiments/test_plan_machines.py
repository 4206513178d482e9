"""Plans for machines that are not here: their rates are the measured ones, and what does not fit is said."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments.plan.estimate import Estimate, rows
from experiments.plan.machines import CPU, GPUS, TRAINING_PRODUCTS, gpu, text_shape, this_machine, vit_training
from experiments.plan.memory import vit_size, vlm_size
from experiments.plan.stored import stored_estimate
from experiments.sweep.config import RunOptions, load
from experiments.sweep.methods import METHODS
from experiments.sweep.workload import CellSpec, DatasetInfo, Workload, model_config, of_sweep
from kshot.errors import InputError, UnknownNameError

BENCH = Path(__file__).parents[2] / "results" / "bench"


def estimated(preset: str, name: str | None, number: int = 1, **settings: object) -> Estimate:
    workload = of_sweep(load(preset, {}, settings), device="cuda" if name else "cpu")
    options = RunOptions(device="cuda" if name else "cpu")
    return stored_estimate(workload, Path("runs/none"), options, gpu(name) if name else CPU, number)


@pytest.mark.parametrize("model", ["2B", "8B"])
def test_a_step_on_an_h200_takes_what_was_measured(model: str) -> None:
    """The positions of the measured step follow from the operations that it needs."""
    measured = json.loads((BENCH / "train-h200-profile.json").read_text())["shapes"][model]
    size, config = vlm_size(model), model_config(model)
    assert size is not None
    assert config is not None
    shape = text_shape(size, config)
    operations = measured["needed_at_peak_ms"] * measured["gemm_peak_tflops"] * 1e9
    seconds = GPUS["h200"].training_pass(shape.weights, shape.layers, shape.width, operations / (4 * shape.weights))
    assert 1e3 * seconds == pytest.approx(measured["step_ms"], rel=0.15)


def test_the_demo_on_a_cpu_takes_about_what_was_measured() -> None:
    """Its icons, of 64 x 64 pixels, are counted and not drawn."""
    measured = {row["name"]: row["median"] for row in json.loads((BENCH / "sweep.json").read_text())["rows"]}
    sweep = load("demo", {}, {"max_side": 64}).on(20, 0.5)
    cells = [
        CellSpec("icons", name, shots, seed, settings)
        for name in sweep.methods
        for settings, shots, seed in sweep.points("icons", METHODS[name].settings, learns=METHODS[name].learns)
    ]
    workload = Workload(cells, {"icons": DatasetInfo(20, (), 1411, 570)})
    estimate = stored_estimate(workload, Path("runs/none"), RunOptions(), CPU, 1)
    assert estimate.time is not None
    workers = estimate.requirements.workers
    assert 0.4 < estimate.time.cells * workers / (2 * measured["the sweep's time, 2 workers"]) < 2


def test_the_blog_on_gpus_that_are_not_here() -> None:
    one, four = estimated("blog-small", "h200"), estimated("blog-small", "h100", 4)
    assert one.time is not None
    assert four.time is not None
    assert 600 < one.time.total < 24 * 3600
    assert 2.5 < one.time.cells / four.time.cells < 4.5
    text = "\n".join(" ".join(row) for row in rows(one))
    assert "an ESTIMATE for an H200 (141 GB): nothing was measured" in text
    assert "image features" in text.split("memory of a worker")[1].splitlines()[0]
    assert "4 x an H100 (80 GB)" in "\n".join(" ".join(row) for row in rows(four))


@pytest.mark.parametrize(("model", "name"), [("8B", "4090"), ("8B", "l4"), ("235B-A22B", "h200")])
def test_what_does_not_fit_has_no_time(model: str, name: str) -> None:
    estimate = estimated("blog", name, model=model)
    assert estimate.time is None
    assert "it does not fit into the memory of" in estimate.no_time
    assert not estimate.requirements.memory.fits


@pytest.mark.parametrize("name", ["4090", "l4"])
def test_the_smallest_model_is_trained_on_24_gb(name: str) -> None:
    """Beside DINOv2-base, whose images are trained on in passes that are no larger than the language model's."""
    memory = estimated("blog-small", name).requirements.memory
    assert memory.fits
    assert memory.per_worker > 15e9  # what the language model alone was measured to take


def test_a_gpu_that_is_not_in_the_table() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown GPU 'a1000' \(did you mean 'a100'\?\); choose from: h100"):
        gpu("a1000")
    assert gpu("H100") is GPUS["h100"]


@pytest.mark.parametrize(
    ("title", "memory", "found"),
    [
        ("NVIDIA H100 80GB HBM3", 85e9, "h100"),
        ("NVIDIA A100-SXM4-40GB", 42e9, "a100"),
        ("NVIDIA GeForce RTX 4090", 25e9, "4090"),
        ("NVIDIA L40S", 48e9, ""),
        ("NVIDIA GH200 480GB", 96e9, ""),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16e9, ""),
        ("NVIDIA H100 PCIe", 80e9, ""),
    ],
)
def test_a_gpu_here_is_that_of_its_whole_name(
    title: str, memory: float, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And has the memory that it has."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda number: title)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda number: SimpleNamespace(total_memory=memory))
    if not found:
        with pytest.raises(UnknownNameError, match="leave --quick out"):
            this_machine("cuda")
        return
    machine = this_machine("cuda:0")
    assert (machine.peak, machine.memory) == (GPUS[found].peak, memory)


def test_dinov2_is_planned_in_float32() -> None:
    """A step of large matrix products is no faster than the data sheet's float32 allows."""
    size = vit_size("vit_large_patch14_dinov2.lvd142m")
    assert size is not None
    for machine in GPUS.values():
        needed = TRAINING_PRODUCTS * size.weights * 257 * 16
        assert vit_training(machine, size, 257, 16) > needed / machine.peak32


def test_workers_are_those_that_are_asked_for() -> None:
    def workers(asked: int | None) -> int:
        sweep = load("blog-small", {"datasets": ("pets",), "methods": ("vlm-lora",)}, {})
        options = RunOptions(device="cuda", workers=asked)
        estimate = stored_estimate(of_sweep(sweep, device="cuda"), Path("runs/none"), options, gpu("h100"), 8)
        return estimate.requirements.workers

    assert (workers(2), workers(None)) == (2, 8)
    with pytest.raises(InputError, match="--workers 9, but --count 8 has room for 8"):
        workers(9)


def test_the_command_plans_for_a_machine_that_is_not_here(kshot: Callable[..., Any], tmp_path: Path) -> None:
    words = ("sweep", "blog-small", "--plan", "--gpu", "h100", "--count", "2", "--out", tmp_path / "out")
    ended = kshot(*words)
    assert ended.status == 0, ended.err
    assert "ESTIMATE for 2 x an H100 (80 GB)" in " ".join(ended.out.split())
    assert "vlm-lora" in ended.out
    assert not (tmp_path / "out").exists()


def test_the_plan_of_a_cluster_says_that_it_counts_this_machine(kshot: Callable[..., Any], tmp_path: Path) -> None:
    plan = ("sweep", "demo", "--plan", "--quick", "--out", tmp_path / "out")
    assert ["like this one" in kshot(*plan, *more).err for more in ((), ("--executor", "ray"))] == [False, True]
