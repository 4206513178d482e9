"""Every choice in one forward pass: the trie's nodes appended to the prompt under a tree attention mask.

A node sees the prompt, its ancestors and itself, and stands at the position its depth gives it. Knows no choices as
text and no clients.
"""

from collections.abc import Sequence

import numpy as np
import tinker
import torch
from torch import Tensor

from vlm.labels import ROOT, Trie
from vlm.local.batch import Batch, run
from vlm.local.engine import Engine, Snapshot
from vlm.local.sampling import groups

LOGITS = 1 << 27  # float32 numbers the head may hold at once: half a gigabyte


@torch.no_grad()
def score_tree(engine: Engine, snapshot: Snapshot, prompts: Sequence[tinker.ModelInput], trie: Trie) -> np.ndarray:
    """(prompts, edges) float32: log-probability of each edge, among its siblings if the trie is restricted."""
    engine.use(snapshot)
    scores = np.empty((len(prompts), len(trie.edges)), np.float32)
    for members in groups(prompts):
        batch = engine.collate([prompts[n] for n in members])
        scores[members] = _score_group(engine, batch, trie).cpu().numpy()
    return scores


def _score_group(engine: Engine, batch: Batch, trie: Trie) -> Tensor:
    rows, length = batch.ids.shape
    device = batch.ids.device
    tokens = torch.tensor(trie.tokens, dtype=torch.long, device=device).expand(rows, -1)
    depths = torch.tensor(trie.depths, dtype=torch.long, device=device)
    after = batch.next_position()[:, None] + depths
    hidden = run(
        engine.model,
        torch.cat([batch.ids, tokens], 1),
        torch.cat([batch.positions, after.expand(3, -1, -1)], 2),
        batch.images,
        mask=tree_mask(length, trie.parents).to(device, engine.model.stock.dtype) if trie.tokens else None,
    )
    nodes = sorted({edge.node for edge in trie.edges})
    states = hidden[:, [length + node for node in nodes]]  # ROOT is -1: the prompt's last position
    step = max(1, LOGITS // (len(nodes) * engine.model.stock.config.text_config.vocab_size))
    return torch.cat([_edges(engine.head(part), nodes, trie) for part in states.split(step)])


def tree_mask(length: int, parents: Sequence[int]) -> Tensor:
    """(1, 1, n, n) additive mask for a prompt of `length` tokens followed by the nodes of a tree."""
    size = length + len(parents)
    seen = torch.ones(size, size, dtype=torch.bool).tril()
    seen[length:, length:] = False
    for node, parent in enumerate(parents):
        if parent != ROOT:
            seen[length + node, length:] = seen[length + parent, length:]
        seen[length + node, length + node] = True
    return torch.zeros(size, size).masked_fill(~seen, float("-inf"))[None, None]


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
