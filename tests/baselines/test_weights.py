"""DINOv2 from files of weights: against transformers, against the equations, in each layout and precision; and each way
in which a file can be wrong, with the one line that says so."""

import json
import os
import re
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
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2ForImageClassification, PreTrainedModel

from baselines.weights import is_weights, module_of, vision_transformer

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


@pytest.mark.parametrize(("size", "registers"), [("small", 0), ("base", 4), ("large", 0), ("giant", 4)])
def test_published_sizes_are_timms_modules(size: str, registers: int) -> None:
    name = f"vit_{size}_patch14{'_reg4' if registers else ''}_dinov2"
    with torch.device("meta"):
        stock = timm.create_model(name, num_classes=0, dynamic_img_size=True)
    ours = module_of(stock.state_dict(), None, name)
    assert repr(ours) == repr(stock)
    assert [(n, p.shape) for n, p in ours.named_parameters()] == [(n, p.shape) for n, p in stock.named_parameters()]
    assert ours.no_embed_class == stock.no_embed_class
    assert ours.patch_embed.img_size == stock.patch_embed.img_size


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A folder with a DINOv2 of four heads."""
    hub_model(num_attention_heads=4).save_pretrained(tmp_path / "hub")
    return tmp_path / "hub"


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "model.bin", 7])
def test_an_index_leads_nowhere_else(hub: Path, name: str | int) -> None:
    (hub / "model.safetensors").rename(hub.parent / "outside.safetensors")
    (hub / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}), encoding="utf-8")
    assert "save the model again" in error_of(hub)


def test_every_difference_is_in_one_line(hub: Path) -> None:
    state = load_file(hub / "model.safetensors")
    for name in ("norm1.weight", "norm1.bias", "mlp.fc1.bias", "attention.attention.key.weight"):
        del state[f"encoder.layer.1.{name}"]
    state["encoder.layer.0.norm3.weight"] = torch.ones(3)
    state["encoder.layer.0.norm2.bias"] = torch.ones(100)
    save_file(state, hub / "model.safetensors")
    assert error_of(hub) == (
        "checkpoint PATH is no complete DINOv2 backbone: 4 missing (blocks.1.attn.qkv.weight, blocks.1.mlp.fc1.bias, "
        "blocks.1.norm1.bias, ...), 3 unexpected (blocks.0.norm3.weight, blocks.1.attn.query.weight, "
        "blocks.1.attn.value.weight), 1 of another shape (blocks.0.norm2.bias (100,) instead of (128,)); "
        "give the state dict of a whole one"
    )


DAMAGE: dict[str, tuple[Edit, str]] = {
    "no position embeddings": (lambda s: s.pop("pos_embed"), "has no pos_embed, which tells its architecture"),
    "no tokens": (lambda s: s.pop("cls_token"), "1 missing (cls_token)"),
    "no grid": (lambda s: s.update(pos_embed=torch.ones(1, 15, WIDTH)), "has 15 position embeddings"),
    "no positions": (lambda s: s.update(pos_embed=torch.ones(1, 0, WIDTH)), "has 0 position embeddings"),
    "an axis less": (
        lambda s: s.update(pos_embed=torch.ones(17, WIDTH)),
        f"has pos_embed of shape (17, {WIDTH}); in DINOv2 it has 3 axes",
    ),
    "a block in between": (
        lambda s: [s.update({n.replace("s.1.", "s.2."): s.pop(n)}) for n in list(s) if n.startswith("blocks.1.")],
        "14 missing (blocks.1.attn.proj.bias, blocks.1.attn.proj.weight, blocks.1.attn.qkv.bias, ...), 14 unexpected",
    ),
    "both kinds of MLP": (
        lambda s: s.update({"blocks.0.mlp.w3.bias": torch.ones(WIDTH)}),
        "has blocks.0.mlp.fc2.bias under two names",
    ),
    "not a number": (lambda s: s["norm.bias"][3:4].fill_(torch.nan), "has numbers in norm.bias that are not finite"),
    "too large": (lambda s: s.update({"norm.bias": s["norm.bias"].double() * 1e39}), "norm.bias that are not finite"),
    "quantised": (
        lambda s: s.update({"blocks.1.attn.qkv.weight": torch.ones(3 * WIDTH, WIDTH, dtype=torch.int8)}),
        "has blocks.1.attn.qkv.weight in int8; give the floating-point weights",
    ),
    "another one beside": (
        lambda s: s.update({"student.patch_embed.proj.weight": s["patch_embed.proj.weight"].clone()}),
        "has 2 backbones (under '', 'student.')",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_wrong_with_a_state_dict(what: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[what]
    state = original_state()
    damage(state)
    save_file(state, tmp_path / "a.safetensors")
    assert message in error_of(tmp_path / "a.safetensors")


def test_a_published_model_without_its_last_blocks(tmp_path: Path) -> None:
    with torch.device("meta"):
        small = timm.create_model("vit_small_patch14_dinov2", num_classes=0, depth=2)
    torch.save({name: torch.zeros(value.shape) for name, value in small.state_dict().items()}, tmp_path / "a.pth")
    assert "has 2 blocks; DINOv2 of width 384 has 12" in error_of(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_hidden_layers", 3, "num_hidden_layers 3 instead of 2"),
        ("patch_size", 16, "patch_size 16 instead of 14"),
        ("use_swiglu_ffn", True, "use_swiglu_ffn True instead of False"),
        ("layer_norm_eps", 1e-5, "layer_norm_eps 1e-05 instead of 1e-06"),
        ("hidden_act", "quick_gelu", "hidden_act 'quick_gelu' instead of 'gelu'"),
        ("qkv_bias", False, "qkv_bias False instead of True"),
        ("num_attention_heads", 5, "num_attention_heads 5 in config.json, which do not divide width 128"),
        ("num_attention_heads", "4", "num_attention_heads '4' in config.json"),
        ("model_type", "vit", "no config.json with model_type dinov2 or dinov2_with_registers"),
    ],
)
def test_a_config_of_something_else(hub: Path, key: str, value: object, message: str) -> None:
    config = json.loads((hub / "config.json").read_text(encoding="utf-8"))
    (hub / "config.json").write_text(json.dumps({**config, key: value}), encoding="utf-8")
    assert message in error_of(hub)


class Attack:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    torch.save({**original_state(), "attack": Attack(tmp_path / "made")}, tmp_path / "a.pth")
    message = error_of(tmp_path / "a.pth")
    assert "with other objects, which are not loaded" in message
    assert "save its state_dict() as .safetensors" in message
    assert not (tmp_path / "made").exists()
    torch.load(tmp_path / "a.pth", weights_only=False)
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(3)], "is a list; save the model's state_dict()"),
        ({"cls_token": torch.ones(3), "epoch": 3}, "has no tensors under epoch"),
        ({"cls_token": torch.ones(3), 5: torch.ones(3)}, "has no tensors under 5"),
        ({"model": {}, "teacher": {}}, "has state dicts under model, teacher"),
        ({}, "has no tensors of a DINOv2 backbone (its first: none)"),
    ],
)
def test_a_pickle_without_a_state_dict(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pth")
    assert message in error_of(tmp_path / "a.pth")


@pytest.mark.parametrize(("name", "save"), [("a.pth", torch.save), ("a.pt", torch.save), ("a.safetensors", save_file)])
@pytest.mark.parametrize("content", [b"", b"not weights at all", None])
def test_damaged_files(name: str, save: Callable[..., None], content: bytes | None, tmp_path: Path) -> None:
    """None: the first half of a good file."""
    save(original_state(), tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert re.search("cannot be read|no pickle of tensors alone: damaged", error_of(tmp_path / name))


def test_files_that_are_not_there_or_of_another_kind(hub: Path) -> None:
    assert "does not exist; give .pth, .pt, .safetensors or a folder" in error_of(hub / "b.pth")
    assert "is of no known kind; give .pth" in error_of(hub / "config.json")
    (hub / "model.safetensors").unlink()
    assert "model.safetensors does not exist" in error_of(hub)


def test_another_network(tmp_path: Path) -> None:
    clip = CLIPVisionConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, image_size=28, patch_size=14)
    torch.save(CLIPVisionModel(clip).state_dict(), tmp_path / "a.pth")
    message = error_of(tmp_path / "a.pth")
    assert "has no tensors of a DINOv2 backbone" in message
    assert "known layouts: DINOv2's own files, timm's, and those of transformers' Dinov2Model" in message


def test_a_vision_transformer_that_is_no_dinov2(tmp_path: Path) -> None:
    vit = VisionTransformer(32, 16, num_classes=0, embed_dim=64, depth=2, num_heads=1)
    torch.save(vit.state_dict(), tmp_path / "a.pth")
    assert "4 missing (blocks.0.ls1.gamma, blocks.0.ls2.gamma, blocks.1.ls1.gamma, ...); give" in error_of(
        tmp_path / "a.pth"
    )


def test_what_weights_are_told_by(hub: Path) -> None:
    assert is_weights(hub)
    assert is_weights(hub / "model.safetensors")
    assert all(is_weights(Path(name)) for name in ("a.pth", "b/c.PT", "not/there.safetensors"))
    assert not any(is_weights(Path(name)) for name in ("vit_small_patch14_dinov2.lvd142m", "a.bin", "a.onnx", "c"))
    (hub / "config.json").write_text(json.dumps({"architecture": "vit_small_patch14_dinov2"}), encoding="utf-8")
    assert not is_weights(hub)
    (hub / "config.json").write_text("{", encoding="utf-8")
    assert not is_weights(hub)
    assert not is_weights(hub.parent)
