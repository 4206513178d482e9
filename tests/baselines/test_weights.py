"""DINOv2 from files of weights: against transformers, against the equations, in each layout and precision."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from small_dinov2 import SIDE, SIZES, WIDTH, error_of, forward, hub_model, original_state, pictures, randomised
from timm.data import resolve_model_data_config
from timm.models import VisionTransformer
from torch import Tensor
from transformers import Dinov2Config, Dinov2ForImageClassification, PreTrainedModel

from baselines.weights import module_of, vision_transformer

Edit = Callable[[dict[str, Any]], Any]
KINDS = [(0, False), (0, True), (4, False), (4, True)]


def assert_equal_outputs(path: Path, expected: Tensor) -> None:
    with torch.inference_mode():
        torch.testing.assert_close(
            vision_transformer(path).forward_features(pictures()), expected, rtol=1e-5, atol=1e-5
        )


def tokens_of(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        return model(pixel_values=pictures()).last_hidden_state


@pytest.mark.parametrize(("registers", "gated"), KINDS)
def test_a_folder_of_transformers(registers: int, gated: bool, tmp_path: Path) -> None:
    model = hub_model(registers=registers, gated=gated)
    model.save_pretrained(tmp_path)
    assert_equal_outputs(tmp_path, tokens_of(model))
    assert_equal_outputs(tmp_path / "model.safetensors", tokens_of(model))


def test_a_folder_states_its_heads(tmp_path: Path) -> None:
    model = hub_model(hidden_size=96, num_attention_heads=3)
    model.save_pretrained(tmp_path)
    assert_equal_outputs(tmp_path, tokens_of(model))
    assert "width 96, which is not in heads of 64" in error_of(tmp_path / "model.safetensors")


def test_a_folder_in_several_files(tmp_path: Path) -> None:
    model = hub_model()
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert_equal_outputs(tmp_path, tokens_of(model))


def test_a_classifier_beside_the_backbone_is_left_out(tmp_path: Path) -> None:
    model = randomised(Dinov2ForImageClassification(Dinov2Config(**SIZES, num_attention_heads=2, num_labels=5)))
    model.save_pretrained(tmp_path)
    assert {"dinov2.layernorm.weight", "classifier.weight"} <= load_file(tmp_path / "model.safetensors").keys()
    assert_equal_outputs(tmp_path, tokens_of(model.dinov2))


@pytest.mark.parametrize("chunk", ["", "0."])
@pytest.mark.parametrize(("registers", "gated"), KINDS)
def test_dinov2s_own_names(registers: int, gated: bool, chunk: str, tmp_path: Path) -> None:
    state = original_state(registers=registers, gated=gated, chunk=chunk)
    torch.save(state, tmp_path / "a.pth")
    assert_equal_outputs(tmp_path / "a.pth", forward(state, pictures(), chunk=chunk))


@pytest.mark.parametrize("registers", [0, 3])
def test_timms_own_names(registers: int, tmp_path: Path) -> None:
    vit = VisionTransformer(
        SIDE,
        14,
        num_classes=5,
        embed_dim=WIDTH,
        depth=2,
        num_heads=2,
        init_values=1.0,
        reg_tokens=registers,
        no_embed_class=bool(registers),
    )
    state = randomised(vit).state_dict()
    assert "head.weight" in state
    save_file(state, tmp_path / "a.safetensors")
    with torch.inference_mode():
        assert_equal_outputs(tmp_path / "a.safetensors", vit.forward_features(pictures()))


WRAPPED: dict[str, Edit] = {
    "model": lambda state: {"model": state, "epoch": 3, "optimizer": {"lr": 0.1}},
    "state_dict": lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
    "teacher": lambda state: {
        "teacher": {**{f"backbone.{name}": value for name, value in state.items()}, "dino_head.weight": torch.ones(3)}
    },
}


@pytest.mark.parametrize("key", WRAPPED)
def test_the_state_dict_of_a_training_checkpoint(key: str, tmp_path: Path) -> None:
    state = original_state()
    torch.save(WRAPPED[key](state), tmp_path / "a.pt")
    assert_equal_outputs(tmp_path / "a.pt", forward(state, pictures()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_read_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {name: value.to(dtype) for name, value in original_state().items()}
    save_file(state, tmp_path / "a.safetensors")
    assert_equal_outputs(tmp_path / "a.safetensors", forward({n: v.float() for n, v in state.items()}, pictures()))
    assert {p.dtype for p in vision_transformer(tmp_path / "a.safetensors").parameters()} == {torch.float32}


def test_the_module(tmp_path: Path) -> None:
    torch.save(original_state(), tmp_path / "a.pth")
    before = torch.get_rng_state()
    vit = vision_transformer(tmp_path / "a.pth")
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in vit.modules())
    assert vit.num_classes == 0
    assert isinstance(vit.head, torch.nn.Identity)
    assert vit.patch_embed.img_size == (SIDE, SIDE)
    assert vit.forward_features(pictures(1, 70, 42)).shape == (1, 1 + 5 * 3, WIDTH)
    config = resolve_model_data_config(vit)
    assert config["mean"] == (0.485, 0.456, 0.406)
    assert config["std"] == (0.229, 0.224, 0.225)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("size", ["small", "base", "large", "giant"])
def test_published_sizes_are_timms_modules(size: str, registers: int) -> None:
    name = f"vit_{size}_patch14{'_reg4' if registers else ''}_dinov2"
    with torch.device("meta"):
        stock = timm.create_model(name, num_classes=0, dynamic_img_size=True)
    ours = module_of(stock.state_dict(), None, name)
    assert repr(ours) == repr(stock)
    assert [(n, p.shape) for n, p in ours.named_parameters()] == [(n, p.shape) for n, p in stock.named_parameters()]
    assert ours.no_embed_class == stock.no_embed_class
    assert ours.patch_embed.img_size == stock.patch_embed.img_size
