"""Every choice in one forward pass: the trie's nodes appended to the prompt, each seeing its own path.

A node sees the prompt, its ancestors and itself, and stands at the position its depth gives it. Knows no choices as
text and no clients.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import tinker
import torch
from torch import Tensor

from vlm.labels import Trie
from vlm.local.attention import Tree
from vlm.local.batch import Batch
from vlm.local.engine import LOGITS, Engine, Snapshot
from vlm.local.text import Positions

ROWS = 64  # prompts in one pass


@torch.no_grad()
def score_tree(engine: Engine, snapshot: Snapshot, prompts: Sequence[tinker.ModelInput], trie: Trie) -> np.ndarray:
    """(prompts, edges) float32: log-probability of each edge, among its siblings if the trie is restricted."""
    parts = [_score(engine, snapshot, together, trie).cpu().numpy() for together in _passes(prompts)]
    return np.concatenate(parts) if parts else np.empty((0, len(trie.edges)), np.float32)


def _passes(prompts: Sequence[tinker.ModelInput]) -> Iterator[Sequence[tinker.ModelInput]]:
    return (prompts[start : start + ROWS] for start in range(0, len(prompts), ROWS))


def _score(engine: Engine, snapshot: Snapshot, prompts: Sequence[tinker.ModelInput], trie: Trie) -> Tensor:
    batch = engine.collate(prompts, snapshot.factors)
    nodes = sorted({edge.node for edge in trie.edges})  # ROOT is the first
    tree = Tree(batch.rows, trie.parents, nodes)
    states = engine.model.text.hidden(_with_nodes(batch, trie), tree, snapshot.factors, tree.wanted)
    states = states.view(len(prompts), len(nodes), -1)
    step = max(1, LOGITS // (len(nodes) * engine.model.vocabulary))
    logits = (engine.model.text.logits(part.flatten(0, 1), snapshot.factors) for part in states.split(step))
    return torch.cat([_edges(part.view(-1, len(nodes), part.shape[-1]), nodes, trie) for part in logits])


def _with_nodes(batch: Batch, trie: Trie) -> Positions:
    """The batch's positions, and behind them the nodes of each row."""
    given, device = batch.given, batch.given.ids.device
    tokens = torch.tensor(trie.tokens, dtype=torch.long, device=device).repeat(batch.rows.count)
    after = batch.next_place[:, None] + torch.tensor(trie.depths, dtype=torch.long, device=device)
    return Positions(
        torch.cat([given.ids, tokens]),
        torch.cat([given.places, after.flatten().expand(3, -1)], 1),
        given.images,
        given.embeds,
        given.deepstack,
    )


def _edges(logits: Tensor, nodes: Sequence[int], trie: Trie) -> Tensor:
    """(rows, edges) log-probabilities from (rows, nodes, vocabulary) logits."""
    column = {node: n for n, node in enumerate(nodes)}
    tokens = torch.tensor([edge.token for edge in trie.edges], device=logits.device)
    at = torch.tensor([column[edge.node] for edge in trie.edges], device=logits.device)
    if trie.children:
        totals = [logits[:, column[node], list(trie.children[node])].logsumexp(-1) for node in nodes]
    else:
        totals = [logits[:, column[node]].logsumexp(-1) for node in nodes]
    return logits[:, at, tokens] - torch.stack(totals, 1)[:, at]
