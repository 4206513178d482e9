"""Loads a DINOv2 backbone from a local file of weights into timm's module; tensors are compared by name and shape.

The sizes of the model are those of its tensors. What these do not tell is as in DINOv2 (Oquab et al. 2023,
arXiv:2304.07193; registers: Darcet et al. 2023, arXiv:2309.16588): heads of width 64 where there is no config.json,
GELU or SwiGLU, norms with epsilon 1e-6, biases on query, key and value.

timm's `checkpoint_filter_fn` reads the authors' files alone: no names of transformers, no prefixes, no chunks; and it
lets one tensor overwrite another. So all names are in one table here.
"""

import re
from collections.abc import Callable, Mapping
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Mlp, SwiGLUPacked
from timm.models import VisionTransformer
from torch import Tensor

from kshot.errors import ModelError
from kshot.untrusted import is_beside, parse_json, read_file

KNOWN = "DINOv2's own files, timm's, and those of transformers' Dinov2Model and Dinov2WithRegistersModel"
MODEL_TYPES = ("dinov2", "dinov2_with_registers")
# What training scripts put a state dict under, beside an optimizer, an epoch, ...; DINOv2's own is the teacher's.
WRAPPERS = ("model", "state_dict", "teacher")
# A backbone is found by its patch embedding, as DINOv2 and timm call it, and as transformers does.
PATCH_EMBEDDINGS = ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight")
DROPPED = ("mask_token", "head.weight", "head.bias", "embeddings.mask_token")  # no feature depends on them
# Names in DINOv2's and transformers' files → timm's, one substitution after the other.
RENAMED = [
    (re.compile(old), new)
    for old, new in (
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.cls_token$", "cls_token"),
        (r"^(embeddings\.)?register_tokens$", "reg_token"),
        (r"^layernorm\.", "norm."),
        (r"^encoder\.layer\.", "blocks."),
        (r"^blocks\.\d+\.(?=\d)", "blocks."),  # chunked (FSDP): blocks.CHUNK.NUMBER, NUMBER goes on from chunk to chunk
        (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.attention\.(attention\.query|q_proj)\.", ".attn.query."),
        (r"\.attention\.(attention\.key|k_proj)\.", ".attn.key."),
        (r"\.attention\.(attention\.value|v_proj)\.", ".attn.value."),
        (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
        (r"\.mlp\.(w12|weights_in)\.", ".mlp.fc1."),
        (r"\.mlp\.(w3|weights_out|down_proj)\.", ".mlp.fc2."),
    )
]
# timm's tensor → those that it is made of, one below the other along the first axis.
JOINED = {"attn.qkv": ("attn.query", "attn.key", "attn.value"), "mlp.fc1": ("mlp.gate_proj", "mlp.up_proj")}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HEAD_WIDTH = 64
EPSILON = 1e-6
# A file whose last blocks were cut off looks like a smaller model; but of a published width the depth is known.
DEPTHS = {384: 12, 768: 12, 1024: 24, 1536: 40}


def is_weights(path: Path) -> bool:
    """Whether a path, there or not, is for `vision_transformer`: it ends in .pth, .pt or .safetensors, or is a folder
    whose config.json is that of transformers' DINOv2, with registers or without."""
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
    state = _with_timm_names(read(path), file)
    vit = module_of(state, config(path), file)
    _compare(state, vit, file)
    state = {name: _float32(name, tensor, file) for name, tensor in state.items()}
    if "reg_token" in state and state["pos_embed"].shape[1] > vit.patch_embed.num_patches:
        # With registers timm has no position for CLS: it is added to the token beforehand.
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:].contiguous()
    vit.load_state_dict(state, assign=True)
    return vit.eval()


def _with_timm_names(tensors: Mapping[str, Tensor], file: str) -> dict[str, Tensor]:
    """The tensors of the one backbone in a file by timm's names; a name that no layout has stays as it is.

    Raises:
        ModelError: there is no backbone, or more than one (a student beside its teacher); a tensor under two names.
    """
    prefix, state = _prefix(tensors, file), dict[str, Tensor]()
    for name, tensor in tensors.items():
        new = name.removeprefix(prefix)
        if not name.startswith(prefix) or new in DROPPED:
            continue
        for old, replacement in RENAMED:
            new = old.sub(replacement, new)
        if new in state:
            raise ModelError(f"{file} has {new} under two names, one of them {name}; give the state dict of one model")
        state[new] = tensor
    for joined, parts in JOINED.items():
        for first in [name for name in state if f".{parts[0]}." in name]:
            names = [first.replace(parts[0], part) for part in parts]
            if all(name in state for name in names) and len({state[name].shape for name in names}) == 1:
                state[first.replace(parts[0], joined)] = torch.cat([state.pop(name) for name in names])
    return state


def _prefix(names: Mapping[str, Tensor], file: str) -> str:
    """What the backbone's names begin with, as "" or "backbone."; others are of something else."""
    ends = {name: end for end in PATCH_EMBEDDINGS for name in names if f".{name}".endswith(f".{end}")}
    if not ends:
        first = ", ".join(sorted(names)[:3]) or "none"
        raise ModelError(f"{file} has no tensors of a DINOv2 backbone (its first: {first}); known layouts: {KNOWN}")
    prefixes = sorted(name.removesuffix(end) for name, end in ends.items())
    if len(prefixes) > 1:
        under = ", ".join(map(repr, prefixes))
        raise ModelError(f"{file} has {len(prefixes)} backbones (under {under}); save one of them to a file of its own")
    return prefixes[0]


def module_of(state: Mapping[str, Tensor], config: Mapping[str, Any] | None, file: str) -> VisionTransformer:
    """What timm calls vit_*_patch14_dinov2 and vit_*_patch14_reg4_dinov2, without weights, in the sizes that tensors
    tell. config: a folder's config.json.

    Raises:
        ModelError: a tensor that tells a size is missing or of another rank, the heads cannot be told, or config.json
            (without one: the depth that DINOv2 has at this width) contradicts the tensors.
    """

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in state:
            raise ModelError(f"{file} has no {name}, which tells its architecture; known layouts: {KNOWN}")
        if state[name].ndim != rank:
            raise ModelError(f"{file} has {name} of shape {tuple(state[name].shape)}; in DINOv2 it has {rank} axes")
        return tuple(state[name].shape)

    blocks = {int(match[1]) for name in state if (match := re.match(r"blocks\.(\d{1,4})\.", name))}
    mlp = f"blocks.{min(blocks, default=0)}.mlp"
    width, _, patch, _ = shape("patch_embed.proj.weight", 4)
    rows, hidden = shape(f"{mlp}.fc1.weight", 2)[0], shape(f"{mlp}.fc2.weight", 2)[1]
    positions, gated = shape("pos_embed", 3)[1], rows == 2 * hidden
    cls_position = isqrt(positions) ** 2 != positions  # one more than the grid has
    if (grid := isqrt(positions - cls_position)) == 0 or grid**2 + cls_position != positions:
        raise ModelError(f"{file} has {positions} position embeddings; DINOv2 has a square number, and one for CLS")
    registers = shape("reg_token", 3)[1] if "reg_token" in state else 0
    heads = _heads(width, config, file)
    _check_config(config, file, width=width, depth=len(blocks), patch=patch, registers=registers, gated=gated)
    with torch.device("meta"):
        vit = VisionTransformer(
            img_size=grid * patch,
            patch_size=patch,
            embed_dim=width,
            depth=len(blocks),
            num_heads=heads,
            mlp_ratio=(hidden * (1 + gated) + 0.5) / width,  # timm rounds down
            mlp_layer=SwiGLUPacked if gated else Mlp,  # type: ignore[arg-type]
            act_layer=torch.nn.SiLU if gated else torch.nn.GELU,
            init_values=1.0,  # there is LayerScale; its values are loaded
            reg_tokens=registers,
            no_embed_class=registers > 0 or not cls_position,
            num_classes=0,
            dynamic_img_size=True,
            weight_init="skip",
        )
    vit.pretrained_cfg = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}  # type: ignore[assignment]
    return vit


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


def _check_config(
    config: Mapping[str, Any] | None, file: str, *, width: int, depth: int, patch: int, registers: int, gated: bool
) -> None:
    """Raises ModelError where config.json, or without one DINOv2's depth, contradicts the tensors."""
    if config is None and depth != (published := DEPTHS.get(width, depth)):
        way_out = "download it again, or, of a model that was made so, give the folder that transformers saves"
        raise ModelError(f"{file} has {depth} blocks; DINOv2 of width {width} has {published}: {way_out}")
    sizes: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": depth, "patch_size": patch}
    sizes |= {"num_register_tokens": registers, "use_swiglu_ffn": gated}
    sizes |= {"layer_norm_eps": EPSILON, "hidden_act": "gelu", "qkv_bias": True}
    stated = config or {}
    wrong = [f"{key} {stated[key]!r} instead of {own!r}" for key, own in sizes.items() if stated.get(key, own) != own]
    if wrong:
        problem = f"a config.json with {', '.join(wrong)}, which its tensors or DINOv2 have"
        raise ModelError(f"{file} has {problem}; give both as transformers saved them")


def _compare(state: Mapping[str, Tensor], vit: VisionTransformer, file: str) -> None:
    """Raises ModelError unless the tensors are those that the module needs, by name and shape."""
    needed = {name: tuple(value.shape) for name, value in vit.state_dict().items()}
    needed["pos_embed"] = (1, state["pos_embed"].shape[1], vit.embed_dim)  # of the stored grid, with or without CLS
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    both = sorted(shapes.keys() & needed.keys())
    different = {
        "missing": sorted(needed.keys() - shapes.keys()),
        "unexpected": sorted(shapes.keys() - needed.keys()),
        "of another shape": [f"{n} {shapes[n]} instead of {needed[n]}" for n in both if shapes[n] != needed[n]],
    }
    if any(different.values()):
        listed = ", ".join(
            f"{len(names)} {kind} ({', '.join([*names[:3], *['...'][: len(names) > 3]])})"
            for kind, names in different.items()
            if names
        )
        raise ModelError(f"{file} is no complete DINOv2 backbone: {listed}; give the state dict of a whole one")


def _float32(name: str, tensor: Tensor, file: str) -> Tensor:
    """Raises ModelError for other than finite floating-point numbers."""
    if tensor.dtype not in FLOATS:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ModelError(f"{file} has {name} in {kind}; give the floating-point weights it was made from")
    if not (values := tensor.float()).isfinite().all():
        raise ModelError(f"{file} has numbers in {name} that are not finite; download or save it again")
    return values.contiguous()


# Reading files


def read(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file or folder, on the CPU, as it is stored.

    Raises:
        ModelError: it is not there, damaged, of another kind, or holds more than tensors.
    """
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        kinds = f"{', '.join(READERS)} or a folder as transformers saves it"
        raise ModelError(f"checkpoint {path} does not exist; give {kinds}")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ModelError(f"checkpoint {path} is of no known kind; give {', '.join(READERS)}")
    try:
        return reader(path)
    except ModelError:
        raise
    except Exception as error:  # torch and safetensors have no common exception
        reason = (str(error).splitlines() or [""])[0].rstrip(".:") or type(error).__name__
        raise ModelError(f"checkpoint {path} cannot be read ({reason}); download it again or give another") from error


def config(folder: Path) -> dict[str, Any] | None:
    """The config.json of a folder that transformers saved a DINOv2 to; None of every other path."""
    try:
        stated = parse_json(read_file(folder / "config.json"))
    except (OSError, ValueError):
        return None
    return stated if isinstance(stated, dict) and stated.get("model_type") in MODEL_TYPES else None


def _folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors, or of the files that model.safetensors.index.json names."""
    if config(folder) is None:
        types = " or ".join(MODEL_TYPES)
        problem = f"has no config.json with model_type {types}"
        raise ModelError(f"checkpoint {folder} {problem}; give a file or such a folder")
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return read(folder / "model.safetensors")
    try:
        files = sorted(set(parse_json(read_file(index))["weight_map"].values()))
        beside = all(name.endswith(".safetensors") and is_beside(folder, name) for name in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"checkpoint {index} is no index of files of weights; save the model again") from error
    if not beside:
        raise ModelError(f"checkpoint {index} names files that are not .safetensors beside it; save the model again")
    return {name: tensor for file in files for name, tensor in read(folder / file).items()}


def _pickle(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch's own reasons advise to run what the file holds
        raise ModelError(
            f"checkpoint {path} is no pickle of tensors alone: damaged, TorchScript, or with other objects, which are "
            "not loaded; where you trust the file, load it and save its state_dict() as .safetensors"
        ) from error
    under = [key for key in WRAPPERS if isinstance(content, dict) and isinstance(content.get(key), dict)]
    if len(under) > 1:
        raise ModelError(f"checkpoint {path} has state dicts under {', '.join(under)}; save one of them alone")
    state = content[under[0]] if under else content
    if not isinstance(state, dict):
        raise ModelError(f"checkpoint {path} is a {type(state).__name__}; save the model's state_dict()")
    others = [str(key) for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if others:
        raise ModelError(f"checkpoint {path} has no tensors under {', '.join(others[:3])}; save a state_dict() alone")
    return state


READERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {".pth": _pickle, ".pt": _pickle, ".safetensors": load_file}
