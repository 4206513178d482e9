"""Quantised checkpoints, read as plain ones: FP8 in blocks, as DeepSeek and Qwen publish it, and INT4 in groups, as
Kimi-K2-Thinking is published (compressed-tensors).

A tensor is dequantised when the loader asks for it: the model is never in memory twice. What is missing or of a wrong
shape is found in the files' headers, before a weight is read. Activations are not quantised.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kshot.errors import ModelError
from kshot.untrusted import parse_json, read_file
from vlm.local.model.placement import StoredTensor, stored_tensors

ENTRY = "quantization_config"  # of config.json
FP8, SCALES = "F8_E4M3", ("F32", "BF16", "F16")  # how the files have numbers and scales
PACKED, BITS = "pack-quantized", 4
NAMES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # of a configuration → of the files
WAY_OUT = "give the model it was made from"
INSTALL = "pip install 'kshot[int4]'"

Stored = Mapping[str, StoredTensor]
Parts = tuple[str, ...]  # names of stored tensors: with the numbers, with their scales, with what else there is
Read = Callable[[str], Tensor]


class Scheme(Protocol):
    """How the weights of a checkpoint are quantised."""

    def parts(self, stored: Stored) -> dict[str, Parts]:
        """What each quantised tensor is made of, by the name that the model knows."""
        ...

    def shape(self, parts: Parts, stored: Stored, read: Read) -> tuple[int, ...] | None:
        """Of the tensor; None where its parts do not say one."""
        ...

    def scales(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales of such a tensor."""
        ...

    def tensor(self, parts: Parts, shape: tuple[int, ...], read: Read, dtype: torch.dtype) -> Tensor:
        """Computed in float32, and rounded once."""
        ...


@dataclass(frozen=True)
class BlockFp8:
    """rows, columns: of a block, which has one scale. Those at the edges may be smaller. Matrices of experts that are
    stored together have blocks of their own."""

    rows: int
    columns: int

    def parts(self, stored: Stored) -> dict[str, Parts]:
        return {name: (name, f"{name}_scale_inv") for name, tensor in stored.items() if tensor.dtype == FP8}

    def shape(self, parts: Parts, stored: Stored, read: Read) -> tuple[int, ...] | None:
        shape = stored[parts[0]].shape
        return shape if len(shape) > 1 else None

    def scales(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-2], -(-shape[-2] // self.rows), -(-shape[-1] // self.columns))

    def tensor(self, parts: Parts, shape: tuple[int, ...], read: Read, dtype: torch.dtype) -> Tensor:
        numbers, weight = read(parts[0]), torch.empty(shape, dtype=dtype)
        for n, row in enumerate(read(parts[1]).float().unbind(-2)):  # of blocks: no whole matrix is in float32
            band = (..., slice(n * self.rows, (n + 1) * self.rows), slice(None))
            weight[band] = numbers[band].float() * row.repeat_interleave(self.columns, -1)[..., None, : shape[-1]]
        return weight


@dataclass(frozen=True)
class GroupInt4:
    """group: how many numbers of a row have one scale. settings: of the weights, in the package's words, as JSON."""

    group: int
    settings: str

    def parts(self, stored: Stored) -> dict[str, Parts]:
        names = (name.removesuffix("_packed") for name in stored if name.endswith(".weight_packed"))
        return {name: (f"{name}_packed", f"{name}_scale", f"{name}_shape") for name in names}

    def shape(self, parts: Parts, stored: Stored, read: Read) -> tuple[int, ...] | None:
        """As it is stored, if there are so many numbers, in whole groups; a row is packed into words of 32 bits."""
        if stored[parts[2]].shape != (2,):
            return None
        rows, columns = map(int, read(parts[2]))
        packed = stored[parts[0]].shape == (rows, -(-columns * BITS // 32))
        return (rows, columns) if packed and columns % self.group == 0 else None

    def scales(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[0], shape[1] // self.group

    def tensor(self, parts: Parts, shape: tuple[int, ...], read: Read, dtype: torch.dtype) -> Tensor:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        scheme = QuantizationScheme(targets=[], weights=QuantizationArgs.model_validate_json(self.settings))
        state = {"weight_packed": read(parts[0]), "weight_scale": read(parts[1]).float()}
        state["weight_shape"] = torch.tensor(shape)
        weight: Tensor = BaseCompressor.get_value_from_registry(PACKED).decompress(state, scheme)["weight"]
        return weight.to(dtype)


def scheme_of(name: str, written: Mapping[str, Any]) -> Scheme | None:
    """How a checkpoint with this config.json is quantised; None where it is not. Raises ModelError, with the way out,
    for what is not read here."""
    parts = (part for part in (written, *written.values()) if isinstance(part, dict))
    settings = next((part[ENTRY] for part in parts if part.get(ENTRY)), None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    try:
        if method == "fp8":
            return _block_fp8(name, settings)
        if method == "compressed-tensors":
            return _group_int4(name, settings)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{ENTRY} of model {name} is broken ({error!r}); download its config.json again") from error
    read = "FP8 in blocks and compressed-tensors' INT4 are"
    raise ModelError(f"model {name} is quantised by {method!r}, which is not read here ({read}); {WAY_OUT}")


def _block_fp8(name: str, settings: Mapping[str, Any]) -> Scheme:
    block = settings.get("weight_block_size")
    if block is None:
        raise ModelError(
            f"model {name} is quantised to FP8 without blocks (weight_block_size), not read here; {WAY_OUT}"
        )
    rows, columns = map(int, block)
    if min(rows, columns) < 1:
        raise ValueError(f"weight_block_size {block}")
    return BlockFp8(rows, columns)


def _group_int4(name: str, settings: Mapping[str, Any]) -> Scheme:
    first, *others = settings["config_groups"].values()
    weights = first["weights"]
    asked = {
        "format": (settings["format"], PACKED),
        "config_groups": (1 + len(others), 1),
        "transform_config": (settings.get("transform_config") or None, None),
        **{key: (weights.get(key), only) for key, only in (("num_bits", BITS), ("type", "int"), ("symmetric", True))},
        "strategy": (weights.get("strategy"), "group"),
        "actorder": (weights.get("actorder") or None, None),
    }
    if odd := [f"{key} {value!r}" for key, (value, only) in asked.items() if value != only]:
        only_read = "INT4 in symmetric groups, packed, is"
        raise ModelError(f"model {name} has weights of {odd[0]}, not read here ({only_read}); {WAY_OUT}")
    if (group := int(weights["group_size"])) < 1:
        raise ValueError(f"group_size {group}")
    if find_spec("compressed_tensors") is None:
        raise ModelError(f"model {name} is INT4 as a package packs it that is not installed; {INSTALL}")
    return GroupInt4(group, json.dumps(weights))


def forget(config: Any) -> None:
    """Let a stock configuration say nothing of it: transformers' own quantisers would take the model."""
    for part in (config, config.get_text_config()):
        part.__dict__.pop(ENTRY, None)


class Weights:
    """The weights of a checkpoint as its model has them, dequantised where they are quantised.

    quantised: whether any are. tensors: by the names that the model knows; one that is quantised with the type that the
    configuration says. Raises ModelError for a checkpoint that is not whole.
    """

    def __init__(self, name: str, folder: Path) -> None:
        written = parse_json(read_file(folder / "config.json"))
        self._folder, self._scheme, self._stored = folder, scheme_of(name, written), stored_tensors(name, folder)
        self.quantised = self._scheme is not None
        self._parts = self._scheme.parts(self._stored) if self._scheme else {}
        self._opened = cache(self._open)
        self.tensors = self._plain(name, self._scheme, _dtype(written)) if self._scheme else self._stored

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor as it is stored; one that is quantised as `dtype`."""
        if self._scheme is None or name not in self._parts:
            return self._read(name)
        return self._scheme.tensor(self._parts[name], self.tensors[name].shape, self._read, dtype)

    def source(self, config: Any, dtype: torch.dtype, *, empty: bool) -> dict[str, Any]:
        """What `from_pretrained` of transformers reads the model from: its folder, or where it is quantised tensor by
        tensor, so that none of transformers' own quantisers take it. empty: by the shapes alone."""
        if self._scheme is None:
            return {"pretrained_model_name_or_path": self._folder}
        state: dict[str, Unread | Tensor] = {name: Unread(partial(self.read, name, dtype)) for name in self.tensors}
        if empty:
            state = {name: torch.empty(tensor.shape, device="meta") for name, tensor in self.tensors.items()}
        return {"pretrained_model_name_or_path": None, "config": config, "state_dict": state}

    def _read(self, name: str) -> Tensor:
        tensor: Tensor = self._opened(self._stored[name].file).get_tensor(name)
        return tensor

    def _open(self, file: str) -> Any:
        from safetensors import safe_open

        return safe_open(self._folder / file, "pt")

    def _plain(self, name: str, scheme: Scheme, dtype: str) -> dict[str, StoredTensor]:
        """What the stored tensors become."""
        stored, again = self._stored, "download it again"
        if missing := sorted(part for parts in self._parts.values() for part in parts if part not in stored):
            what = f"lacks {len(missing)} tensors of its quantised weights, first {missing[0]}"
            raise ModelError(f"checkpoint {name} {what}; {again}")
        shapes = {key: scheme.shape(parts, stored, self._read) for key, parts in self._parts.items()}
        for key, shape in shapes.items():
            numbers, scales = (stored[part] for part in self._parts[key][:2])
            if shape is None or scales.dtype not in SCALES or scales.shape != scheme.scales(shape):
                has = f"{list(numbers.shape)} and scales {list(scales.shape)} as {scales.dtype}"
                raise ModelError(f"checkpoint {name} has {key} of {has}, which do not go together; {again}")
        used = {part for parts in self._parts.values() for part in parts}
        if odd := sorted(k for k, tensor in stored.items() if tensor.dtype.startswith("F8") and k not in used):
            raise ModelError(f"checkpoint {name} has {odd[0]} as {stored[odd[0]].dtype}, not read here; {WAY_OUT}")
        plain = {key: tensor for key, tensor in stored.items() if key not in used}
        files = {key: stored[parts[0]].file for key, parts in self._parts.items()}
        return plain | {key: StoredTensor(dtype, shape, files[key]) for key, shape in shapes.items() if shape}


@dataclass(frozen=True)
class Unread:
    """Stands for a tensor in a state dict: the loader of transformers asks for its [...] when it needs it."""

    read: Callable[[], Tensor]

    def __getitem__(self, index: Any) -> Tensor:
        return self.read()[index]


def _dtype(written: Mapping[str, Any]) -> str:
    """That of a configuration, in the words of the files; bfloat16 where it says none."""
    parts = (written, written.get("text_config") or {})
    named = (part.get(key) for part in parts for key in ("dtype", "torch_dtype"))
    return next((NAMES[each] for each in named if each in NAMES), "BF16")
