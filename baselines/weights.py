"""A DINOv2 backbone from a local file of weights, whichever program wrote it, compared key by key.

Reading is weight_files', the names are weight_names', and what the tensors' shapes do and do not tell weight_shapes'
business. Knows no hub and no device.

TODO Tensors by name from a file of weights: .pth and .pt, .safetensors, .onnx, or a folder as transformers saves it.

Runs nothing that a file holds, and reads nothing but what was named. Knows no layout and no architecture.
TODO The architecture of a DINOv2 backbone, from the shapes of its tensors and, of a folder, from its config.json.

What neither tells is taken to be DINOv2's (Oquab et al. 2023, arXiv:2304.07193; registers: Darcet et al. 2023,
arXiv:2309.16588): heads of width 64 where there is no config.json, GELU or SwiGLU, norms with epsilon 1e-6, biases on
query, key and value. Computes nothing and knows no file format.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Mlp, SwiGLUPacked
from timm.models import VisionTransformer
from torch import Tensor

from baselines import weight_names
from baselines.weight_names import KNOWN, Names
from kshot.errors import ModelError

# ---- Tensors by name from a file of weights: .pth and .pt, .safetensors, .onnx, or a folder as transformers

MODEL_TYPES = ("dinov2", "dinov2_with_registers")
# What training scripts put a state dict under, beside an optimizer, an epoch, ...; DINOv2's own is the teacher's.
WRAPPERS = ("model", "state_dict", "teacher")


def read(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file or folder, on the CPU, as it is stored (of an .onnx file: those of its backbone).

    Raises:
        ModelError: it is not there, damaged, of another kind, or holds more than tensors.
    """
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise ModelError(
            f"checkpoint {path} does not exist; give {', '.join(READERS)} or a folder as transformers saves it"
        )
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ModelError(f"checkpoint {path} is of no known kind; give {', '.join(READERS)}")
    try:
        return reader(path)
    except ModelError:
        raise
    except Exception as error:  # torch, safetensors and onnx have no common exception
        reason = (str(error).splitlines() or [""])[0].rstrip(".:") or type(error).__name__
        raise ModelError(f"checkpoint {path} cannot be read ({reason}); download it again or give another") from error


def config(folder: Path) -> dict[str, Any] | None:
    """The config.json of a folder that transformers saved a DINOv2 to; None of every other path."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.get("model_type") in MODEL_TYPES else None


def _folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors, or of the files that model.safetensors.index.json names."""
    if config(folder) is None:
        types = " or ".join(MODEL_TYPES)
        raise ModelError(
            f"checkpoint {folder} has no config.json with model_type {types}; give a file or such a folder"
        )
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return read(folder / "model.safetensors")
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        beside = all(name == Path(name).name and name.endswith(".safetensors") for name in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"checkpoint {index} is no index of files of weights; save the model again") from error
    if not beside:
        raise ModelError(f"checkpoint {index} names files that are not .safetensors beside it; save the model again")
    return {name: tensor for file in files for name, tensor in read(folder / file).items()}


def _pickle(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch's own reasons advise to run what the file holds
        raise ModelError(
            f"checkpoint {path} is no pickle of tensors alone: damaged, TorchScript, or with other objects, which are "
            "not loaded; where you trust the file, load it and save its state_dict() as .safetensors"
        ) from error
    under = [key for key in WRAPPERS if isinstance(found, dict) and isinstance(found.get(key), dict)]
    if len(under) > 1:
        raise ModelError(f"checkpoint {path} has state dicts under {', '.join(under)}; save one of them alone")
    state = found[under[0]] if under else found
    if not isinstance(state, dict):
        raise ModelError(f"checkpoint {path} is a {type(state).__name__}; save the model's state_dict()")
    others = [str(key) for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if others:
        raise ModelError(f"checkpoint {path} has no tensors under {', '.join(others[:3])}; save a state_dict() alone")
    return state


READERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    ".pth": _pickle,
    ".pt": _pickle,
    ".safetensors": load_file,
    ".onnx": weight_names.read,
}


# ---- The architecture of a DINOv2 backbone, from the shapes of its tensors and, of a folder, from its config.json.

HEAD_WIDTH = 64
EPSILON = 1e-6
# A file whose last blocks were cut off looks like a smaller model; but of a published width the depth is known.
DEPTHS = {384: 12, 768: 12, 1024: 24, 1536: 40}


@dataclass(frozen=True)
class Architecture:
    """A backbone's sizes.

    Attributes:
        width, depth, heads: of the transformer; patch: side of a patch, pixels.
        grid: patches along a side of the images that the position embeddings are of.
        cls_position: whether there is one for the CLS token too.
        registers: number of register tokens.
        hidden: width inside the MLP; gated: whether it is a SwiGLU, whose first layer has twice as many outputs.
    """

    width: int
    depth: int
    heads: int
    patch: int
    grid: int
    cls_position: bool
    registers: int
    hidden: int
    gated: bool


def architecture(
    tensors: Mapping[str, Tensor], names: Names, config: Mapping[str, Any] | None, file: str
) -> Architecture:
    """The sizes that a backbone's tensors tell. config: a folder's config.json. file: what an error calls it.

    Raises:
        ModelError: a tensor that tells a size is missing or of another rank, the heads cannot be told, or config.json
            (without one: the depth that DINOv2 has at this width) contradicts the tensors.
    """
    size = partial(_size, tensors, names, file)
    first = f"blocks.{min(names.blocks, default=0)}"
    width, _, patch, _ = size("patch_embed.proj.weight", rank=4)
    rows, hidden = size(f"{first}.mlp.fc1.weight", rank=2)[0], size(f"{first}.mlp.fc2.weight", rank=2)[1]
    grid, cls_position = _grid(size("pos_embed", rank=3)[1], file)
    found = Architecture(
        width=width,
        depth=len(names.blocks),
        heads=_heads(width, config, file),
        patch=patch,
        grid=grid,
        cls_position=cls_position,
        registers=size("reg_token", rank=3)[1] if names.sources("reg_token")[0] in tensors else 0,
        hidden=hidden,
        gated=rows == 2 * hidden,
    )
    _check_depth(found, file) if config is None else _check_config(found, config, file)
    return found


def _size(tensors: Mapping[str, Tensor], names: Names, file: str, name: str, *, rank: int) -> tuple[int, ...]:
    """The shape of timm's tensor `name`, from its parts in the file."""
    parts = names.sources(name)
    for part in parts:
        if part not in tensors:
            raise ModelError(f"{file} has no {part}, which tells its architecture; known layouts: {KNOWN}")
        if tensors[part].ndim != rank:
            raise ModelError(f"{file} has {part} of shape {tuple(tensors[part].shape)}; in DINOv2 it has {rank} axes")
    return sum(tensors[part].shape[0] for part in parts), *tensors[parts[0]].shape[1:]


def _grid(positions: int, file: str) -> tuple[int, bool]:
    """Side of the grid, and whether there is one more position, which is that of the CLS token."""
    cls_position = isqrt(positions) ** 2 != positions
    grid = isqrt(positions - cls_position)
    if grid == 0 or grid**2 + cls_position != positions:
        raise ModelError(f"{file} has {positions} position embeddings; DINOv2 has a square number, and one for CLS")
    return grid, cls_position


def _heads(width: int, config: Mapping[str, Any] | None, file: str) -> int:
    if config is None:
        if width % HEAD_WIDTH:
            raise ModelError(
                f"{file} has width {width}, which is not in heads of {HEAD_WIDTH} as DINOv2's; give the folder that "
                "transformers saves, whose config.json states num_attention_heads"
            )
        return width // HEAD_WIDTH
    heads = config.get("num_attention_heads")
    if type(heads) is not int or heads < 1 or width % heads:
        raise ModelError(f"{file} has num_attention_heads {heads!r} in config.json, which do not divide width {width}")
    return heads


def _check_depth(found: Architecture, file: str) -> None:
    depth = DEPTHS.get(found.width, found.depth)
    if found.depth != depth:
        raise ModelError(
            f"{file} has {found.depth} blocks; DINOv2 of width {found.width} has {depth}: download it again, or, of a "
            "model that was made so, give the folder that transformers saves"
        )


def _check_config(found: Architecture, config: Mapping[str, Any], file: str) -> None:
    here = {
        "hidden_size": found.width,
        "num_hidden_layers": found.depth,
        "patch_size": found.patch,
        "num_register_tokens": found.registers,
        "use_swiglu_ffn": found.gated,
        "layer_norm_eps": EPSILON,
        "hidden_act": "gelu",
        "qkv_bias": True,
    }
    wrong = [
        f"{key} {config[key]!r} instead of {value!r}" for key, value in here.items() if config.get(key, value) != value
    ]
    if wrong:
        raise ModelError(
            f"{file} has a config.json with {', '.join(wrong)}, which its tensors or DINOv2 have; give both as "
            "transformers saved them"
        )


# ---- A DINOv2 backbone from a local file of weights, whichever program wrote it, compared key by key.

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_weights(path: Path) -> bool:
    """Whether a path, there or not, is for `vision_transformer`: it ends in .pth, .pt, .safetensors or .onnx, or is a
    folder whose config.json is that of transformers' DINOv2, with registers or without."""
    if path.is_dir():
        return config(path) is not None
    return path.suffix.lower() in READERS


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
    tensors = read(path)
    names = weight_names.find(tensors, file)
    found = architecture(tensors, names, config(path), file)
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
