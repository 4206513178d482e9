"""Attention in a packed pass: causal rows, their last queries, a tree after each row, one token after a cache.

A pass is packed: its positions are one list, row after row, without padding. Only here are rows padded, for
scaled_dot_product_attention, behind their end, where no real position looks and anything finite may stand. Queries are
(positions, heads, dim), keys and values (positions, key heads, dim), the output (queries, heads x dim).
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, Self, cast

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

from vlm.label_trie import ROOT


class Attention(Protocol):
    """Attention of one pass, layer by layer. wanted: the positions whose last hidden state is (None: all)."""

    wanted: Tensor | None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The output of every position's query."""

    def last(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The output of the queries of the wanted positions: the last layer needs no others."""

    def to(self, device: torch.device) -> "Attention":
        """The same for layers on another device."""


class Rows:
    """The rows of a packed pass, and how they stand side by side when padded."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths, self.count, self.longest, self.device = list(lengths), len(lengths), max(lengths), device
        self.even = min(lengths) == self.longest
        row = np.repeat(np.arange(self.count), self.lengths)
        column = np.arange(len(row)) - (np.cumsum(self.lengths) - self.lengths)[row]
        self.row = torch.from_numpy(row).to(device)  # (positions,) whose row it is
        self.column = torch.from_numpy(column).to(device)
        index = row * self.longest + column
        self.padded_index = torch.from_numpy(index).to(device)  # where it stands in the padded rows
        source = np.zeros(self.count * self.longest, np.int64)
        source[index] = np.arange(len(row))
        self._source = torch.from_numpy(source).to(device)  # which position stands there; behind a row's end any does

    def pad(self, packed: Tensor) -> Tensor:
        """(positions, heads, dim) → (rows, heads, longest, dim)."""
        padded = packed if self.even else _Scatter.apply(packed, self._source, self.padded_index)
        return padded.view(self.count, self.longest, *packed.shape[1:]).transpose(1, 2)

    def pack(self, padded: Tensor) -> Tensor:
        """(rows, heads, longest, dim) → (positions, heads x dim)."""
        flat = padded.transpose(1, 2).reshape(self.count * self.longest, -1)
        return flat if self.even else _Gather.apply(flat, self.padded_index)


class _Scatter(torch.autograd.Function):
    """Rows of a tensor to distinct indices. What stands elsewhere is a row of it too, and nobody's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        return x.index_select(0, source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient.index_select(0, *ctx.saved_tensors), None, None


class _Gather(torch.autograd.Function):
    """Distinct rows of a tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.size = len(x)
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (index,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.size, *gradient.shape[1:]).index_copy_(0, index, gradient), None


def gather(x: Tensor, index: Tensor) -> Tensor:
    """x[index] for distinct indices: its gradient is a copy, not a sum."""
    return _Gather.apply(x, index)


class Causal:
    """Every position sees its row up to itself. cache: keeps keys and values, if given."""

    def __init__(self, rows: Rows, wanted: Tensor | None = None, cache: "RowCache | None" = None) -> None:
        self.rows, self.wanted, self.cache = rows, wanted, cache
        if wanted is not None:
            counts = torch.bincount(rows.row[wanted], minlength=rows.count).tolist()
            self._queries = Rows(counts, wanted.device)
            column = torch.zeros(rows.count * self._queries.longest, dtype=torch.long, device=wanted.device)
            column[self._queries.padded_index] = rows.column[wanted]
            seen = torch.arange(rows.longest, device=wanted.device) <= column[:, None]
            self._mask = seen.view(rows.count, 1, self._queries.longest, rows.longest)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = self.rows.pad(q), *self._keys(layer, k, v)
        return self.rows.pack(scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))

    def last(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = self._queries.pad(q), *self._keys(layer, k, v)
        return self._queries.pack(scaled_dot_product_attention(q, k, v, attn_mask=self._mask, enable_gqa=True))

    def to(self, device: torch.device) -> "Causal":
        if device == self.rows.device:
            return self
        wanted = None if self.wanted is None else self.wanted.to(device)
        return Causal(Rows(self.rows.lengths, device), wanted, self.cache)

    def _keys(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Padded keys and values, (rows, key heads, longest, dim)."""
        k, v = self.rows.pad(k), self.rows.pad(v)
        if isinstance(self.cache, Cache):
            self.cache.put(layer, k, v)
        return k, v


class RowCache(Protocol):
    """What a text model keeps of rows. lengths: (rows,) positions that are filled. capacity: for how many there is room
    in each."""

    lengths: Tensor

    @property
    def capacity(self) -> int: ...

    @classmethod
    def joined(cls, parts: Sequence[tuple[Any, Sequence[int]]], capacity: int) -> Self:
        """A cache for `capacity` positions of these rows of each cache, in order (repeated where they stand twice)."""


class Cache:
    """Keys and values of every layer, (rows, key heads, capacity, dim), each row filled from the left."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = torch.tensor(lengths, device=device)  # (rows,) positions that are filled
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def put(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Take a layer's padded keys and values."""
        self._layers[layer] = (k, v)

    @classmethod
    def joined(cls, parts: Sequence[tuple["Cache", Sequence[int]]], capacity: int) -> "Cache":
        """A cache for `capacity` positions of these rows of each cache, in order (repeated where they stand twice)."""
        first, _ = parts[0]
        other = cls([n for cache, rows in parts for n in cache.lengths[list(rows)].tolist()], first.lengths.device)
        for layer in first._layers:
            keys, values = zip(*(cache._chosen(layer, rows, capacity) for cache, rows in parts), strict=True)
            other.put(layer, *(each[0] if len(each) == 1 else torch.cat(each) for each in (keys, values)))
        return other

    def _chosen(self, layer: int, rows: Sequence[int], capacity: int) -> Iterator[Tensor]:
        for whole in self._layers[layer]:
            chosen = whole.index_select(0, torch.tensor(rows, device=whole.device))
            yield functional.pad(chosen, (0, 0, 0, capacity - self.capacity))  # cuts what no row has filled

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write one position behind each row; gives the layer's keys and values. k, v: (rows, key heads, dim)."""
        rows, lengths = torch.arange(len(k), device=k.device), self.lengths.to(k.device)
        for whole, new in zip(self._layers[layer], (k, v), strict=True):
            whole[rows, :, lengths] = new
        return self._layers[layer]

    @property
    def capacity(self) -> int:
        return self._layers[0][0].shape[2]


class DecodeStep:
    """One new position behind each row of a cache."""

    wanted: Tensor | None = None

    def __init__(self, cache: RowCache, device: torch.device | None = None) -> None:
        self.cache = cache
        lengths = cache.lengths.to(device or cache.lengths.device)
        columns = torch.arange(cache.capacity, device=lengths.device)
        self._mask = (columns <= lengths[:, None])[:, None, None]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = cast(Cache, self.cache).append(layer, k, v)
        return scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=self._mask, enable_gqa=True).flatten(1)

    last = __call__

    def to(self, device: torch.device) -> "DecodeStep":
        return self if device == self._mask.device else DecodeStep(self.cache, device)


class Tree:
    """Causal rows, and behind them the nodes of one tree for each row: `rows` first, then (rows x nodes) positions.

    A node sees its row, its ancestors and itself. `last` computes for each row its last position, if `nodes` has ROOT,
    and the other `nodes`, in order. parents: of each node, ROOT for the first ones.
    """

    def __init__(self, rows: Rows, parents: Sequence[int], nodes: Sequence[int]) -> None:
        self._causal, self.parents, self.nodes, self._size = Causal(rows), parents, nodes, len(parents)
        sees = ancestors(parents).to(rows.device)
        lengths = torch.tensor(rows.lengths, device=rows.device)
        ends, firsts = lengths.cumsum(0) - 1, len(rows.row) + self._size * torch.arange(rows.count, device=rows.device)
        wanted = [ends if node == ROOT else firsts + node for node in nodes]
        self.wanted: Tensor | None = torch.stack(wanted, 1).flatten()
        prompt = torch.arange(rows.longest, device=rows.device) < lengths[:, None]
        self._mask = self._masks(prompt, sees)
        none = sees.new_zeros(1, self._size)
        self._last = self._masks(prompt, torch.cat([none if n == ROOT else sees[n : n + 1] for n in nodes]))

    @property
    def rows(self) -> Rows:
        return self._causal.rows

    def to(self, device: torch.device) -> "Tree":
        rows = self.rows
        return self if device == rows.device else Tree(Rows(rows.lengths, device), self.parents, self.nodes)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = self.rows
        prompt = len(rows.row)
        first = self._causal(layer, q[:prompt], k[:prompt], v[:prompt])
        return torch.cat([first, self._seen(q[prompt:], k, v, self._mask)]) if self._size else first

    def last(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._seen(q, k, v, self._last)

    def _seen(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """The output of (rows x queries) queries that see what `mask` says of (row's positions, nodes)."""
        rows = self.rows
        k, v = self._side_by_side(k), self._side_by_side(v)
        q = q.view(rows.count, -1, *q.shape[1:]).transpose(1, 2)
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2).reshape(q.shape[0] * q.shape[2], -1)

    def _side_by_side(self, x: Tensor) -> Tensor:
        rows = self.rows
        nodes = x[len(rows.row) :].view(rows.count, self._size, *x.shape[1:]).transpose(1, 2)
        return torch.cat([rows.pad(x[: len(rows.row)]), nodes], 2)

    @staticmethod
    def _masks(prompt: Tensor, tree: Tensor) -> Tensor:
        shape = len(prompt), len(tree)
        parts = prompt[:, None].expand(*shape, -1), tree[None].expand(*shape, -1)
        return torch.cat(parts, 2)[:, None]


def ancestors(parents: Sequence[int]) -> Tensor:
    """(nodes, nodes) True where the second is the first one's ancestor or itself."""
    sees = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent != ROOT:
            sees[node] |= sees[parent]
    return sees
