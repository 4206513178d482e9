"""What DINOv2's tensors are called in the files it is published in: tables of names, and which table a file follows.

Two tables hold three layouts: DINOv2's own files (facebookresearch/dinov2) and timm's share most names, and where they
differ a row has both; transformers' has a table of its own. Knows names alone: neither files nor numbers.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

from kshot_errors import ModelError

Table = dict[str, tuple[tuple[str, ...], ...]]
_WHOLE, _LINEAR = ("",), (".weight", ".bias")


def _table(*rows: tuple[str, tuple[str, ...], tuple[tuple[str, ...], ...]]) -> Table:
    """Every row once with each of its ends."""
    return {
        name + end: tuple(tuple(part + end for part in parts) for parts in ways)
        for name, ends, ways in rows
        for end in ends
    }


@dataclass(frozen=True)
class Layout:
    """One table of names.

    Attributes:
        outer: timm's name -> the ways it is stored, each a tuple of names whose tensors, one below the other along the
            first axis, are timm's tensor.
        inner: as `outer`, of a block; its names follow `block`, where {} is the block's number.
        numbered: `block` as a pattern; its group is the number.
        dropped: what no feature depends on: the token of masked patches (training), a classifier.
    """

    outer: Table
    inner: Table
    block: str
    numbered: re.Pattern[str]
    dropped: tuple[str, ...]

    @property
    def mark(self) -> str:
        """The name that a file of this layout is told by: its patch embedding."""
        return self.outer["patch_embed.proj.weight"][0][0]


PLAIN = Layout(
    outer=_table(
        ("cls_token", _WHOLE, (("cls_token",),)),
        ("reg_token", _WHOLE, (("register_tokens",), ("reg_token",))),
        ("pos_embed", _WHOLE, (("pos_embed",),)),
        ("patch_embed.proj", _LINEAR, (("patch_embed.proj",),)),
        ("norm", _LINEAR, (("norm",),)),
    ),
    inner=_table(
        ("norm1", _LINEAR, (("norm1",),)),
        ("attn.qkv", _LINEAR, (("attn.qkv",),)),
        ("attn.proj", _LINEAR, (("attn.proj",),)),
        ("ls1.gamma", _WHOLE, (("ls1.gamma",),)),
        ("norm2", _LINEAR, (("norm2",),)),
        ("mlp.fc1", _LINEAR, (("mlp.fc1",), ("mlp.w12",))),
        ("mlp.fc2", _LINEAR, (("mlp.fc2",), ("mlp.w3",))),
        ("ls2.gamma", _WHOLE, (("ls2.gamma",),)),
    ),
    block="blocks.{}.",
    # Chunked checkpoints (FSDP) say blocks.CHUNK.NUMBER, and NUMBER goes on from chunk to chunk.
    numbered=re.compile(r"blocks\.(?:\d{1,4}\.)?(\d{1,4})\."),
    dropped=("mask_token", "head.weight", "head.bias"),
)
HUB = Layout(
    outer=_table(
        ("cls_token", _WHOLE, (("embeddings.cls_token",),)),
        ("reg_token", _WHOLE, (("embeddings.register_tokens",),)),
        ("pos_embed", _WHOLE, (("embeddings.position_embeddings",),)),
        ("patch_embed.proj", _LINEAR, (("embeddings.patch_embeddings.projection",),)),
        ("norm", _LINEAR, (("layernorm",),)),
    ),
    # q_proj, gate_proj and the like: the modules of recent versions of transformers, which exports are named after.
    inner=_table(
        ("norm1", _LINEAR, (("norm1",),)),
        (
            "attn.qkv",
            _LINEAR,
            (
                ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
                ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
            ),
        ),
        ("attn.proj", _LINEAR, (("attention.output.dense",), ("attention.o_proj",))),
        ("ls1.gamma", _WHOLE, (("layer_scale1.lambda1",),)),
        ("norm2", _LINEAR, (("norm2",),)),
        ("mlp.fc1", _LINEAR, (("mlp.fc1",), ("mlp.weights_in",), ("mlp.gate_proj", "mlp.up_proj"))),
        ("mlp.fc2", _LINEAR, (("mlp.fc2",), ("mlp.weights_out",), ("mlp.down_proj",))),
        ("ls2.gamma", _WHOLE, (("layer_scale2.lambda1",),)),
    ),
    block="encoder.layer.{}.",
    numbered=re.compile(r"encoder\.layer\.(\d{1,4})\."),
    dropped=("embeddings.mask_token",),
)
LAYOUTS = (PLAIN, HUB)
KNOWN = "DINOv2's own files, timm's, and those of transformers' Dinov2Model and Dinov2WithRegistersModel"


@dataclass(frozen=True)
class Names:
    """The names of the one backbone in a file.

    Attributes:
        prefix: what they start with, as "" or "backbone."; the names without it belong to something else.
        inside: the names after the prefix, without those that the layout drops.
        blocks: number of a block -> what its names start with, after the prefix.
    """

    layout: Layout
    prefix: str
    inside: frozenset[str]
    blocks: dict[int, str]

    def sources(self, name: str) -> tuple[str, ...]:
        """The file's names of timm's tensor `name`: of the first way of which any is there, else of the first way."""
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if match:
            number = int(match[1])
            start, ways = self.blocks.get(number, self.layout.block.format(number)), self.layout.inner[match[2]]
        else:
            start, ways = "", self.layout.outer[name]
        there = (way for way in ways if any(start + part in self.inside for part in way))
        return tuple(self.prefix + start + part for part in next(there, ways[0]))


def find(names: Collection[str], file: str) -> Names:
    """The backbone among a file's tensors. file: what an error calls it.

    Raises:
        ModelError: there is none, or more than one (a student beside its teacher).
    """
    marked = [
        (layout, name.removesuffix(layout.mark))
        for layout in LAYOUTS
        for name in sorted(names)
        if name == layout.mark or name.endswith(f".{layout.mark}")
    ]
    if not marked:
        first = ", ".join(sorted(names)[:3]) or "none"
        raise ModelError(f"{file} has no tensors of a DINOv2 backbone (its first: {first}); known layouts: {KNOWN}")
    if len(marked) > 1:
        prefixes = ", ".join(repr(prefix) for _, prefix in marked)
        raise ModelError(
            f"{file} has {len(marked)} backbones (under {prefixes}); save one of them to a file of its own"
        )
    layout, prefix = marked[0]
    inside = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}.difference(layout.dropped)
    matches = [match for name in sorted(inside) if (match := layout.numbered.match(name))]
    return Names(layout, prefix, frozenset(inside), {int(match[1]): match[0] for match in matches})
