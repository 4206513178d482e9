"""The label trie: a closed list of answers as one tree of tokens.

Under a model restricted to the tree, a token whose node has one child has probability 1. So P(choice | prompt) is the
product, over the *branching* nodes of its path, of a softmax over that node's children (`constrained`); the true
sequence likelihood is the product over every node of a softmax over the whole vocabulary (`likelihood`). Either needs
each node once, not once per choice. No choice may be a prefix of another: the end token sees to that.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, pairwise

import numpy as np

from kshot.errors import PromptError

ROOT = -1  # the last position of the prompt


@dataclass(frozen=True)
class Branch:
    """A token of a choice at which others part from it: its position there, and which tokens may stand at it."""

    position: int
    candidates: tuple[int, ...]


@dataclass(frozen=True)
class Edge:
    """A step that carries probability: from `node` (an index into `Trie.tokens`, or ROOT) to the child `token`."""

    node: int
    token: int


@dataclass(frozen=True)
class Trie:
    """The nodes a model must see, in an order in which parents come first, and the edges each choice's score sums.

    tokens, parents, depths: one entry a node; depth 0 follows the prompt directly; a parent may be ROOT.
    edges: those whose log-probability enters a score. pairs: (choice, edge index).
    restricted: whether a softmax is over a node's edges alone, not over the whole vocabulary.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)
    pairs: list[tuple[int, int]] = field(default_factory=list)
    restricted: bool = True

    @cached_property
    def siblings(self) -> dict[int, list[int]]:
        """node → the numbers of the edges that leave from it, for each node that has any, in rising order."""
        by_node = sorted(enumerate(self.edges), key=lambda each: each[1].node)
        return {node: [n for n, _ in each] for node, each in groupby(by_node, key=lambda each: each[1].node)}

    def path(self, node: int) -> list[int]:
        """The tokens from the prompt's end to and with `node`."""
        return [] if node == ROOT else [*self.path(self.parents[node]), self.tokens[node]]


def build(choices: Sequence[Sequence[int]], method: str) -> Trie:
    """The trie of `choices` (token ids, end token included) for method "constrained" or "likelihood".

    Raises PromptError for fewer than two choices, an empty one, duplicates and prefixes, and an unknown method.
    """
    check(choices)
    if method not in ("constrained", "likelihood"):
        raise PromptError(f"unknown scoring method {method!r}; choose from: constrained, likelihood")
    children = _children(choices)
    restricted = method == "constrained"
    scored = {path for path, tokens in children.items() if len(tokens) > 1 or not restricted}
    needed = sorted({p[:n] for p in scored for n in range(1, len(p) + 1)}, key=lambda p: (len(p), p))
    index = {(): ROOT, **{p: i for i, p in enumerate(needed)}}
    trie = Trie(
        tokens=[p[-1] for p in needed],
        parents=[index[p[:-1]] for p in needed],
        depths=[len(p) - 1 for p in needed],
        restricted=restricted,
    )
    edges: dict[Edge, int] = {}
    for number, choice in enumerate(map(tuple, choices)):
        steps = [Edge(index[choice[:n]], choice[n]) for n in range(len(choice)) if choice[:n] in scored]
        trie.pairs.extend((number, edges.setdefault(step, len(edges))) for step in steps)
    trie.edges.extend(edges)
    return trie


def branches(choices: Sequence[Sequence[int]]) -> tuple[tuple[Branch, ...], ...]:
    """choice → its branches, from the first on: log P(choice) of `constrained` is the sum over them of the token's
    log-probability among the candidates. Raises PromptError as `build` does."""
    check(choices)
    children = _children(choices)
    return tuple(
        tuple(Branch(n, among) for n in range(len(c)) if len(among := children[tuple(c[:n])]) > 1) for c in choices
    )


def greedy(trie: Trie, edges: np.ndarray) -> np.ndarray:
    """(rows,) choices that are written by always taking the likeliest child, from the (rows, edges) log-probabilities
    of a `constrained` trie: what token-by-token constrained decoding gives. Not always the likeliest choice: a node
    may be likelier than any other and its best leaf not. Ties go to the lower token."""
    likeliest = np.zeros(edges.shape, bool)
    for siblings in trie.siblings.values():
        numbers = sorted(siblings, key=lambda number: trie.edges[number].token)
        likeliest[np.arange(len(edges)), np.array(numbers)[edges[:, numbers].argmax(1)]] = True
    choice, edge_of = np.array(trie.pairs).T
    written = np.ones((len(edges), choice.max() + 1), bool)
    np.logical_and.at(written.T, choice, likeliest.T[edge_of])
    return written.argmax(1)


def check(choices: Sequence[Sequence[int]]) -> None:
    """Raise PromptError unless the choices are two or more, distinct, and none is a prefix of another."""
    if len(choices) < 2:
        raise PromptError(f"{len(choices)} choice(s) given; a choice needs at least two")
    ordered = sorted((tuple(choice), number) for number, choice in enumerate(choices))
    for (first, a), (second, b) in pairwise(ordered):
        if second[: len(first)] == first:
            kind = "equals" if first == second else "is a prefix of"
            raise PromptError(f"choice {a} {kind} choice {b} in tokens; give distinct names, each with its end token")


def _children(choices: Sequence[Sequence[int]]) -> dict[tuple[int, ...], tuple[int, ...]]:
    children: dict[tuple[int, ...], set[int]] = {}
    for choice in choices:
        for n in range(len(choice)):
            children.setdefault(tuple(choice[:n]), set()).add(choice[n])
    return {path: tuple(sorted(tokens)) for path, tokens in children.items()}
