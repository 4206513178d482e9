"""A DINOv2 backbone from a local file of weights, whichever program wrote it, compared key by key.

Reading is weight_files', the names are weight_names', and what the tensors' shapes do and do not tell weight_shapes'
business. Knows no hub and no device.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Mlp, SwiGLUPacked
from timm.models import VisionTransformer
from torch import Tensor

from baselines import weight_files, weight_names
from baselines.weight_names import Names
from baselines.weight_shapes import Architecture, architecture
from kshot_errors import ModelError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_weights(path: Path) -> bool:
    """Whether a path, there or not, is for `vision_transformer`: it ends in .pth, .pt, .safetensors or .onnx, or is a
    folder whose config.json is that of transformers' DINOv2, with registers or without."""
    if path.is_dir():
        return weight_files.config(path) is not None
    return path.suffix.lower() in weight_files.READERS


def vision_transformer(path: Path) -> VisionTransformer:
    """timm's module with the weights of `path`: float32, on the CPU, in eval mode, without a head, for any input of
    whole patches normalised with ImageNet's mean and deviation. No random numbers are drawn.

    For inputs of another size than its position embeddings are of, timm resamples these (bicubic, antialiased) a little
    differently than DINOv2's own code and transformers do.

    Raises:
        ModelError: the path is not there or cannot be read, holds no DINOv2 or several, or its tensors are not those
            of the architecture that their shapes tell, are no floating-point numbers, or are not finite.
    """
    file = f"checkpoint {path}"
    tensors = weight_files.read(path)
    names = weight_names.find(tensors, file)
    found = architecture(tensors, names, weight_files.config(path), file)
    with torch.device("meta"):
        vit = _module(found)
    _compare(tensors, names, vit, found, file)
    state = {name: _joined(tensors, names.sources(name), file) for name in vit.state_dict()}
    if found.registers and found.cls_position:
        # With registers timm has no position for CLS: it is added to the token beforehand.
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:].contiguous()
    vit.load_state_dict(state, assign=True)
    return vit.eval()


def _module(found: Architecture) -> VisionTransformer:
    """What timm calls vit_*_patch14_dinov2 and vit_*_patch14_reg4_dinov2, in any size."""
    side = found.grid * found.patch
    vit = VisionTransformer(
        img_size=side,
        patch_size=found.patch,
        embed_dim=found.width,
        depth=found.depth,
        num_heads=found.heads,
        mlp_ratio=(found.hidden * (1 + found.gated) + 0.5) / found.width,  # timm rounds down
        mlp_layer=SwiGLUPacked if found.gated else Mlp,  # type: ignore[arg-type]
        act_layer=torch.nn.SiLU if found.gated else torch.nn.GELU,
        init_values=1.0,  # there is LayerScale; its values are loaded
        reg_tokens=found.registers,
        no_embed_class=found.registers > 0 or not found.cls_position,
        num_classes=0,
        dynamic_img_size=True,
        weight_init="skip",
    )
    vit.pretrained_cfg = {  # type: ignore[assignment]
        "input_size": (3, side, side),
        "num_classes": 0,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
    }
    return vit


def _compare(
    tensors: Mapping[str, Tensor], names: Names, vit: VisionTransformer, found: Architecture, file: str
) -> None:
    """Raises ModelError unless the backbone's tensors in the file are those the module needs, by name and shape."""
    needed = _needed(names, vit, found)
    there = {names.prefix + name: tuple(tensors[names.prefix + name].shape) for name in names.inside}
    wrong = {
        "missing": sorted(needed.keys() - there.keys()),
        "unexpected": sorted(there.keys() - needed.keys()),
        "of another shape": [
            f"{name} {there[name]} instead of {needed[name]}"
            for name in sorted(there.keys() & needed.keys())
            if there[name] != needed[name]
        ],
    }
    if any(wrong.values()):
        raise ModelError(f"{file} is no complete DINOv2 backbone: {_listed(wrong)}; give the state dict of a whole one")


def _needed(names: Names, vit: VisionTransformer, found: Architecture) -> dict[str, tuple[int, ...]]:
    """The file's names of everything that the module needs, and the shapes there."""
    sizes = {name: tuple(value.shape) for name, value in vit.state_dict().items()}
    sizes["pos_embed"] = (1, found.grid**2 + found.cls_position, found.width)
    parts = {name: names.sources(name) for name in sizes}
    return {part: (sizes[n][0] // len(parts[n]), *sizes[n][1:]) for n in sizes for part in parts[n]}


def _listed(wrong: Mapping[str, list[str]], most: int = 3) -> str:
    """As in '1 missing (a), 5 unexpected (b, c, d, ...)'."""
    return ", ".join(
        f"{len(names)} {kind} ({', '.join(names[:most])}{', ...' if len(names) > most else ''})"
        for kind, names in wrong.items()
        if names
    )


def _joined(tensors: Mapping[str, Tensor], parts: tuple[str, ...], file: str) -> Tensor:
    """The parts one below the other, float32. Raises ModelError for other than finite floating-point numbers."""
    for part in parts:
        if tensors[part].dtype not in FLOATS:
            kind = str(tensors[part].dtype).removeprefix("torch.")
            raise ModelError(f"{file} has {part} in {kind}; give the floating-point weights it was made from")
    values = [tensors[part].float() for part in parts]
    for part, value in zip(parts, values, strict=True):
        if not value.isfinite().all():
            raise ModelError(f"{file} has numbers in {part} that are not finite; download or save it again")
    return torch.cat(values) if len(values) > 1 else values[0].contiguous()
