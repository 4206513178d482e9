"""The architecture of a DINOv2 backbone, from the shapes of its tensors and, of a folder, from its config.json.

What neither tells is taken to be DINOv2's (Oquab et al. 2023, arXiv:2304.07193; registers: Darcet et al. 2023,
arXiv:2309.16588): heads of width 64 where there is no config.json, GELU or SwiGLU, norms with epsilon 1e-6, biases on
query, key and value. Computes nothing and knows no file format.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import isqrt
from typing import Any

from torch import Tensor

from baselines.weight_names import KNOWN, Names
from kshot_errors import ModelError

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
