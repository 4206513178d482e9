"""The families of models: those that the packed forward computes, a row each, and any other of transformers.

What differs besides is read off the stock modules and their configuration: biases, norms of queries and keys, experts,
tied heads, the angles of the rotary embedding with their scaling. Of a family without a row everything is.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from kshot.errors import ModelError

HEAD = "lm_head"
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # whose angles depend on the position alone
EMBEDDINGS = "embed_tokens"
SILU = ("silu", "swish")
NO_DECODER = "model {} is of type {!r}, which is no decoder; give one that is"


@dataclass(frozen=True)
class Family:
    """stock: the class of transformers. text: where the text model is in it. vision: whether there is a vision tower,
    and with it positions on three axes (M-RoPE). packed: whether the packed forward computes it.

    embed, blocks, last: the embeddings, the decoder layers, and the norm behind them, in the text model. head: in the
    whole model. others: all other modules, where the stock forward computes the family.
    """

    stock: str
    text: str = "model"
    vision: bool = False
    packed: bool = True
    embed: str = EMBEDDINGS
    blocks: str = "layers"
    last: str = "norm"
    head: str = HEAD
    others: tuple[str, ...] = ()

    @property
    def embeddings(self) -> str:
        return f"{self.text}.{self.embed}"

    @property
    def layers(self) -> str:
        return f"{self.text}.{self.blocks}"

    @property
    def norm(self) -> str:
        return f"{self.text}.{self.last}"

    @property
    def first(self) -> tuple[str, ...]:
        """The modules before the layers."""
        tower = ("model.visual",) if self.vision else ()
        return self.others or (*tower, self.embeddings, f"{self.text}.rotary_emb")


QWEN3_VL = Family("Qwen3VLForConditionalGeneration", "model.language_model", vision=True)
FAMILIES = {  # by model_type
    "llama": Family("LlamaForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM"),
    "qwen3": Family("Qwen3ForCausalLM"),
    "qwen3_moe": Family("Qwen3MoeForCausalLM"),
    "qwen3_vl": QWEN3_VL,
    "qwen3_vl_moe": Family("Qwen3VLMoeForConditionalGeneration", "model.language_model", vision=True),
}


def family_of(stock: Any) -> Family:
    """The row of a stock model, or what its modules say. Raises ModelError for what is no decoder of layers."""
    return row_of(stock.config) or _of_modules(stock)


def row_of(config: Any) -> Family | None:
    """The row of a model's configuration; None where the packed forward does not compute the model."""
    row = FAMILIES.get(config.model_type)
    return None if row is None or _differs(config.get_text_config()) else row


def _differs(config: Any) -> bool:
    """Whether a text model's configuration asks for what the packed forward does not compute: sliding windows, angles
    that depend on the length of a text, another activation."""
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    layer_types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) if layer_types is None else None
    sliding = bool(window) or bool({*(layer_types or ())} - {"full_attention"})
    return sliding or rope not in STATIC_ROPE or config.hidden_act not in SILU


# Models without a row

READ_AS = {"kimi_k2": "deepseek_v3"}  # types that transformers has under another name
PROJECTIONS = "gate_up_proj", "down_proj"  # of all experts of a layer, each a tensor of three dimensions
EXPERTS = "mlp.experts"  # the module whose parameters they are
_ROUTER = re.compile(r"(?:.*\.)?(?:gate|router|\w+_gate)(?:\..*)?")
_MIXER = re.compile("att|mixer|mamba|ssm|conv|recurrent")  # in the name of what mixes positions


def stock_class(name: str, config: Mapping[str, Any]) -> str:
    """The class of transformers for a checkpoint whose type has no row. config: its config.json. Raises ModelError
    where there is none (no code of a checkpoint is ever run), and for an encoder."""
    from transformers.models.auto import modeling_auto as auto

    kind = config.get("model_type")
    known = READ_AS.get(str(kind), str(kind))
    tables = [auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    if "vision_config" in config:
        tables.insert(0, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    encodes = known in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES  # unless told otherwise, as BERT and XLM
    if encodes and not (config.get("is_decoder") or config.get("causal")):
        raise ModelError(NO_DECODER.format(name, kind))
    found = next((table[known] for table in tables if known in table), None)
    if found is None and "auto_map" in config:
        raise ModelError(f"model {name} is of type {kind!r} and needs its own code (auto_map), which is never run here")
    if found is None:
        raise ModelError(
            f"model {name} is of type {kind!r}, a decoder for which transformers has no code; give another"
        )
    return str(found)


def stock_family(name: str, config: Any, found: str) -> Family:
    """The family of a configuration and its class in transformers. Raises ModelError for one that encodes too,
    and for one with modules on which LoRA cannot sit."""
    import torch
    import transformers

    if config.is_encoder_decoder:
        raise ModelError(NO_DECODER.format(name, config.model_type))
    with torch.device("meta"):
        empty = getattr(transformers, found)(config)
    try:
        family = family_of(empty)
        targets(empty, family)
    except ModelError as error:
        raise ModelError(f"model {name} {error}; give another model") from error
    return family


def _of_modules(stock: Any) -> Family:
    """The parts of a stock model by their places."""
    names = {id(module): name for name, module in stock.named_modules()}
    text, count = stock.get_decoder(), stock.config.get_text_config().num_hidden_layers
    kinds = [(n, m) for n, m in text.named_children() if isinstance(m, nn.ModuleList) and len(m) == count]
    norms = [n for n, m in text.named_children() if "norm" in n.lower() and m is not None]
    if len(kinds) != 1 or not norms or not isinstance(stock.get_output_embeddings(), nn.Linear):
        raise ModelError(f"is of type {stock.config.model_type!r}, whose layers, norm and head are not told apart")
    at = names[id(text)]
    family = Family(
        type(stock).__name__,
        at,
        hasattr(stock.config, "vision_config"),
        packed=False,
        embed=names[id(stock.get_input_embeddings())].removeprefix(f"{at}."),
        blocks=kinds[0][0],
        last=norms[-1],
        head=names[id(stock.get_output_embeddings())],
    )
    return replace(family, others=tuple(_beside(stock, "", {family.layers, family.norm, family.head})))


def _beside(module: nn.Module, at: str, but: set[str]) -> Iterator[str]:
    """The largest modules that hold none of these."""
    for child, inner in module.named_children():
        name = f"{at}.{child}" if at else child
        if any(each.startswith(f"{name}.") for each in but):
            yield from _beside(inner, name, but)
        elif name not in but:
            yield name


def targets(stock: Any, family: Family) -> dict[str, str]:
    """What the flags of LoRA train in a family without a row: flag → a regular expression of the names of linear
    layers. Routers are never trained. Raises ModelError where a layer has weights on which LoRA cannot sit."""
    found: dict[str, dict[str, None]] = {"train_attn": {}, "train_mlp": {}}
    for number, layer in enumerate(stock.get_submodule(family.layers)):
        for name, module in layer.named_modules():
            if _ROUTER.fullmatch(name) or (name.endswith(EXPERTS) and is_stacked(module)):
                continue
            if isinstance(module, nn.Linear):
                flag = "train_attn" if _MIXER.search(name) else "train_mlp"
                found[flag][re.sub(r"\b\d+\b", r"\\d+", re.escape(name))] = None
            elif not isinstance(module, nn.Conv1d) and any(p.ndim > 1 for p in module.parameters(recurse=False)):
                where = f"{family.layers}.{number}.{name}".rstrip(".")
                raise ModelError(f"has a {type(module).__name__} at {where}, on which LoRA cannot sit")
    layers = rf"{re.escape(family.layers)}\.\d+\."
    patterns = {flag: f"{layers}(?:{'|'.join(names)})" for flag, names in found.items() if names}
    return {**patterns, "train_unembed": re.escape(family.head)}


def is_stacked(module: Any) -> bool:
    """Whether these are experts as the grouped product takes them: two tensors, gate and up one after the other."""
    if {name for name, _ in module.named_parameters(recurse=False)} != set(PROJECTIONS):
        return False
    wanted = {"is_transposed": False, "has_bias": False, "has_post_expert_norm": False}
    wanted |= {"is_concatenated": True, "has_gate": True}
    usual = all(getattr(module, name, None) is value for name, value in wanted.items())
    return usual and type(module)._apply_gate.__name__ == "_default_apply_gate"
