"""The families of models that the packed forward computes, a row each.

What differs besides is read off the stock modules and their configuration: biases, norms of queries and keys, experts,
tied heads, the angles of the rotary embedding with their scaling.
"""

from dataclasses import dataclass
from typing import Any

HEAD = "lm_head"
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # whose angles depend on the position alone
SILU = ("silu", "swish")


@dataclass(frozen=True)
class Family:
    """stock: the class of transformers. text: where the text model is in it. vision: whether there is a vision tower,
    and with it positions on three axes (M-RoPE)."""

    stock: str
    text: str = "model"
    vision: bool = False

    @property
    def embeddings(self) -> str:
        return f"{self.text}.embed_tokens"

    @property
    def layers(self) -> str:
        return f"{self.text}.layers"

    @property
    def norm(self) -> str:
        return f"{self.text}.norm"

    @property
    def first(self) -> tuple[str, ...]:
        """The modules before the layers."""
        tower = ("model.visual",) if self.vision else ()
        return (*tower, self.embeddings, f"{self.text}.rotary_emb")


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
    """The row of a stock model."""
    return FAMILIES[stock.config.model_type]


def difference(config: Any) -> str:
    """What a text model's configuration asks for that the packed forward does not compute; "" for nothing."""
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    layer_types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) if layer_types is None else None
    if window or {*(layer_types or ())} - {"full_attention"}:
        return "sliding-window attention (use_sliding_window)"
    if rope not in STATIC_ROPE:
        return f"rope_type {rope!r} (known: {', '.join(STATIC_ROPE)})"
    return "" if config.hidden_act in SILU else f"hidden_act {config.hidden_act!r} (known: {', '.join(SILU)})"
