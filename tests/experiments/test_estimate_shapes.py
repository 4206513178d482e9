"""Sizes of models as the plan counts them: held to published numbers, to what is loaded, and to what a pass was
measured to take."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from baselines import nano as nano_dinov2
from baselines.backbone import load as load_backbone
from baselines.lora import TRAIN_CHUNK, LoraHeadClient, datum
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
    assert [*published_configs()] == [*models.SHORT.values()]


@pytest.mark.parametrize(("name", "published"), [("Qwen3.5-27B", 55562855904), ("Qwen3.6-35B-A3B", 71903645408)])
def test_the_files_of_a_qwen35_are_as_large_as_published(name: str, published: int) -> None:
    """total_size of its model.safetensors.index.json, of bfloat16."""
    found = vlm_size(name)
    assert found is not None
    assert found.file_bytes == published


NEWER = {  # numbers as the model cards round them; of a hidden state
    "Qwen3.5-0.8B": (0.9e9, 1024),
    "Qwen3.5-2B": (2e9, 2048),
    "Qwen3.5-4B": (5e9, 2560),
    "Qwen3.5-9B": (10e9, 4096),
    "Qwen3.5-122B-A10B": (125e9, 3072),
    "Qwen3.5-397B-A17B": (403e9, 4096),
}


@pytest.mark.parametrize("name", NEWER)
def test_the_other_sizes_of_qwen35(name: str) -> None:
    found = vlm_size(f"Qwen/{name}@0123")
    assert found is not None
    numbers, hidden = NEWER[name]
    assert (found.weights + found.unused) == pytest.approx(numbers, rel=0.15 if numbers < 6e9 else 0.05)
    assert found.features.token_bytes == 2 * hidden


TEXT35 = {
    **{"vocab_size": 96, "hidden_size": 24, "num_hidden_layers": 5, "num_attention_heads": 3, "head_dim": 8},
    **{"num_key_value_heads": 1, "full_attention_interval": 2, "linear_num_key_heads": 2, "linear_conv_kernel_dim": 4},
    **{"linear_num_value_heads": 6, "linear_key_head_dim": 10, "linear_value_head_dim": 14},
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "mrope_section": [1, 1, 0],
    },
}
EXPERTS35 = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 36,
}
VISION35 = {
    **{"depth": 2, "hidden_size": 16, "intermediate_size": 40, "num_heads": 2, "patch_size": 4, "out_hidden_size": 24},
    "num_position_embeddings": 9,
}


def by_hand(*, sparse: bool, tied: bool) -> tuple[int, int]:
    """Numbers of a model of TEXT35 and VISION35, and of an adapter of rank 1."""
    h, q, kv, keys, values, heads = 24, 24, 8, 20, 84, 6
    into = (2 * keys + values) + values + 2 * heads
    linear = into * h + values * h + 4 * (2 * keys + values) + 2 * heads + 14
    linear_lora = (h + 2 * keys + values) + (h + values) + 2 * (h + heads) + (values + h)
    full, full_lora = (2 * q + 2 * kv) * h + q * h + 2 * 8, (h + 2 * q) + 2 * (h + kv) + (q + h)
    mlp, mlp_lora = 3 * h * 50, 3 * (h + 50)
    if sparse:
        mlp = 4 * 3 * h * 20 + 3 * h * 36 + 4 * h + h  # experts, the shared one, router, its gate
        mlp_lora = 4 * ((h + 40) + (20 + h)) + 3 * (h + 36)
    text = 3 * linear + 2 * full + 5 * (mlp + 2 * h) + h + 96 * h * (1 if tied else 2)
    patch, block = 3 * 2 * 4 * 4 * 16 + 16, (3 * 256 + 48) + (256 + 16) + (2 * 640 + 40 + 16) + 4 * 16
    merger = 2 * 16 + 64 * 64 + 64 + 64 * 24 + 24
    return text + patch + 9 * 16 + 2 * block + merger, 3 * linear_lora + 2 * full_lora + 5 * mlp_lora + h + 96


@pytest.mark.parametrize(("sparse", "tied"), [(False, True), (False, False), (True, False)])
def test_a_tiny_qwen35_has_the_size_that_is_said(tmp_path: Path, sparse: bool, tied: bool) -> None:
    kind = "Qwen3_5Moe" if sparse else "Qwen3_5"
    text = {**TEXT35, **(EXPERTS35 if sparse else {"intermediate_size": 50}), "tie_word_embeddings": tied}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=VISION35, tie_word_embeddings=tied)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    model.save_pretrained(tmp_path)
    found = vlm_size(str(tmp_path))
    assert found is not None
    assert (found.weights, found.adapter) == by_hand(sparse=sparse, tied=tied)
    assert found.weights == sum(p.numel() for p in model.parameters())
    assert found.weight_bytes == found.file_bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    assert (found.features.side, found.features.token_bytes) == (8, 4 * 24)


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


def kept_bytes(known: Iterable[torch.Tensor], compute: Callable[[], object]) -> int:
    """What autograd saves meanwhile, in bytes, but for the storage of `known`."""
    places = {tensor.untyped_storage().data_ptr() for tensor in known}
    saved: dict[int, int] = {}
    kept: list[torch.Tensor] = []  # else a place could be used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute()
    return sum(size for place, size in saved.items() if place not in places)


def test_a_pass_of_the_nano_model_keeps_what_is_said(make_image: Callable[..., bytes]) -> None:
    """What autograd saves, but for weights and adapter, in a pass of a hundred questions."""
    model, settings = vlm_size(nano.NAME), load("demo", {}, {}).settings
    assert model is not None
    client: Any = connect("local").create_lora_training_client(nano.NAME, rank=32, seed=0).result()
    engine, run = client._engine, client._run
    prompt = prompt_of(client, Task(("star", "key"), [], [], 0, settings))
    data = [prompt.datum(make_image(n), n % 2) for n in range(100)]
    known = (*engine.model.stock.parameters(), *run.adapter.flats.values())
    found = kept_bytes(known, lambda: engine.forward_backward(run, data, "cross_entropy", None))
    positions = sum(datum.model_input.length for datum in data)
    labelled = sum(int(datum.loss_fn_inputs["weights"].to_numpy().sum()) for datum in data)
    assert model.training_bytes(positions, labelled) == pytest.approx(found, rel=0.35)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_of_a_qwen35_keeps_what_is_said(tmp_path: Path, dtype: torch.dtype) -> None:
    """What autograd saves, but for weights, where a gradient goes through every product of the text model."""
    text = {**TEXT35, "intermediate_size": 192, "hidden_size": 96, "num_attention_heads": 4, "head_dim": 16}
    text |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "dtype": str(dtype).removeprefix("torch.")}
    config = transformers.Qwen3_5Config(text_config=text, vision_config={**VISION35, "out_hidden_size": 96})
    config.save_pretrained(tmp_path)
    stock: Any = transformers.Qwen3_5ForConditionalGeneration._from_config(config, dtype=dtype)
    embeds = torch.randn(1, 256, 96, dtype=dtype)
    found = kept_bytes(stock.parameters(), lambda: stock.model.language_model(inputs_embeds=embeds, use_cache=False))
    model = vlm_size(str(tmp_path))
    assert model is not None
    assert model.training_bytes(256, 0) == pytest.approx(found, rel=0.35)


def test_a_pass_of_a_backbone_keeps_what_is_said(make_image: Callable[..., bytes]) -> None:
    """What autograd saves, but for weights, in a pass that trains LoRA and a head."""
    client, size = LoraHeadClient(nano_dinov2.NAME, 3, rank=4, seed=0), vit_size(nano_dinov2.NAME)
    assert size is not None
    data = [datum(make_image(n, 64, 64), n % 3) for n in range(TRAIN_CHUNK)]
    known = (*client._adapted.parameters(), *client._linear.parameters())
    found = kept_bytes(known, lambda: client.forward_backward(data, "cross_entropy"))
    assert size.training_bytes(TRAIN_CHUNK * (8 * 8 + 1)) == pytest.approx(found, rel=0.2)


def test_states_of_linear_attention_count_by_the_prompt() -> None:
    model = vlm_size("Qwen3.5-2B")
    assert model is not None
    more = model.scoring_bytes(1000, 3) - model.scoring_bytes(1000, 1)
    assert more == 2 * 18 * 16 * 128 * 128 * 4  # layers, heads, keys, values, bytes
