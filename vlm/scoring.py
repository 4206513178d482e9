"""`score_choices`: the exact distribution over a closed list of answers, on any service.

The local engine scores the whole trie in one forward pass. Every other service is asked through the SDK's
`sample(..., target_prompt_logprobs=...)`, path by path: the same numbers, more requests. It never samples instead.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tinker
from tinker import types

from kshot.errors import NotFiniteError
from vlm import label_trie
from vlm.inputs import model_input
from vlm.service import SamplingClient


@runtime_checkable
class TreeScorer(Protocol):
    """A sampling client that can score a trie in one pass."""

    def score_tree(self, prompts: Sequence[tinker.ModelInput], trie: label_trie.Trie) -> np.ndarray:
        """(prompts, edges) log-probabilities, each softmax over the edge's siblings or the whole vocabulary."""


def score_choices(
    sampler: SamplingClient,
    prompts: Sequence[tinker.ModelInput],
    choices: Sequence[Sequence[int]],
    method: str = "constrained",
) -> np.ndarray:
    """(prompts, choices) float32 log-probabilities of each choice's tokens after each prompt.

    "constrained": the model restricted to the choices, each row sums to 1. "likelihood": the full sequence
    likelihood log P(tokens | prompt), rows do not sum to 1. Raises PromptError for choices that cannot be told apart,
    NotFiniteError for a model that gives NaN.
    """
    return _scored(sampler, prompts, label_trie.build(choices, method))[0]


def score_and_decode(
    sampler: SamplingClient, prompts: Sequence[tinker.ModelInput], choices: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """The constrained scores, and from the same pass (prompts,) the choice that token-by-token constrained decoding
    writes after each prompt (see `label_trie.greedy`). Raises as `score_choices` does."""
    trie = label_trie.build(choices, "constrained")
    scores, edges = _scored(sampler, prompts, trie)
    return scores, label_trie.greedy(trie, edges)


def _scored(
    sampler: SamplingClient, prompts: Sequence[tinker.ModelInput], trie: label_trie.Trie
) -> tuple[np.ndarray, np.ndarray]:
    """(prompts, choices) float32 scores, and the (prompts, edges) log-probabilities whose sums they are."""
    with np.errstate(invalid="ignore", over="ignore"):  # of NaN and Inf, which are refused here
        edges = sampler.score_tree(prompts, trie) if isinstance(sampler, TreeScorer) else _paths(sampler, prompts, trie)
        choice, edge = np.array(trie.pairs).T
        sums = np.zeros((len(edges), choice.max() + 1), np.float64)
        np.add.at(sums.T, choice, edges.T[edge])
        scores = sums.astype(np.float32)  # which may be beyond them, where the edges are not
    if not (np.isfinite(edges).all() and np.isfinite(scores).all()):
        raise NotFiniteError(sampler.get_base_model(), "scores", trained=True)
    return scores, edges


def _paths(sampler: SamplingClient, prompts: Sequence[tinker.ModelInput], trie: label_trie.Trie) -> np.ndarray:
    """The edges' log-probabilities, a request for each node that edges leave from."""
    children = {node: [trie.edges[number].token for number in each] for node, each in trie.siblings.items()}
    futures = [
        [_request(sampler, prompt, trie.path(node), tokens) for node, tokens in children.items()] for prompt in prompts
    ]
    scores = np.zeros((len(prompts), len(trie.edges)))
    for row, requested in zip(scores, futures, strict=True):
        for each, future in zip(trie.siblings.values(), requested, strict=True):
            values = future.result().target_prompt_logprobs.to_numpy()[-1].astype(np.float64)
            row[each] = values - np.logaddexp.reduce(values) if trie.restricted else values
    return scores


def _request(sampler: SamplingClient, prompt: tinker.ModelInput, path: list[int], tokens: list[int]) -> Any:
    """Log-probabilities of the children of a node: the prompt, its path and any child to score it at."""
    full = model_input(*prompt.chunks, [*path, tokens[0]])
    ids = np.full((full.length - 1, len(tokens)), -1, np.int64)
    ids[-1] = tokens
    target = types.TensorData(data=ids, dtype="int64", shape=list(ids.shape))
    return sampler.sample(full, 1, types.SamplingParams(max_tokens=1), target_prompt_logprobs=target)
