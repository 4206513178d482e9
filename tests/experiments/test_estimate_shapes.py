"""Sizes of models as the plan counts them: held to published numbers, to what is loaded, and to what a pass was
measured to take."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from baselines import nano as nano_dinov2
from baselines.backbone import load as load_backbone
from baselines.lora import LoraHeadClient
from experiments.plan.memory import TEXT, VitSize, parameters, vit_size, vlm_size
from experiments.sweep.config import load
from experiments.sweep.methods import Task, prompt_of
from experiments.sweep.workload import published_configs
from tests.vlm.checkpoints import experts
from vlm import models, nano
from vlm.local.model import load as loading
from vlm.local.model.lora import Layout, LoraSpec
from vlm.service import connect

PHOTOGRAPHS = (300, 200), (200, 300), (300, 300), (267, 300)  # pixels, as those of the measured run
PROFILE = Path(__file__).parents[2] / "results/bench/train-h200-profile.json"
PUBLISHED = {  # numbers of the model, of an adapter of rank 32 over it; bytes of the image features of a token
    "2B": (2127532032, 39792640, 16384),
    "4B": (4437815808, 71004160, 20480),
    "8B": (8767123696, 92286976, 32768),
    "30B-A3B": (31070754032, 1289957376, 16384),
    "235B-A22B": (235670022896, 5034946560, 32768),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_published_sizes(size: str) -> None:
    found = vlm_size(models.SIZES[size])
    assert found is not None
    assert (found.weights, 32 * found.adapter, found.features.token_bytes) == PUBLISHED[size]
    assert (found.item, found.features.side) == (2, 32)
    assert vlm_size(f"{models.SIZES[size]}@0123") == vlm_size(size) == found
    assert [*published_configs()] == [*models.SIZES.values()]


def test_the_nano_models_sizes_are_those_of_what_is_loaded() -> None:
    model, found = loading.load(nano.NAME), vlm_size(nano.NAME)
    assert found is not None
    assert found.weight_bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    for rank in (1, 4, 32):
        assert rank * found.adapter == sum(Layout(model, LoraSpec(rank)).sizes.values())
    vit, backbone = vit_size(nano_dinov2.NAME), load_backbone(nano_dinov2.NAME).module
    assert vit is not None
    assert vit.weights == pytest.approx(parameters(backbone), rel=0.01)  # by the size of its file
    head = LoraHeadClient(nano_dinov2.NAME, 5, rank=32, seed=0)
    assert vit.adapter_bytes(32, 5) == 20 * sum(p.numel() for p in head.parameters.values())


def test_a_folders_sizes(tmp_path: Path) -> None:
    model = experts(tmp_path / "experts")
    found = vlm_size(str(tmp_path / "experts"))
    assert found is not None
    assert found.weights == parameters(model)
    assert 4 * found.adapter == sum(Layout(model, LoraSpec(4)).sizes.values())


def test_a_model_that_nobody_has_has_no_size(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    assert vlm_size("nobody/has-this") is vlm_size(str(tmp_path)) is None
    assert vit_size("nobody_has_this") is vit_size("hf-hub:nobody/this") is vit_size("resnet18") is None


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("small", VitSize(22056192, 384, 12, 14)),
        ("base", VitSize(86579712, 768, 12, 14)),
        ("large", VitSize(304367616, 1024, 24, 14)),
        ("giant", VitSize(1136479232, 1536, 40, 14)),
    ],
)
def test_the_backbones_sizes(name: str, size: VitSize) -> None:
    assert vit_size(f"vit_{name}_patch14_dinov2.lvd142m") == size


@pytest.mark.parametrize("size", ["2B", "8B"])
def test_a_training_step_takes_what_a_gpu_was_measured_to_take(size: str) -> None:
    """32 photographs, LoRA without the output head, the peak of torch's allocator."""
    model = vlm_size(models.SIZES[size])
    assert model is not None
    image = sum(round(w / 32) * round(h / 32) for w, h in PHOTOGRAPHS) / len(PHOTOGRAPHS)
    head = 32 * (model.text.hidden_size + model.text.vocab_size)
    pass_ = model.training_bytes(int(32 * (image + TEXT)), 32 * 12)
    found = model.weight_bytes + model.adapter_bytes(32) * (1 - head / (32 * model.adapter)) + pass_
    measured = json.loads(PROFILE.read_text())["shapes"][size]["peak_memory_gb"] * 1e9
    assert found == pytest.approx(measured, rel=0.15)


def test_a_pass_of_the_nano_model_keeps_what_is_said(make_image: Callable[..., bytes]) -> None:
    """What autograd saves, but for weights and adapter, in a pass of a hundred questions."""
    model, settings = vlm_size(nano.NAME), load("demo", {}, {}).settings
    assert model is not None
    client: Any = connect("local").create_lora_training_client(nano.NAME, rank=32, seed=0).result()
    engine, run = client._engine, client._run
    prompt = prompt_of(client, Task(("star", "key"), [], [], 0, settings))
    data = [prompt.datum(make_image(n), n % 2) for n in range(100)]
    known = {p.untyped_storage().data_ptr() for p in (*engine.model.stock.parameters(), *run.adapter.flats.values())}
    saved: dict[int, int] = {}
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        engine.forward_backward(run, data, "cross_entropy", None)
    found = sum(size for place, size in saved.items() if place not in known)
    positions = sum(datum.model_input.length for datum in data)
    labelled = sum(int(datum.loss_fn_inputs["weights"].to_numpy().sum()) for datum in data)
    assert model.training_bytes(positions, labelled) == pytest.approx(found, rel=0.35)
