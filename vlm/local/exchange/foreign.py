"""LoRA adapters that others wrote: PEFT itself, ms-swift, Unsloth. They become adapters of this engine, exactly.

An adapter of this engine has one rank and one scale. A foreign one may have others for each layer (rank_pattern,
alpha_pattern, rsLoRA), and cover any of the layers: here it gets its largest rank, the difference of the scales goes
into B, and what it does not cover is zero. What is no such sum, as DoRA, is refused by name.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from kshot.errors import ModelError, RequestError
from kshot.untrusted import parse_json, read_file
from vlm.local.model.families import EXPERTS, HEAD, QWEN3_VL, Family, family_of
from vlm.local.model.lora import ALPHA, MAX_RANK, TARGETS, Layout, LoraSpec

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG = 1 << 20  # bytes
MERGE = "merge it into its model with what made it, and give the merged model with --model"
# Settings of PEFT's that change no number of a saved adapter, or that are read below.
HARMLESS = (
    "alpha_pattern auto_mapping base_model_name_or_path ensure_weight_tying eva_config exclude_modules fan_in_fan_out "
    "inference_mode layers_pattern layers_to_transform lora_alpha lora_dropout megatron_config megatron_core "
    "peft_type peft_version qalora_group_size r rank_pattern revision target_modules target_parameters task_type "
    "use_rslora"
)
INITIAL = ("gaussian", "eva", "orthogonal", "mica")  # values of init_lora_weights that leave the model's weights alone
_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.\w+)?\.weight")
_COPY = re.compile(r"(?:base_model\.model\.)?(?:.+\.)?(embed_tokens|lm_head)(?:\.base_layer)?\.weight")
# The name of a layer in a stock Qwen3-VL, whatever the model around it was called; `_named` makes it another family's.
_LAYER = re.compile(r"(?:.+\.)?(?:(layers\.\d+\.(?:self_attn|linear_attn|mlp)\..+)|visual\.(.+)|(lm_head))")
# The same flags in families without a row; whether a model has such a layer is seen with the model.
_OTHERS = {
    "train_attn": r".*\.(self_attn\.\w+_proj\w*|linear_attn\.(in_proj_\w+|out_proj))",
    "train_mlp": r".*\.mlp\.(gate_up_proj|shared_experts?\.\w+_proj)",
}
_PATTERNS = {flag: f"{pattern}|{_OTHERS[flag]}" if flag in _OTHERS else pattern for flag, pattern in TARGETS.items()}
_EXPERTS = re.compile(rf"model\.language_model\.layers\.\d+\.{re.escape(EXPERTS)}(\.base_layer)?")


class Foreign(NamedTuple):
    """base_model: the name that was written down, or "". weights: as PEFT names them, of the layers that are covered,
    at their own ranks, B times what the scale of `spec` lacks. copies: weights of the model that PEFT saves beside LoRA
    on a head. Both by the names of Qwen3-VL, whatever the family: that is known with the model."""

    base_model: str
    spec: LoraSpec
    weights: dict[str, Tensor]
    copies: dict[str, Tensor]


class _Settings(NamedTuple):
    """Of adapter_config.json, what the numbers depend on."""

    base_model: str
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    root: bool  # rsLoRA: the scale is alpha over the root of the rank
    parameters: Sequence[str]  # of experts, those that are covered


def is_foreign(folder: Path) -> bool:
    """Whether the folder says that it holds an adapter of PEFT's."""
    return (folder / CONFIG).is_file()


def read(folder: Path) -> Foreign:
    """The adapter in a folder as PEFT saves it. Raises ModelError where it is damaged or cannot be computed here."""
    name = f"adapter {folder}"
    settings, tensors = _settings(name, folder / CONFIG), _tensors(name, folder)
    copies = {key: found[1] for key in tensors if (found := _COPY.fullmatch(key))}
    pairs = _pairs(name, {key: t for key, t in tensors.items() if key not in copies}, settings.parameters)
    flags = {flag: any(re.fullmatch(p, layer) for layer in pairs) for flag, p in _PATTERNS.items()}
    flags["train_mlp"] |= any(_EXPERTS.fullmatch(layer) for layer in pairs)
    ranks = {layer: _pattern(settings.ranks, layer, theirs, settings.rank) for layer, (theirs, _) in pairs.items()}
    try:
        spec = LoraSpec(rank=max(ranks.values()), **flags)
    except RequestError as error:
        raise ModelError(f"{name} cannot be used: {error}") from error
    weights = dict[str, Tensor]()
    for layer, (theirs, sides) in pairs.items():
        rank, alpha = ranks[layer], _pattern(settings.alphas, layer, theirs, settings.alpha)
        a, b = sides["A"].float(), sides["B"].float()
        fits = a.ndim == b.ndim == 2 and len(a) == b.shape[1]
        if not fits or (len(a) % rank if _EXPERTS.fullmatch(layer) else len(a) != rank):
            shapes = f"A is {list(a.shape)}, B is {list(b.shape)}, the rank is {rank}"
            raise ModelError(f"{name} is damaged: of {theirs}, {shapes}; save it again")
        scale = alpha / (math.sqrt(rank) if settings.root else rank)
        weights[f"base_model.model.{layer}.lora_A.weight"] = a
        weights[f"base_model.model.{layer}.lora_B.weight"] = b * (scale * spec.rank / ALPHA)
    same = {f"{HEAD if layer == HEAD else QWEN3_VL.embeddings}.weight": tensors[key] for key, layer in copies.items()}
    return Foreign(settings.base_model, spec, weights, same)


def check_copies(stock: nn.Module, copies: Mapping[str, Tensor]) -> None:
    """Raise ModelError where weights that an adapter brings are not the model's: a vocabulary that was resized."""
    for name, tensor in _named(family_of(stock), copies).items():
        own = stock.get_parameter(name)
        if own.shape != tensor.shape or not own.to(tensor).equal(tensor):
            raise ModelError(f"it brings another {name} than the model's; {MERGE}")


def padded(layout: Layout, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A foreign adapter's weights with all the tensors of `layout`: zeros for what it does not cover, and up to the
    rank. Raises ModelError for layers that the model does not have, or has in another size."""
    full = {name: torch.zeros(piece.shape) for name, piece in layout.pieces.items()}
    for name, tensor in _named(layout.family, weights).items():
        if name not in full:
            raise ModelError(f"the model has no layer for {name}")
        axis = 0 if name.endswith(".lora_A.weight") else 1  # of the ranks, those of all experts together
        experts = full[name].shape[axis] // layout.spec.rank  # 1 for a linear layer
        here = _by_rank(full[name], axis, experts)
        theirs = _by_rank(tensor, axis, experts) if tensor.shape[axis] % experts == 0 else tensor
        if here.shape[1:] != theirs.shape[1:]:
            raise ModelError(f"{name} is {list(tensor.shape)}, and the model's layer is of another size")
        here[: len(theirs)] = theirs
    return full


def _named(family: Family, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names of a family."""
    return {name.replace(f"{QWEN3_VL.text}.", f"{family.text}."): tensor for name, tensor in tensors.items()}


def _by_rank(tensor: Tensor, axis: int, experts: int) -> Tensor:
    """(rank, experts, in) of an A, (rank, out, experts) of a B: views."""
    return tensor.unflatten(axis, (experts, -1) if axis == 0 else (-1, experts)).transpose(0, 1)


def _settings(name: str, path: Path) -> _Settings:
    try:
        written = parse_json(read_file(path, MAX_CONFIG))
        if (kind := written["peft_type"]) != "LORA":
            raise ModelError(f"{name} is of the kind {kind}, and kshot computes LoRA alone; {MERGE}")
        _refuse(name, written)
        base, revision = written.get("base_model_name_or_path") or "", written.get("revision")
        if not isinstance(base, str):
            raise TypeError(f"base_model_name_or_path is {base!r}")
        at = f"@{revision}" if revision and base and "@" not in base and not Path(base).exists() else ""
        ranks, alphas = written.get("rank_pattern") or {}, written.get("alpha_pattern") or {}
        for pattern in (*ranks, *alphas):
            re.compile(pattern)
        return _Settings(
            base_model=f"{base}{at}",
            rank=_rank(written["r"]),
            alpha=_number(written["lora_alpha"]),
            ranks={key: _rank(value) for key, value in ranks.items()},
            alphas={key: _number(value) for key, value in alphas.items()},
            root=bool(written.get("use_rslora")),
            parameters=tuple(map(str, written.get("target_parameters") or ())),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, re.error) as error:
        raise ModelError(f"{name} is damaged ({CONFIG}: {type(error).__name__}: {error}); save it again") from error


def _refuse(name: str, written: Mapping[str, Any]) -> None:
    """Raise ModelError for a setting with which the change of a layer is not scale · B A, or that is not known here."""
    special = {
        "use_dora": "DoRA",
        "lora_bias": "a bias of LoRA (lora_bias)",
        "use_qalora": "QALoRA",
        "modules_to_save": f"whole layers (modules_to_save: {written.get('modules_to_save')})",
        "trainable_token_indices": "single embeddings (trainable_token_indices)",
        "layer_replication": "layers that are repeated (layer_replication)",
    }
    values = {key: value for key, value in written.items() if key not in HARMLESS.split() and value}
    if values.get("bias") == "none":
        del values["bias"]
    initial = values.pop("init_lora_weights", True)
    if initial is not True and str(initial).lower() not in INITIAL:
        raise ModelError(f"{name} changes its model's own weights (init_lora_weights: {initial!r}); {MERGE}")
    if values.get("loftq_config") == {} or initial is True:
        values.pop("loftq_config", None)
    if values:
        key = min(values)
        raise ModelError(f"{name} has {special.get(key, f'{key} = {values[key]!r}')}, not LoRA alone; {MERGE}")


def _rank(value: Any) -> int:
    if type(value) is not int or not 0 < value <= MAX_RANK:
        raise ValueError(f"{value!r} is no rank from 1 to {MAX_RANK}")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no alpha")
    return float(value)


def _pattern(patterns: Mapping[str, Any], layer: str, theirs: str, default: Any) -> Any:
    """PEFT's own rule: the value of the first key, a regular expression, that the layer's name ends with."""
    if _EXPERTS.fullmatch(layer):  # PEFT asks for the parameter's name
        parameter = "gate_up_proj" if layer.endswith(".base_layer") else "down_proj"
        theirs = f"{theirs.removesuffix('.base_layer')}.{parameter}"
    return patterns.get(get_pattern_key(list(patterns), theirs), default)


def _tensors(name: str, folder: Path) -> dict[str, Tensor]:
    if not (folder / WEIGHTS).is_file():
        found = sorted(path.name for path in folder.glob("adapter_model.*"))
        why = f"pickled weights ({found[0]}), but only safetensors are read" if found else f"no {WEIGHTS}"
        raise ModelError(f"{name} has {why}; load it with PEFT where you trust it, and save it with save_pretrained")
    try:
        return load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{name} is damaged ({WEIGHTS}: {error}); copy it again") from error


def _pairs(
    name: str, tensors: Mapping[str, Tensor], parameters: Sequence[str]
) -> dict[str, tuple[str, dict[str, Tensor]]]:
    """Our name of a layer → its name in the adapter, and its A and B."""
    pairs = dict[str, tuple[str, dict[str, Tensor]]]()
    for key, tensor in tensors.items():
        found = _TENSOR.fullmatch(key)
        if found is None:
            raise ModelError(f"{name} has {_kind(key)} ({key}), not LoRA alone; {MERGE}")
        theirs, side = found.groups()
        _, sides = pairs.setdefault(_canonical(name, theirs), (theirs, {}))
        if side in sides:
            raise ModelError(f"{name} is damaged: {theirs} is there under two names; save it again")
        sides[side] = tensor
    if not pairs:
        raise ModelError(f"{name} is empty: it covers no layer; save it again")
    if halves := [theirs for theirs, sides in pairs.values() if len(sides) < 2]:
        raise ModelError(f"{name} is damaged: {halves[0]} has one of A and B alone; save it again")
    if any("gate_up_proj" in each for each in parameters) and not any("down_proj" in each for each in parameters):
        # PEFT nests the wrapper of one parameter in that of the next: alone, that of gate_up_proj is the outer one
        pairs = {f"{layer}.base_layer" if _EXPERTS.fullmatch(layer) else layer: pair for layer, pair in pairs.items()}
    return pairs


def _kind(key: str) -> str:
    kinds = {
        "lora_magnitude_vector": "DoRA",
        "lora_embedding": "LoRA on embeddings",
        ".lora_B.bias": "a bias of LoRA",
        ".bias": "biases",
        ".hada_": "LoHa",
        ".lokr_": "LoKr",
    }
    return next((kind for part, kind in kinds.items() if part in key), "whole layers (modules_to_save)")


def _canonical(name: str, theirs: str) -> str:
    found = _LAYER.fullmatch(theirs)
    text, vision, head = found.groups() if found else (None, None, None)
    layer = head or (f"{QWEN3_VL.text}.{text}" if text else f"model.visual.{vision}")
    if found and (_EXPERTS.fullmatch(layer) or any(re.fullmatch(pattern, layer) for pattern in _PATTERNS.values())):
        return layer
    raise ModelError(f"{name} covers {theirs}, a layer on which kshot computes no LoRA; {MERGE}")
