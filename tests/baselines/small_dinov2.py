"""Small DINOv2 models with random weights: transformers' own, and the published equations in plain torch."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, silu
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel, PreTrainedModel

from baselines import nano
from baselines.weights import vision_transformer
from kshot.errors import ModelError

WIDTH, DEPTH, PATCH, SIDE = 128, 2, 14, 56
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "patch_size": PATCH, "image_size": SIDE}


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """No tensor as it was initialised, so that no two of them can be mistaken for each other."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


def hub_model(*, registers: int = 0, gated: bool = False, **more: object) -> PreTrainedModel:
    settings = {**SIZES, "num_attention_heads": 2, "use_swiglu_ffn": gated, **more}
    if registers:
        return randomised(
            Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=registers, **settings))
        )
    return randomised(Dinov2Model(Dinov2Config(**settings)))


def timm_folder(folder: Path, architecture: str, **arguments: Any) -> tuple[str, torch.nn.Module]:
    """A model of timm with random weights, saved in its hub layout, and the model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = timm.create_model(architecture, num_classes=0, **arguments).eval()
    config = {"architecture": architecture, "num_classes": 0, "model_args": arguments}
    (folder / "config.json").write_text(json.dumps(config | {"pretrained_cfg": {"num_classes": 0}}))
    save_file(module.state_dict(), folder / "model.safetensors")
    return str(folder), module


def nano_folder(folder: Path, **arguments: Any) -> Path:
    """A copy of the nano model; its config.json states these arguments instead of its own."""
    shutil.copytree(nano.HERE, folder)
    config = json.loads((folder / "config.json").read_text())
    config["model_args"] |= arguments
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def pictures(count: int = 2, height: int = SIDE, width: int = SIDE) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def original_state(*, registers: int = 0, gated: bool = False, chunk: str = "") -> dict[str, Tensor]:
    """The names and shapes of DINOv2's own checkpoints. chunk: what stands before the number of a block."""
    d, hidden = WIDTH, 172 if gated else 4 * WIDTH
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, 1 + (SIDE // PATCH) ** 2, d),
        "mask_token": (1, d),
        "patch_embed.proj.weight": (d, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (d,),
        **{f"norm.{end}": (d,) for end in ("weight", "bias")},
    }
    if registers:
        shapes["register_tokens"] = (1, registers, d)
    first, second = ("w12", "w3") if gated else ("fc1", "fc2")
    for n in range(DEPTH):
        linears = {
            "attn.qkv": (3 * d, d),
            "attn.proj": (d, d),
            f"mlp.{first}": (hidden * (1 + gated), d),
            f"mlp.{second}": (d, hidden),
        }
        block = {f"{name}.{end}": (d,) for name in ("norm1", "norm2") for end in ("weight", "bias")}
        block |= {"ls1.gamma": (d,), "ls2.gamma": (d,)}
        block |= {f"{name}.weight": size for name, size in linears.items()}
        block |= {f"{name}.bias": size[:1] for name, size in linears.items()}
        shapes |= {f"blocks.{chunk}{n}.{name}": size for name, size in block.items()}
    generator = torch.Generator().manual_seed(2)
    return {name: torch.randn(size, generator=generator) * 0.2 for name, size in shapes.items()}


def forward(state: dict[str, Tensor], images: Tensor, *, heads: int = 2, chunk: str = "") -> Tensor:
    """(B, 1 + R + N, D) after the final norm, of images of the size that the position embeddings are of."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    patches = conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH)
    x = torch.cat([state["cls_token"].expand(len(images), -1, -1), patches.flatten(2).mT], dim=1) + state["pos_embed"]
    if "register_tokens" in state:
        x = torch.cat([x[:, :1], state["register_tokens"].expand(len(x), -1, -1), x[:, 1:]], dim=1)
    for n in range(DEPTH):
        block = f"blocks.{chunk}{n}"
        q, k, v = (
            part.unflatten(2, (heads, -1)).transpose(1, 2)
            for part in linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").chunk(3, dim=2)
        )
        mixed = (q @ k.mT / q.shape[-1] ** 0.5).softmax(3) @ v
        x = x + state[f"{block}.ls1.gamma"] * linear(mixed.transpose(1, 2).flatten(2), f"{block}.attn.proj")
        y = norm(x, f"{block}.norm2")
        if f"{block}.mlp.w12.weight" in state:
            gate, up = linear(y, f"{block}.mlp.w12").chunk(2, dim=2)
            y = linear(silu(gate) * up, f"{block}.mlp.w3")
        else:
            y = linear(gelu(linear(y, f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
        x = x + state[f"{block}.ls2.gamma"] * y
    return norm(x, "norm")


def error_of(path: Path) -> str:
    """The one line that a file of weights is refused with, its path as PATH."""
    with pytest.raises(ModelError) as caught:
        vision_transformer(path)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(path), "PATH")
