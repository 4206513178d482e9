"""Scores of a label trie in one forward pass, and features of prompts.

The trie's nodes are appended to the prompt. A node sees the prompt, its ancestors and itself, and stands at the
position its depth gives it. The head computes the edges' tokens alone, in float32; the whole vocabulary only where the
softmax is over it.

Features are the vision tower's, averaged over an image, and the text model's last hidden state. The tower's alone need
no pass of the text model, and with a frozen tower they come from the cache of image features.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import singledispatch
from typing import cast

import numpy as np
import tinker
import torch
from tinker import types
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kshot.errors import NotFiniteError, RequestError
from vlm.label_trie import Trie
from vlm.local.engine import LOGITS, POSITIONS, ROWS, Batch, Between, Engine, Snapshot, length_of
from vlm.local.model.attention import Causal, Tree
from vlm.local.model.packed import PackedInputs
from vlm.local.packs import groups

MASK = 1 << 26  # numbers in the mask of one pass


@singledispatch
def score_tree(
    engine: Engine,
    snapshot: Snapshot,
    prompts: Sequence[tinker.ModelInput],
    trie: Trie,
    *,
    between: Between = lambda last: None,
) -> np.ndarray:
    """(prompts, edges) float32: log-probability of each edge, among its siblings if the trie is restricted.
    Raises NotFiniteError."""
    scores, size = np.empty((len(prompts), len(trie.edges)), np.float32), len(trie.tokens)
    lengths = [length_of(prompt) + size for prompt in prompts]
    rows = min(ROWS, MASK // (max(1, size) * max(lengths, default=1)))
    for number, members in enumerate(groups(lengths, max(1, rows), POSITIONS)):
        if number:
            between(False)
        scores[members] = _score(engine, snapshot, [prompts[n] for n in members], trie).cpu().numpy()
    if not np.isfinite(scores).all():
        raise NotFiniteError(engine.model.name, "scores", snapshot.name if snapshot else "")
    return scores


@torch.no_grad()
def _score(engine: Engine, snapshot: Snapshot, prompts: Sequence[tinker.ModelInput], trie: Trie) -> Tensor:
    """(prompts, edges) in one pass."""
    text, column = engine.model.text, {node: n for n, node in enumerate(trie.siblings)}
    node = torch.tensor([column[edge.node] for edge in trie.edges])
    tokens, token = torch.tensor([edge.token for edge in trie.edges]).unique(return_inverse=True)
    batch = engine.collate(prompts, snapshot)
    tree = Tree(batch.rows, trie.parents, list(column))
    with engine.model.timed("forward"):
        states = text.hidden(_with_nodes(batch, trie), tree, snapshot)
        parts: list[Tensor] = []
        step = max(1, LOGITS // (len(column) * len(tokens)))  # rows whose logits may be in memory together
        for part in states.view(len(prompts), len(column), -1).split(step):
            logits = text.logits(part.flatten(0, 1), snapshot, tokens)
            parts.append(logits.view(len(part), len(column), -1)[:, node, token])
        values = torch.cat(parts)
    if trie.restricted:
        numbers = [torch.tensor(each) for each in trie.siblings.values()]
        siblings = pad_sequence(numbers, batch_first=True, padding_value=len(trie.edges))
        padded = torch.nn.functional.pad(values, (0, 1), value=-torch.inf)
        totals = padded[:, siblings.to(values.device)].logsumexp(-1)
    else:
        step = max(1, LOGITS // engine.model.vocabulary)
        totals = torch.cat([text.logits(part, snapshot).logsumexp(-1) for part in states.split(step)])
        totals = totals.view(len(prompts), -1)
    return values - totals[:, node.to(values.device)]


def _with_nodes(batch: Batch, trie: Trie) -> PackedInputs:
    """The batch's positions, and behind them the nodes of each row."""
    inputs, device = batch.inputs, batch.inputs.ids.device
    tokens = torch.tensor(trie.tokens, dtype=torch.long, device=device).repeat(batch.rows.count)
    after = batch.next_position[:, None] + torch.tensor(trie.depths, dtype=torch.long, device=device)
    position_ids = torch.cat([inputs.position_ids, after.flatten().expand(3, -1)], 1)
    return replace(inputs, ids=torch.cat([inputs.ids, tokens]), position_ids=position_ids)


@singledispatch
@torch.no_grad()
def embed(
    engine: Engine, snapshot: Snapshot, prompts: Sequence[tinker.ModelInput], *, tower: bool, hidden: bool
) -> np.ndarray:
    """(prompts, D) float32: see `vlm.embedding.embed`. Raises RequestError for a prompt that is not of one image, if
    `tower`; NotFiniteError."""
    for number, prompt in enumerate(prompts if tower else ()):
        images = sum(isinstance(chunk, types.ImageChunk) for chunk in prompt.chunks)
        if images != 1:
            raise RequestError(
                f"prompt {number} holds {images} images; features of the vision tower are of exactly one, "
                "those of other prompts are 'hidden'"
            )
    features = np.empty((len(prompts), (tower + hidden) * engine.model.width), np.float32)
    for members in groups([length_of(prompt) for prompt in prompts], ROWS, POSITIONS):
        batch = engine.collate([prompts[n] for n in members], snapshot)
        parts = [_tower(batch)] if tower else []
        if hidden:
            with engine.model.timed("forward"):  # the state at each row's end
                parts.append(engine.model.text.hidden(batch.inputs, Causal(batch.rows, batch.ends), snapshot))
        features[members] = np.concatenate([part.float().cpu().numpy() for part in parts], 1)
    if not np.isfinite(features).all():
        raise NotFiniteError(engine.model.name, "features", snapshot.name if snapshot else "")
    return features


def _tower(batch: Batch) -> Tensor:
    """(rows, hidden) mean of what stands at the positions of each row's one image. Row by row, so that the digits do
    not depend on the other rows; in float32, since the mean of many bfloat16 numbers has more digits than they have."""
    embeds, positions = cast(Tensor, batch.inputs.embeds), cast(Tensor, batch.inputs.image_positions)  # in every row
    tokens = torch.bincount(batch.rows.row[positions]).tolist()
    return torch.stack([image.float().mean(0) for image in embeds.split(tokens)])
