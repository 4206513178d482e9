"""Every choice in one forward pass: the trie's nodes appended to the prompt, each seeing its own path.

A node sees the prompt, its ancestors and itself, and stands at the position its depth gives it. Knows no choices as
text and no clients.
"""

from collections.abc import Sequence

import numpy as np
import tinker
import torch
from torch import Tensor

from vlm.labels import Edge, Trie
from vlm.local.attention import Tree
from vlm.local.batch import Batch, groups, length_of
from vlm.local.engine import LOGITS, Engine, Snapshot
from vlm.local.text import Positions

ROWS = 64  # prompts in one pass
POSITIONS = 1 << 15  # of prompts and nodes in one pass
MASK = 1 << 26  # numbers in the mask of one pass


@torch.no_grad()
def score_tree(engine: Engine, snapshot: Snapshot, prompts: Sequence[tinker.ModelInput], trie: Trie) -> np.ndarray:
    """(prompts, edges) float32: log-probability of each edge, among its siblings if the trie is restricted."""
    scores = np.empty((len(prompts), len(trie.edges)), np.float32)
    size = len(trie.tokens)
    lengths = [length_of(prompt) + size for prompt in prompts]
    rows = min(ROWS, MASK // (max(1, size) * max(lengths, default=1)))
    for members in groups(lengths, max(1, rows), POSITIONS):
        scores[members] = _score(engine, snapshot, [prompts[n] for n in members], trie).cpu().numpy()
    return scores


def _score(engine: Engine, snapshot: Snapshot, prompts: Sequence[tinker.ModelInput], trie: Trie) -> Tensor:
    batch = engine.collate(prompts, snapshot.factors)
    nodes = sorted({edge.node for edge in trie.edges})  # ROOT is the first
    tree = Tree(batch.rows, trie.parents, nodes)
    states = engine.model.text.hidden(_with_nodes(batch, trie), tree, snapshot.factors, tree.wanted)
    states = states.view(len(prompts), len(nodes), -1)
    scores = torch.empty(len(prompts), len(trie.edges))
    most = max(1, LOGITS // engine.model.vocabulary)  # states whose logits may be in memory together
    for first in range(0, len(nodes), most):
        some = nodes[first : first + most]
        edges = [n for n, edge in enumerate(trie.edges) if edge.node in set(some)]
        for start in range(0, len(prompts), step := max(1, most // len(some))):
            part = states[start : start + step, first : first + most]
            logits = engine.model.text.logits(part.flatten(0, 1), snapshot.factors).view(*part.shape[:2], -1)
            scores[start : start + step, edges] = _edges(logits, some, trie, [trie.edges[n] for n in edges]).cpu()
    return scores


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


def _edges(logits: Tensor, nodes: Sequence[int], trie: Trie, edges: Sequence[Edge]) -> Tensor:
    """(rows, edges) log-probabilities of the edges that leave from `nodes`, from (rows, nodes, vocabulary) logits."""
    column = {node: n for n, node in enumerate(nodes)}
    tokens = torch.tensor([edge.token for edge in edges], device=logits.device)
    at = torch.tensor([column[edge.node] for edge in edges], device=logits.device)
    if trie.children:
        totals = [logits[:, column[node], list(trie.children[node])].logsumexp(-1) for node in nodes]
    else:
        totals = [logits[:, column[node]].logsumexp(-1) for node in nodes]
    return logits[:, at, tokens] - torch.stack(totals, 1)[:, at]
