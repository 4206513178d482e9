"""Tokens → text, token by token: whole characters only, and nothing that a stop string may still cut off.

Tokens are pieces of UTF-8 (byte-level BPE, as all Qwen tokenizers are); what is no UTF-8
becomes U+FFFD, just as the tokenizer's own `decode` writes it.
"""

import codecs
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tinker import types

from vlm.local.clients import StopSearch

TopTokens = Sequence[tuple[int, float]]  # token ids and log-probabilities, likeliest first


@dataclass(frozen=True)
class Token:
    """A token of a text. start: how many characters of the text are complete before it. log_prob, top: None where the
    model says nothing, as about the first token of a prompt."""

    id: int
    log_prob: float | None
    top: TopTokens | None
    start: int


@dataclass(frozen=True)
class Vocabulary:
    """The bytes of each token of a tokenizer."""

    tokenizer: Any
    cache: dict[int, bytes] = field(default_factory=dict, compare=False, repr=False)

    def data(self, token: int) -> bytes:
        """The token's bytes; none where the tokenizer has no such token, as of rows that pad a model's vocabulary."""
        if token not in self.cache:
            text = self.tokenizer.convert_ids_to_tokens(token) or ""
            table = _bytes()
            is_bytes = all(sign in table for sign in text)  # a special token may be written as it is
            self.cache[token] = bytes(table[sign] for sign in text) if is_bytes else text.encode()
        return self.cache[token]

    def name(self, token: int) -> str:
        """The token as text; a part of a character as OpenAI writes it: bytes:\\xe2\\x98."""
        data = self.data(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@cache
def _bytes() -> dict[str, int]:
    """The sign that stands for each byte in a byte-level vocabulary → the byte."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {sign: byte for byte, sign in bytes_to_unicode().items()}


class DecodedText:
    """A text that grows by tokens. stops, ends: texts and tokens that end it and are no part of it. reason: why it has
    ended, or None."""

    def __init__(self, vocabulary: Vocabulary, stops: Sequence[str] = (), ends: Collection[int] = ()) -> None:
        self._vocabulary, self._ends = vocabulary, ends
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._search, self._cut = StopSearch(stops), False
        self._parts, self._start = list[str](), 0  # the text that was not taken yet, and what was before it
        self._length = 0  # characters of the whole
        self._tokens = deque[Token]()
        self.reason: types.StopReason | None = None

    def add(
        self,
        token: int,
        log_prob: float | None = None,
        top: TopTokens | None = None,
        reason: types.StopReason | None = None,
    ) -> None:
        """Append a token, unless the text has ended; reason: why it is the last one."""
        if self.reason is None:
            if not (reason == "stop" and token in self._ends):
                self._tokens.append(Token(token, log_prob, top, self._length))
                self._append(self._decoder.decode(self._vocabulary.data(token)))
            if reason or self._cut:
                self.finish(reason or "stop")

    def add_all(self, sequence: types.SampledSequence) -> None:
        """Append all tokens of a sequence."""
        count = len(sequence.tokens)
        top: Sequence[TopTokens | None] = sequence.topk_logprobs or [None] * count
        reasons = [*[None] * (count - 1), sequence.stop_reason]
        for each in zip(sequence.tokens, sequence.logprobs or (), top, reasons, strict=True):
            self.add(*each)

    def finish(self, reason: types.StopReason) -> None:
        """End it, unless it has ended: what was held back belongs to it, if it has no stop string."""
        if self.reason is None:
            if not self._cut:
                self._append(self._decoder.decode(b"", final=True))
            self.reason = "stop" if self._cut else reason

    def take(self) -> tuple[str, list[Token]]:
        """The text that is certain and was not taken before, and the tokens that begin in it."""
        ready = max(self._start, self._length - (0 if self.reason else self._search.held))
        whole, size = "".join(self._parts), ready - self._start
        text, self._parts, self._start = whole[:size], [whole[size:]], ready
        tokens = list[Token]()
        while self._tokens and (self._tokens[0].start < ready or (self.reason and not self._cut)):
            tokens.append(self._tokens.popleft())
        return text, tokens

    def _append(self, more: str) -> None:
        """Cut at the first of the stop strings that the text now holds: nothing of it was taken."""
        start = self._search.add(more)
        self._parts.append(more)
        if start is not None:
            whole, self._cut = "".join(self._parts), True
            self._parts = [whole[: len(whole) - len(more) + start]]
        self._length = self._start + len(self._parts[0]) if self._cut else self._length + len(more)
