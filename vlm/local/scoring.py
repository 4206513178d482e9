"""Scores of a label trie in one forward pass, and features of prompts.

The trie's nodes are appended to the prompt. A node sees the prompt, its ancestors and itself, and stands at the
position its depth gives it. The head computes the edges' tokens alone, in float32; the whole vocabulary only where the
softmax is over it.

Features are the vision tower's, averaged over an image, and the text model's last hidden state. The tower's alone need
no pass of the text model, and with a frozen tower they come from the cache of image features.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import cast

import numpy as np
import tinker
import torch
from tinker import types
from torch import Tensor

from kshot.errors import NotFiniteError, RequestError
from vlm.label_trie import Trie
from vlm.local.engine import LOGITS, POSITIONS, ROWS, Batch, Engine, Snapshot, groups, length_of
from vlm.local.model.attention import Causal, Tree
from vlm.local.model.packed import PackedInputs

MASK = 1 << 26  # numbers in the mask of one pass


@torch.no_grad()
def score_tree(engine: Engine, snapshot: Snapshot, prompts: Sequence[tinker.ModelInput], trie: Trie) -> np.ndarray:
    """(prompts, edges) float32: log-probability of each edge, among its siblings if the trie is restricted."""
    scores = np.empty((len(prompts), len(trie.edges)), np.float32)
    size, edges = len(trie.tokens), _Edges(trie)
    lengths = [length_of(prompt) + size for prompt in prompts]
    rows = min(ROWS, MASK // (max(1, size) * max(lengths, default=1)))
    for members in groups(lengths, max(1, rows), POSITIONS):
        scores[members] = _score(engine, snapshot, [prompts[n] for n in members], trie, edges).cpu().numpy()
    return scores


class _Edges:
    """The edges as indices. nodes: those that edges leave from, ROOT first; node, token: (edges,) columns in `nodes`
    and `tokens`."""

    def __init__(self, trie: Trie) -> None:
        nodes, self.node = np.unique([edge.node for edge in trie.edges], return_inverse=True)
        tokens, self.token = np.unique([edge.token for edge in trie.edges], return_inverse=True)
        self.nodes, self.tokens = nodes.tolist(), torch.from_numpy(tokens)

    @cached_property
    def siblings(self) -> Tensor:
        """(nodes, most) the edges that leave from each node, filled up with the number of edges."""
        counts = np.bincount(self.node)
        table = np.full((len(counts), counts.max()), len(self.node))
        order = np.argsort(self.node, kind="stable")
        table[self.node[order], np.arange(len(order)) - np.repeat(counts.cumsum() - counts, counts)] = order
        return torch.from_numpy(table)


def _score(
    engine: Engine, snapshot: Snapshot, prompts: Sequence[tinker.ModelInput], trie: Trie, edges: _Edges
) -> Tensor:
    batch = engine.collate(prompts, snapshot.factors)
    tree = Tree(batch.rows, trie.parents, edges.nodes)
    with engine.model.timed("forward"):
        states = engine.model.text.hidden(_with_nodes(batch, trie), tree, snapshot.factors, tree.wanted)
        values = _values(engine, snapshot, states.view(len(prompts), len(edges.nodes), -1), edges)
    node = torch.from_numpy(edges.node).to(values.device)
    if trie.children:
        padded = torch.nn.functional.pad(values, (0, 1), value=-torch.inf)
        totals = padded[:, edges.siblings.to(values.device)].logsumexp(-1)
    else:
        step = max(1, LOGITS // engine.model.vocabulary)  # states whose logits may be in memory together
        parts = [engine.model.text.logits(part, snapshot.factors).logsumexp(-1) for part in states.split(step)]
        totals = torch.cat(parts).view(len(prompts), -1)
    return values - totals[:, node]


def _values(engine: Engine, snapshot: Snapshot, states: Tensor, edges: _Edges) -> Tensor:
    """(rows, edges) logits of the edges' tokens from (rows, nodes, hidden) states."""
    step = max(1, LOGITS // (len(edges.nodes) * len(edges.tokens)))
    parts = []
    for part in states.split(step):
        logits = engine.model.text.logits(part.flatten(0, 1), snapshot.factors, edges.tokens)
        parts.append(logits.view(*part.shape[:2], -1)[:, edges.node, edges.token])
    return torch.cat(parts)


def _with_nodes(batch: Batch, trie: Trie) -> PackedInputs:
    """The batch's positions, and behind them the nodes of each row."""
    inputs, device = batch.inputs, batch.inputs.ids.device
    tokens = torch.tensor(trie.tokens, dtype=torch.long, device=device).repeat(batch.rows.count)
    after = batch.next_position[:, None] + torch.tensor(trie.depths, dtype=torch.long, device=device)
    position_ids = torch.cat([inputs.position_ids, after.flatten().expand(3, -1)], 1)
    return replace(inputs, ids=torch.cat([inputs.ids, tokens]), position_ids=position_ids)


@torch.no_grad()
def embed(
    engine: Engine, snapshot: Snapshot, prompts: Sequence[tinker.ModelInput], *, tower: bool, hidden: bool
) -> np.ndarray:
    """(prompts, D) float32: see `vlm.embedding.embed`. Raises RequestError for a prompt that is not of one image, if
    `tower`; NotFiniteError."""
    if tower:
        _check(prompts)
    parts = [part for part, wanted in ((_tower, tower), (_hidden, hidden)) if wanted]
    width = engine.model.stock.config.text_config.hidden_size
    features = np.empty((len(prompts), len(parts), width), np.float32)
    for members in groups([length_of(prompt) for prompt in prompts], ROWS, POSITIONS):
        batch = engine.collate([prompts[n] for n in members], snapshot.factors)
        for number, part in enumerate(parts):
            features[members, number] = part(engine, snapshot, batch).float().cpu().numpy()
    if not np.isfinite(features).all():
        raise NotFiniteError(engine.model.name, "features")
    return features.reshape(len(prompts), len(parts) * width)


def _check(prompts: Sequence[tinker.ModelInput]) -> None:
    for number, prompt in enumerate(prompts):
        images = sum(isinstance(chunk, types.ImageChunk) for chunk in prompt.chunks)
        if images != 1:
            raise RequestError(
                f"prompt {number} holds {images} images; features of the vision tower are of exactly one, "
                "those of other prompts are 'hidden'"
            )


def _tower(engine: Engine, snapshot: Snapshot, batch: Batch) -> Tensor:
    """(rows, hidden) mean of what stands at the positions of each row's one image. Row by row, so that the digits do
    not depend on the other rows; in float32, since the mean of many bfloat16 numbers has more digits than they have."""
    embeds, positions = cast(Tensor, batch.inputs.embeds), cast(Tensor, batch.inputs.image_positions)  # in every row
    tokens = torch.bincount(batch.rows.row[positions]).tolist()
    return torch.stack([image.float().mean(0) for image in embeds.split(tokens)])


def _hidden(engine: Engine, snapshot: Snapshot, batch: Batch) -> Tensor:
    """(rows, hidden) last hidden state at each row's end."""
    ends = batch.ends
    with engine.model.timed("forward"):
        return engine.model.text.hidden(batch.inputs, Causal(batch.rows, ends), snapshot.factors, ends)
