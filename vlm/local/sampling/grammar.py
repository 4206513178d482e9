"""Grammars that samples follow: before each token, which ones may come next. The work is llguidance's.

A grammar is compiled once, on any thread; each sequence goes its own way through a copy of it.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kshot.errors import RequestError

LEXER_STATES = 50_000  # of one grammar, 1 to 2 KB each


class Grammar:
    """A compiled grammar, in llguidance's form of Lark, over the tokens of a tokenizer.

    vocabulary: how many logits the model gives. ends: the tokens that may end a sample where the grammar allows an end.
    source: these and the text.
    Raises RequestError with the library's reason for a grammar that it refuses. It has limits of its own for the size
    of grammars and for the work of a step.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: Sequence[int], text: str) -> None:
        from llguidance import LLMatcher, LLParserLimits

        self.vocabulary, self.source = vocabulary, (tuple(ends), text)
        limits = LLParserLimits(max_lexer_states=LEXER_STATES, verbose_errors=False)
        self._matcher = LLMatcher(_tokenizer(tokenizer, vocabulary, tuple(ends)), text, log_level=0, limits=limits)
        self._matcher.compute_bitmask()  # finds what has no answer at all
        if self._matcher.is_error():
            raise RequestError(f"the schema cannot be followed: {_line(self._matcher.get_error())}")

    def walk(self) -> "Walk":
        """The state of a sequence that has no token yet."""
        return Walk(self._matcher.deep_copy(), self.vocabulary)


class Walk:
    """A sequence's way through a grammar. ended: whether nothing but an end may follow. error: why it cannot go on."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary
        self.ended, self.error = False, ""

    def allowed(self) -> Tensor:
        """(vocabulary,) whether a token may come next."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return torch.from_numpy(np.unpackbits(bits, count=self._vocabulary, bitorder="little").view(np.bool_))

    def append(self, token: int) -> None:
        """Go on by a token."""
        self._matcher.consume_token(token)
        if self._matcher.is_error():  # also what `allowed` met: a limit of the library
            self.error = _line(self._matcher.get_error())
        self.ended = self._matcher.is_stopped()


@lru_cache(maxsize=8)
def _tokenizer(tokenizer: Any, vocabulary: int, ends: tuple[int, ...]) -> Any:
    """The library's own form of a tokenizer: seconds of work for a large vocabulary."""
    from llguidance.hf import from_tokenizer

    return from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=list(ends))


def _line(error: str) -> str:
    """The library's reason on one line, without the grammar around it."""
    reason = re.split(r"\n +\d+ \| |\n<", error)[0].rpartition("failed to compile JSON schema: ")[2]
    return "no text does" if reason.startswith("NoExtension") else " ".join(reason.split())[:300]
