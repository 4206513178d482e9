"""The choice among a few tokens: log-probabilities restricted to candidates, position by position.

`candidates` is a field of a datum, beside those of the Tinker API: (positions, most) int64, the tokens that may stand
at each position, sparse (CSR) or dense with -1 where there is none. Knows no class, and no tree of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tinker
import torch
from torch import Tensor

from kshot_errors import RequestError
from vlm.local.adapter import Factors
from vlm.local.losses import CANDIDATES as FIELD
from vlm.local.text import Text


@dataclass(frozen=True)
class Candidates:
    """One entry a candidate. rows: (n,) which of the scored positions it may stand at; tokens: (n,) its id."""

    rows: np.ndarray
    tokens: np.ndarray


def candidates_of(data: tinker.TensorData, targets: np.ndarray, scored: np.ndarray) -> Candidates:
    """The candidates at the `scored` positions (numbers, rising), of which each one's target must be one.

    targets: (positions,) token ids. Raises RequestError for another shape or type, and where a target is missing.
    """
    if data.dtype != "int64" or data.shape is None or len(data.shape) != 2 or data.shape[0] != len(targets):
        shape = f"{data.dtype} of shape {data.shape}"
        raise RequestError(f"{FIELD} must be int64, a row a position ({len(targets)}), got {shape}")
    positions, tokens = _entries(data)
    kept = np.isin(positions, scored)
    rows, tokens = np.searchsorted(scored, positions[kept]), tokens[kept]
    there = np.zeros(len(scored), bool)
    there[rows[tokens == targets[scored[rows]]]] = True
    if not there.all():
        position = scored[~there][0]
        raise RequestError(
            f"{FIELD} at position {position} do not hold its target {targets[position]}; add it, or set its weight to 0"
        )
    return Candidates(rows, tokens)


def joined(parts: Sequence[Candidates], counts: Sequence[int]) -> Candidates:
    """Those of several data, whose numbers of scored positions are `counts`, as of one."""
    starts = np.cumsum([0, *counts[:-1]])
    rows = [part.rows + start for part, start in zip(parts, starts, strict=True)]
    return Candidates(np.concatenate(rows), np.concatenate([part.tokens for part in parts]))


def log_probs(text: Text, hidden: Tensor, targets: Tensor, candidates: Candidates, factors: Factors | None) -> Tensor:
    """(n,) float32 log-probabilities of the targets at n states (n, hidden), each among its candidates alone."""
    tokens, columns = np.unique(candidates.tokens, return_inverse=True)
    logits = text.logits(hidden, factors, torch.from_numpy(tokens))
    mask = torch.full_like(logits, -torch.inf)
    mask[torch.from_numpy(candidates.rows), torch.from_numpy(columns)] = 0.0
    at = torch.searchsorted(torch.from_numpy(tokens).to(targets.device), targets)
    return (logits + mask).log_softmax(-1).gather(1, at.to(logits.device)[:, None])[:, 0]


def _entries(data: tinker.TensorData) -> tuple[np.ndarray, np.ndarray]:
    """(position, token) of each candidate."""
    if data.sparse_crow_indices is None:
        dense = data.to_numpy()
        positions, columns = np.nonzero(dense >= 0)
        return positions, dense[positions, columns]
    counts, tokens = np.diff(data.sparse_crow_indices), data._numpy
    if len(counts) != (data.shape or [0])[0] or (counts < 0).any() or counts.sum() != len(tokens):
        raise RequestError(f"{FIELD} has row pointers that do not fit its {len(tokens)} values")
    return np.repeat(np.arange(len(counts)), counts), tokens
