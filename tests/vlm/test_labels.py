"""The label trie and the scores it gives, against a toy language model written in numpy."""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import tinker
from hypothesis import given, settings
from hypothesis import strategies as st
from tinker import types

from kshot.errors import PromptError
from vlm.label_trie import ROOT, build, greedy
from vlm.scoring import score_and_decode, score_choices

VOCABULARY = 7
END = 6


class ToyModel:
    """Next-token distributions that depend on the last two tokens; answers the SDK's `sample` for given targets."""

    def __init__(self, seed: int) -> None:
        logits = np.random.default_rng(seed).normal(size=(VOCABULARY, VOCABULARY, VOCABULARY)) * 2
        self.table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        self.requests = 0

    def next(self, tokens: Sequence[int]) -> np.ndarray:
        distribution: np.ndarray = self.table[tokens[-2], tokens[-1]]
        return distribution

    def sample(self, prompt: tinker.ModelInput, n: int, params: Any, **asked: Any) -> Any:
        self.requests += 1
        tokens, target = prompt.to_ints(), asked["target_prompt_logprobs"].to_numpy()
        values = np.zeros(target.shape, np.float32)
        for row, ids in enumerate(target):
            for column, token in enumerate(ids):
                if token >= 0:
                    values[row, column] = self.next(tokens[: row + 1])[token]
        done: Future[types.SampleResponse] = Future()
        done.set_result(types.SampleResponse(sequences=[], target_prompt_logprobs=types.TensorData.from_numpy(values)))
        return done

    def scores(self, prompt: Sequence[int], choices: Sequence[Sequence[int]]) -> np.ndarray:
        """(2, choices) log P(choice | prompt) of the model, and of one that may only write a choice: by brute force."""
        totals = np.zeros((2, len(choices)))
        for number, choice in enumerate(choices):
            for depth, token in enumerate(choice):
                allowed = sorted({c[depth] for c in choices if c[:depth] == choice[:depth]})
                values = self.next([*prompt, *choice[:depth]])
                totals[:, number] += values[token], values[token] - np.log(np.exp(values[allowed]).sum())
        return totals


choices_of = st.lists(st.lists(st.integers(0, 5), min_size=0, max_size=5), min_size=2, max_size=12, unique_by=tuple)


@settings(deadline=None)
@given(choices_of, st.integers(0, 5))
def test_both_scores_equal_brute_force(names: list[list[int]], seed: int) -> None:
    model, prompt = ToyModel(seed), [1, 2, 3]
    choices = [(*name, END) for name in names]
    asked, (likelihood, restricted) = [tinker.ModelInput.from_ints(prompt)], model.scores(prompt, choices)
    constrained = score_choices(model, asked, choices)
    assert constrained[0] == pytest.approx(restricted, abs=1e-5)
    assert np.exp(constrained).sum() == pytest.approx(1.0)
    assert score_choices(model, asked, choices, "likelihood")[0] == pytest.approx(likelihood, abs=1e-4)


@settings(deadline=None)
@given(choices_of, st.integers(0, 5))
def test_greedy_writes_the_likeliest_token_that_begins_a_choice(names: list[list[int]], seed: int) -> None:
    model, prompt = ToyModel(seed), [1, 2, 3]
    choices = [(*name, END) for name in names]
    written: tuple[int, ...] = ()
    while written not in choices:
        allowed = sorted({c[len(written)] for c in choices if c[: len(written)] == written})
        values = model.next([*prompt, *written])
        written = (*written, max(allowed, key=lambda token: values[token]))
    scores, got = score_and_decode(model, [tinker.ModelInput.from_ints(prompt)] * 2, choices)
    assert scores == pytest.approx(score_choices(model, [tinker.ModelInput.from_ints(prompt)] * 2, choices))
    assert got.tolist() == [choices.index(written)] * 2


def test_greedy_may_miss_the_likeliest_choice() -> None:
    trie = build([(1, 3, END), (1, 4, END), (2, END)], "constrained")
    edges = {1: 0.6, 2: 0.4, 3: 0.5, 4: 0.5}
    log_probs = np.log([[edges[edge.token] for edge in trie.edges]])
    assert greedy(trie, log_probs).tolist() == [0]  # 0.3, while the last choice has 0.4
    assert greedy(trie, np.zeros((0, len(trie.edges)))).tolist() == []


@settings(deadline=None)
@given(choices_of)
def test_the_trie_holds_each_node_once_and_parents_first(names: list[list[int]]) -> None:
    choices = [(*name, END) for name in names]
    for method in ("constrained", "likelihood"):
        trie = build(choices, method)
        paths = [tuple(trie.path(node)) for node in range(len(trie.tokens))]
        assert len(set(paths)) == len(paths)
        assert all(parent < node for node, parent in enumerate(trie.parents))
        assert [len(path) - 1 for path in paths] == trie.depths
        prefixes = {c[:n] for c in choices for n in range(1, len(c))}
        assert set(paths) <= prefixes
        assert method == "constrained" or set(paths) == prefixes


def test_only_branching_needs_tokens() -> None:
    crocodile, crocodile_head, star = (3, 4, 5, END), (3, 4, 5, 1, END), (2, END)
    assert build([(1, END), (2, END), (3, END)], "constrained").tokens == []  # told apart at the first token
    trie = build([crocodile, crocodile_head, star], "constrained")
    assert trie.tokens == [3, 4, 5]  # up to where the crocodiles part
    assert trie.parents == [ROOT, 0, 1]
    tokens = {node: {trie.edges[number].token for number in numbers} for node, numbers in trie.siblings.items()}
    assert tokens == {ROOT: {2, 3}, 2: {1, END}}


def test_one_request_a_branching_node() -> None:
    model = ToyModel(0)
    score_choices(model, [tinker.ModelInput.from_ints([1, 2])] * 3, [(3, 4, END), (3, 5, END), (2, END)])
    assert model.requests == 3 * 2


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([(1, 2), (1, 2)], "equals"),
        ([(1, 2, 3), (1, 2)], "prefix"),
        ([(1, 2)], "at least two"),
        ([(), (1,)], "prefix"),
    ],
)
def test_choices_that_cannot_be_told_apart_are_refused(choices: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        build(choices, "constrained")


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(PromptError, match="constrained, likelihood"):
        build([(1,), (2,)], "guess")
