"""What DINOv2's tensors are called in the files it is published in: tables of names, and which table a file follows.

Two tables hold three layouts: DINOv2's own files (facebookresearch/dinov2) and timm's share most names, and where they
differ a row has both; transformers' has a table of its own. Knows names alone: neither files nor numbers.

TODO The tensors of a DINOv2 backbone in an .onnx file, under the names that they had before torch exported them.

The exporters keep the names of biases and norms, but compute beforehand what they can: the weight of a linear layer
comes out transposed and nameless, and position embeddings and tokens may lose their names too. They are found where the
graph uses them. Position embeddings are what it stores: exports for one image size may have them resampled to it.
Runs no graph, and knows no architecture: what is not found is missing in the result.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from kshot.errors import ModelError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

# ---- What DINOv2's tensors are called in the files it is published in: tables of names, and which table a file

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


# ---- The tensors of a DINOv2 backbone in an .onnx file, under the names that they had before torch exported them.

_PARAMETER = re.compile(r"[A-Za-z_]\w*(\.\w+)+")  # not onnx::MatMul_7, val_7, /encoder/Constant_output_0
_FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE")
# The way from stored position embeddings, or a stored token, to those of a batch of images.
_REARRANGED = ("Identity", "Cast", "Expand", "Reshape", "Transpose", "Resize")
# The way of patch embeddings, from the convolution to the first block.
_CARRIED = ("Reshape", "Transpose", "Flatten", "Cast", "Identity", "Slice")


def read(path: Path) -> dict[str, torch.Tensor]:
    """The backbone's tensors, float32. External data is read from within the file's own folder only (onnx sees to it).

    Raises:
        ModelError: onnx is not installed, the file has no backbone, or one that is stored in numbers that are not real.
    """
    graph = _Graph(_load(path), str(path))
    names = find(graph.stored, f"checkpoint {path}")
    outer = {name for ways in names.layout.outer.values() for way in ways for name in way}
    kept = (name for name in names.inside if name in outer or _PARAMETER.fullmatch(name))
    arrays = {names.prefix + name: graph.array(names.prefix + name) for name in kept}
    for bias in [name for name in arrays if name.endswith(".bias")]:
        weight = graph.linear(bias)
        if weight is not None:
            arrays.setdefault(bias.removesuffix("bias") + "weight", weight)
    for name, array in graph.embeddings(names.prefix + names.layout.mark):
        arrays.setdefault(names.sources(name)[0], array)
    return {name: torch.tensor(array) for name, array in arrays.items()}


def _load(path: Path) -> "ModelProto":
    try:
        import onnx
    except ImportError as error:
        raise ModelError(
            f"checkpoint {path} needs the package onnx; run in kshot's checkout: pip install -e '.[onnx]'"
        ) from error
    return onnx.load(path)


class _Graph:
    """A graph's stored tensors, and the way to them from where they are used.

    Attributes:
        stored: name -> tensor, also under the names that stand for the same tensor.
    """

    def __init__(self, model: "ModelProto", file: str) -> None:
        self._file, self._nodes = file, list(model.graph.node)
        self.stored: dict[str, TensorProto] = {tensor.name: tensor for tensor in model.graph.initializer}
        self._maker: dict[str, NodeProto] = {}
        self._readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self._nodes:
            self._maker.update(dict.fromkeys(node.output, node))
            for name in node.input:
                self._readers[name].append(node)
            # The exporter stores equal tensors once; the other names are of Identity nodes.
            if node.op_type == "Identity" and node.input[0] in self.stored:
                self.stored[node.output[0]] = self.stored[node.input[0]]

    def array(self, name: str) -> np.ndarray:
        """A stored tensor, float32. Raises ModelError unless it holds floating-point numbers."""
        from onnx import TensorProto, numpy_helper

        tensor = self.stored[name]
        kind = TensorProto.DataType.Name(tensor.data_type)
        if kind not in _FLOATS:
            raise ModelError(f"checkpoint {self._file} has {name} in {kind}; give the model before it was quantised")
        return numpy_helper.to_array(tensor).astype(np.float32)

    def linear(self, bias: str) -> np.ndarray | None:
        """(out, in): the matrix of the one product that this bias is added to."""
        values = [v for node in self._readers[bias] if node.op_type == "Add" for v in node.input if v != bias]
        makers = [self._maker[value] for value in values if value in self._maker]
        products = [node for node in makers if node.op_type == "MatMul" and node.input[1] in self.stored]
        return self.array(products[0].input[1]).T if len(products) == 1 else None

    def embeddings(self, patch: str) -> Iterator[tuple[str, np.ndarray]]:
        """timm's names and (1, N, D) arrays of the position embeddings and of the tokens set before the patches, found
        along the way from the convolution with the weight `patch` to the first block.

        The tokens are the CLS token and then the registers. ONNX has a graph's nodes in an order of computation.
        """
        width = self.stored[patch].dims[0]
        reached = {node.output[0] for node in self._readers[patch] if node.op_type == "Conv"}
        tokens: list[np.ndarray | None] = []
        for node in self._nodes:
            others = [name for name in node.input if name not in reached]
            if len(others) == len(node.input):
                continue
            if node.op_type == "Concat":
                tokens += [self._tokens(name, width) for name in others]
            elif node.op_type == "Add":
                positions = self._positions(others[0], width) if others else None
                if positions is None:
                    continue
                yield "pos_embed", positions
            elif node.op_type not in _CARRIED or node.input[0] not in reached:
                continue
            reached.update(node.output)
        found = zip(("cls_token", "reg_token"), tokens, strict=False)
        yield from ((name, array) for name, array in found if array is not None)

    def _positions(self, value: str, width: int) -> np.ndarray | None:
        """(1, N, D): position embeddings as they are stored, in one tensor or in two, of CLS and of the patches."""
        maker = self._maker.get(value)
        stored = [value] if maker is None or maker.op_type != "Concat" else maker.input
        parts = [self._tokens(name, width) for name in stored]
        found = [part for part in parts if part is not None]
        return np.concatenate(found, axis=1) if len(found) == len(parts) else None

    def _tokens(self, value: str, width: int) -> np.ndarray | None:
        """(1, N, D): the stored tensor that a value is made of, whether it lies as a sequence or as an image."""
        for _ in self._nodes:  # not for ever: a broken graph may run in a circle
            maker = self._maker.get(value)
            if value in self.stored or maker is None or maker.op_type not in _REARRANGED:
                break
            value = maker.input[0]
        if value not in self.stored:
            return None
        array = self.array(value)
        if array.ndim == 4 and array.shape[1] == width:
            array = array.transpose(0, 2, 3, 1)
        return array[:1].reshape(1, -1, width) if array.shape[-1:] == (width,) else None
