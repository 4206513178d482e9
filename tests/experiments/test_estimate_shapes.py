"""Sizes by arithmetic: held to the stock classes, to adapters as they are made, and to what a pass was seen to take."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from baselines import nano as nano_dinov2
from baselines.backbone import load as load_backbone
from baselines.lora import LoraHead, Shape
from experiments.bench import train_case
from experiments.bench.train_case import SIZES as PHOTOGRAPHS
from experiments.plan.memory import TEXT
from experiments.sweep.config import load
from experiments.sweep.methods import Task, prompt_of
from experiments.sweep.shapes import DINOV2, PUBLISHED, Vlm, of_folder, vit_of, vlm_of
from tests.vlm.checkpoints import experts
from vlm import models, nano
from vlm.local.model import load as loading
from vlm.local.model.lora import Layout, LoraSpec
from vlm.service import connect

PROFILE = Path(__file__).parents[2] / "results/bench/train-h200-profile.json"


def stock(shape: Vlm) -> Any:
    """The stock model of these sizes, without memory for its weights."""
    text = {"vocab_size": shape.vocabulary, "hidden_size": shape.hidden, "num_hidden_layers": shape.layers}
    text |= {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim}
    text |= {"moe_intermediate_size" if shape.experts else "intermediate_size": shape.mlp}
    text |= {"num_experts": shape.experts, "num_experts_per_tok": shape.active} if shape.experts else {}
    vision = {"depth": shape.depth, "hidden_size": shape.tower, "intermediate_size": shape.tower_mlp, "num_heads": 16}
    vision |= {"out_hidden_size": shape.hidden, "num_position_embeddings": shape.places, "patch_size": shape.patch}
    vision |= {"deepstack_visual_indexes": [*range(shape.deepstack)]}
    config: Any = Qwen3VLMoeConfig if shape.experts else Qwen3VLConfig
    kind: Any = Qwen3VLMoeForConditionalGeneration if shape.experts else Qwen3VLForConditionalGeneration
    with torch.device("meta"):
        return kind(config(text_config=text, vision_config=vision, tie_word_embeddings=shape.tied))


def numbers(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())  # a tied one comes once


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_sizes_are_the_stock_models(name: str) -> None:
    """Fewer layers, for speed: all layers are alike."""
    shape = replace(PUBLISHED[name], layers=2, depth=4)
    model = stock(shape)
    assert shape.weights == numbers(model)
    assert shape.adapter(8) == sum(Layout(model, LoraSpec(8)).sizes.values())


def test_the_nano_models_sizes_are_those_of_what_is_loaded() -> None:
    model, shape = loading.load(nano.NAME), vlm_of(nano.NAME)
    assert shape is not None
    assert shape.weight_bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    assert shape.adapter(32) == sum(Layout(model, LoraSpec(32)).sizes.values())
    vit, backbone = vit_of(nano_dinov2.NAME), load_backbone(nano_dinov2.NAME).module
    assert vit is not None
    assert vit.weights == pytest.approx(numbers(backbone), rel=0.01)  # by the size of its file
    head = LoraHead(Shape(nano_dinov2.NAME, 5, 32), seed=0)
    assert vit.adapter_bytes(32, 5) == 20 * sum(p.numel() for p in head.trained().values())


def test_a_folders_sizes(tmp_path: Path) -> None:
    model = experts(tmp_path / "experts")
    shape = of_folder(tmp_path / "experts")
    assert shape.weights == numbers(model)
    assert shape.adapter(4) == sum(Layout(model, LoraSpec(4)).sizes.values())
    assert vlm_of(str(tmp_path / "experts")) == shape
    assert vlm_of("nobody/has-this") is None


@pytest.mark.parametrize("name", DINOV2)
def test_the_backbones_sizes_are_timms(name: str) -> None:
    with torch.device("meta"):
        module: Any = timm.create_model(f"{name}.lvd142m", pretrained=False, num_classes=0)
    vit = DINOV2[name]
    assert (vit.weights, vit.width, vit.depth) == (numbers(module), module.embed_dim, len(module.blocks))
    assert vit.patch == module.patch_embed.patch_size[0]


@pytest.mark.parametrize("size", ["2B", "8B"])
def test_a_training_step_takes_what_a_gpu_was_seen_to_take(size: str) -> None:
    """32 photographs, LoRA without the output head, the peak of torch's allocator."""
    shape = PUBLISHED[models.SIZES[size]]
    image = sum(round(w / 32) * round(h / 32) for w, h in PHOTOGRAPHS) / len(PHOTOGRAPHS)
    unembed = replace(shape, layers=0).adapter_bytes(32)
    pass_ = shape.training_bytes(int(32 * (image + TEXT)), 32 * 12)
    found = shape.weight_bytes + shape.adapter_bytes(32) - unembed + pass_
    seen = json.loads(PROFILE.read_text())["shapes"][size]["peak_memory_gb"] * 1e9
    assert found == pytest.approx(seen, rel=0.15)


def test_a_pass_of_the_nano_model_keeps_what_is_said() -> None:
    """What autograd saves, but for weights and adapter, in a pass of a hundred questions."""
    shape, settings = vlm_of(nano.NAME), load("demo", {}, {}).settings
    assert shape is not None
    client: Any = connect("local").create_lora_training_client(nano.NAME, rank=32, seed=0).result()
    engine, run = client._engine, client._run
    prompt = prompt_of(client, Task(("star", "key"), [], [], 0, settings))
    data = [prompt.datum(picture(n), n % 2) for n in range(100)]
    known = {p.untyped_storage().data_ptr() for p in (*engine.model.stock.parameters(), *run._copies.values())}
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
    assert shape.training_bytes(positions, labelled) == pytest.approx(found, rel=0.35)


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (number, 2 * number, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_bench_and_the_plan_know_the_same_shapes() -> None:
    for size, bench in train_case.SHAPES.items():
        shape = PUBLISHED[models.SIZES[size]]
        assert bench.text == (shape.hidden, shape.layers, shape.heads, shape.kv_heads, shape.head_dim, shape.mlp)
        assert bench.vision[:2] == (shape.tower, shape.depth)
        assert (bench.vision[3], len(bench.deepstack), bench.tied) == (shape.tower_mlp, shape.deepstack, shape.tied)
        assert bench.vocabulary == shape.vocabulary
