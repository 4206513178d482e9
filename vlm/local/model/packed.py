"""Text models of the Llama and Qwen layouts on packed positions: (positions, hidden), no padding.

The stock model's weights, computed as the stock model does; layers that read one input are one product, and the last
layer computes only the positions whose hidden state is wanted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from vlm.local.model.attention import Attention, Cache, gather
from vlm.local.model.experts import Pair, sparse_mlp
from vlm.local.model.families import family_of
from vlm.local.model.lora import Factors, linear
from vlm.local.model.ops import norm_rope, rms_norm, rope_only, swiglu, wide


@dataclass(frozen=True)
class PackedInputs:
    """The inputs of a pass. ids: (positions,) tokens. position_ids: (3, positions) M-RoPE (time, height, width), which
    are all the same in a text.

    image_positions: (image positions,) where `embeds` (image positions, hidden) stand, and each of `deepstack`,
    likewise, is added after its layer.
    """

    ids: Tensor
    position_ids: Tensor
    image_positions: Tensor | None = None
    embeds: Tensor | None = None
    deepstack: Sequence[Tensor] | Tensor = ()


@lru_cache(maxsize=4096)  # most prompts have one of few shapes
def mrope_positions(shape: tuple[int | tuple[int, int, int], ...], merge: int) -> tuple[np.ndarray, int]:
    """M-RoPE positions (3, length) and the one after them. shape: of each chunk, a text's length or an image's grid."""
    positions, start = [np.zeros((3, 0), np.int64)], 0
    for chunk in shape:
        if isinstance(chunk, int):  # text counts up on all three axes
            positions.append(np.arange(start, start + chunk)[None].repeat(3, 0))
            start += chunk
        else:  # an image's tokens spread by time, row and column
            size = chunk[0], chunk[1] // merge, chunk[2] // merge
            positions.append(start + np.indices(size).reshape(3, -1))
            start += max(size)
    return np.concatenate(positions, 1), start


class TextModel(Protocol):
    """The text model and the head of a model, whichever way they are computed. Cache: what it keeps of rows."""

    Cache: Any

    @property
    def layers(self) -> Sequence[Any]: ...

    def hidden(
        self,
        inputs: PackedInputs,
        attention: Attention,
        factors: Factors | None,
        between_layers: Callable[[], None] | None = None,
    ) -> Tensor: ...

    def logits(self, hidden: Tensor, factors: Factors | None, tokens: Tensor | None = None) -> Tensor: ...


class Text:
    """The text model and the head of a stock model of FAMILIES."""

    Cache: Any = Cache

    def __init__(self, stock: Any, layers: Sequence[Any] | None = None) -> None:
        """layers: where those of the stock model are not to be used."""
        family = family_of(stock)
        text: Any = stock.get_submodule(family.text)
        named = [(f"{family.layers}.{number}", number, layer) for number, layer in enumerate(text.layers)]
        self.layers: Sequence[Any] = layers or [Layer(*each) for each in named]
        self._axes = 3 if family.vision else 1  # of positions
        self._embed, self._norm, self._rope, self._head = text.embed_tokens, text.norm, text.rotary_emb, stock.lm_head

    def hidden(
        self,
        inputs: PackedInputs,
        attention: Attention,
        factors: Factors | None,
        between_layers: Callable[[], None] | None = None,
    ) -> Tensor:
        """(positions, hidden), or (wanted, hidden) of those that `attention` wants: the last states, after the norm.

        between_layers: called there, forwards and again backwards; it may use the model.
        """
        x = self.embedded(inputs.ids)
        if inputs.image_positions is not None and inputs.embeds is not None:
            x = x.index_copy_(0, inputs.image_positions, inputs.embeds.to(x))
        # cosines and sines, (positions, 1, dim), as `norm_rope` takes them
        position_ids = inputs.position_ids[: self._axes]
        angles = position_ids[:, None] if self._axes > 1 else position_ids
        cos, sin = (each[0][:, None] for each in self._rope(x, angles))
        rope: tuple[Tensor, ...] = cos, torch.cat([sin[..., : (half := sin.shape[-1] // 2)], -sin[..., half:]], -1)
        final = len(self.layers) - 1
        # the last layer's own features need all positions
        early = len(inputs.deepstack) <= final
        for number, layer in enumerate(self.layers):
            if layer.device != x.device:
                x, attention = x.to(layer.device), attention.to(layer.device)
                rope = tuple(each.to(layer.device) for each in rope)
            wanted = attention.wanted if early and number == final else None
            x = self.through(layer, x, rope, attention, factors, wanted)
            if number < len(inputs.deepstack) and inputs.image_positions is not None:
                # a sum of whole rows is much faster than index_add, and in place: it keeps nothing for its gradient
                positions = inputs.image_positions.to(x.device)
                x = x.add_(torch.zeros_like(x).index_copy_(0, positions, inputs.deepstack[number].to(x)))
            if between_layers is not None and number < final:
                between_layers()
                if x.requires_grad:
                    x.register_hook(lambda _: between_layers())
        if attention.wanted is not None and not early:
            x = gather(x, attention.wanted)
        return rms_norm(x.to(self._norm.weight.device), self._norm.weight, self._norm.variance_epsilon)

    def embedded(self, ids: Tensor) -> Tensor:
        """(positions, hidden) of tokens."""
        x: Tensor = self._embed.weight[ids]
        return x

    def through(self, layer: "Layer", x: Tensor, *arguments: Any) -> Tensor:
        """A layer's output."""
        out: Tensor = layer(x, *arguments)
        return out

    def logits(self, hidden: Tensor, factors: Factors | None, tokens: Tensor | None = None) -> Tensor:
        """(n, vocabulary) logits in float32 of (n, hidden) states, or (n, tokens) of these tokens alone.

        Those of a few tokens are also computed in float32: in bfloat16 two logits near 20 are equal or 0.125 apart.
        """
        pair, scale = (factors.pair("lm_head"), factors.scale) if factors else (None, 1.0)
        head, hidden = self._head, hidden.to(self._head.weight.device)
        bias = getattr(head, "bias", None)  # the embeddings may stand for a tied head
        if tokens is None:
            return wide(linear(hidden, head.weight, bias, pair, scale))
        rows, hidden = tokens.to(hidden.device), wide(hidden)
        out = hidden @ wide(head.weight[rows]).t()
        if bias is not None:
            out = out + wide(bias[rows])
        if pair is not None:
            a, b = pair
            out = out + scale * (hidden @ wide(a).t()) @ wide(b.index_select(0, rows)).t()
        return out


SOURCES = {  # of a layer's parameters
    "_norm1": ("input_layernorm",),
    "_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "_o": ("self_attn.o_proj",),
    "_norm2": ("post_attention_layernorm",),
    "_gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "_down": ("mlp.down_proj",),
}


class Layer(nn.Module):
    """One decoder layer, which owns its weights. The stock layer's become views of the products' weights: nothing is
    held twice."""

    def __init__(self, name: str, number: int, stock: Any) -> None:
        super().__init__()
        attention, mlp = stock.self_attn, stock.mlp
        self._name, self._number, self._eps = name, number, stock.input_layernorm.variance_epsilon
        self._norm1, self._norm2 = stock.input_layernorm.weight, stock.post_attention_layernorm.weight
        self._qkv, self._qkv_bias = _beside(attention.q_proj, attention.k_proj, attention.v_proj)
        self._o, self._o_bias = attention.o_proj.weight, attention.o_proj.bias
        self._dim, self._heads = attention.head_dim, attention.q_proj.out_features // attention.head_dim
        self._key_heads = attention.k_proj.out_features // attention.head_dim
        self._qk_norm: Tensor | None = None
        self.hold(stock, attention.q_proj.weight.device)
        self._sparse = mlp if hasattr(mlp, "experts") else None
        if self._sparse is None:
            self._gate_up, self._gate_up_bias = _beside(mlp.gate_proj, mlp.up_proj)
            self._down, self._down_bias = mlp.down_proj.weight, mlp.down_proj.bias

    def hold(self, stock: Any, device: torch.device) -> None:
        """Take what is small of the stock layer's weights. device: where the layer computes."""
        self.device = device
        if hasattr(attention := stock.self_attn, "q_norm"):
            norms = attention.q_norm.weight.expand(self._heads, -1), attention.k_norm.weight.expand(self._key_heads, -1)
            self._qk_norm = torch.cat(norms).detach().to(device)

    @staticmethod
    def sources(stock: Any, name: str) -> list[Tensor]:
        """The stock layer's tensors that stand in one of this layer's parameters, one after the other."""
        module, _, inner = name.partition(".")
        if inner:
            return [stock.mlp.get_parameter(inner)]
        kind = "bias" if module.endswith("_bias") else "weight"
        return [stock.get_submodule(each).get_parameter(kind) for each in SOURCES[module.removesuffix("_bias")]]

    def forward(
        self, x: Tensor, rope: tuple[Tensor, ...], attention: Attention, factors: Factors | None, wanted: Tensor | None
    ) -> Tensor:
        """(positions, hidden) → the same after this layer, or only at the `wanted` positions."""
        scale, number = factors.scale if factors else 1.0, self._number

        def pair(name: str) -> Pair | None:
            return factors.pair(f"{self._name}.{name}") if factors else None

        mixed = linear(rms_norm(x, self._norm1, self._eps), self._qkv, self._qkv_bias, pair("self_attn.q_proj"), scale)
        mixed = mixed.view(len(x), -1, self._dim)
        if self._qk_norm is None:
            mixed = rope_only(mixed, self._heads + self._key_heads, rope)
        else:
            mixed = norm_rope(mixed, self._qk_norm, rope, self._eps)
        q, k, v = mixed.split((self._heads, self._key_heads, self._key_heads), 1)
        if wanted is None:
            seen = attention(number, q, k, v)
        else:
            x, seen = gather(x, wanted), attention.last(number, gather(q, wanted), k, v)
        x = linear(seen, self._o, self._o_bias, pair("self_attn.o_proj"), scale, residual=x)
        normal = rms_norm(x, self._norm2, self._eps)
        if self._sparse is not None:
            gate_up, down = (pair(f"mlp.experts.{name}_proj") for name in ("gate_up", "down"))
            return x + sparse_mlp(normal, self._sparse, gate_up, down, scale)
        inner = swiglu(linear(normal, self._gate_up, self._gate_up_bias, pair("mlp.gate_proj"), scale))
        return linear(inner, self._down, self._down_bias, pair("mlp.down_proj"), scale, residual=x)


def _beside(*linears: nn.Linear) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Weight and bias of the layers as one, whose parts the layers' own parameters become."""
    parts = [layer.out_features for layer in linears]
    weight = torch.cat([layer.weight.detach() for layer in linears])
    bias = None if linears[0].bias is None else torch.cat([layer.bias.detach() for layer in linears])
    for layer, part in zip(linears, weight.split(parts), strict=True):
        layer.weight.data = part
    frozen = partial(nn.Parameter, requires_grad=False)
    return frozen(weight), None if bias is None else frozen(bias)
