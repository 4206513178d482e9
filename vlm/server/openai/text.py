"""Tokens → text as they come: whole characters only, and nothing that a stop string may still take back.

Knows no model and no HTTP. Tokens are pieces of UTF-8 (byte-level BPE, as all Qwen tokenizers are); what is no UTF-8
becomes U+FFFD, just as the tokenizer's own `decode` writes it.
"""

import codecs
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tinker import types

Tops = Sequence[tuple[int, float]]  # token ids and log-probabilities, likeliest first


@dataclass(frozen=True)
class Token:
    """A token of a text. start: how many characters of the text are complete before it. log_prob, tops: None where the
    model says nothing, as about the first token of a prompt."""

    id: int
    log_prob: float | None
    tops: Tops | None
    start: int


@dataclass(frozen=True)
class Alphabet:
    """What each token of a tokenizer writes."""

    tokenizer: Any
    known: dict[int, bytes] = field(default_factory=dict, compare=False, repr=False)

    def data(self, token: int) -> bytes:
        """The token's bytes; none where the tokenizer has no such token, as of rows that pad a model's vocabulary."""
        if token not in self.known:
            piece = self.tokenizer.convert_ids_to_tokens(token) or ""
            table = _bytes()
            whole = all(sign in table for sign in piece)  # a special token may be written as it is
            self.known[token] = bytes(table[sign] for sign in piece) if whole else piece.encode()
        return self.known[token]

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


class Text:
    """A text that grows by tokens. stops: texts that end it and are no part of it. stopped: whether one has."""

    def __init__(self, alphabet: Alphabet, stops: Sequence[str] = ()) -> None:
        self._alphabet, self._stops = alphabet, stops
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text, self._taken = "", 0
        self._tokens = deque[Token]()
        self.stopped, self._ended = False, False

    def push(self, token: int, log_prob: float | None = None, tops: Tops | None = None) -> None:
        """Append a token, unless the text has been stopped."""
        if not self.stopped:
            self._tokens.append(Token(token, log_prob, tops, len(self._text)))
            self._append(self._decoder.decode(self._alphabet.data(token)))

    def end(self) -> None:
        """Nothing follows: what was held back is text, if it holds no stop string."""
        self._ended = True
        if not self.stopped:
            self._append(self._decoder.decode(b"", final=True))

    def take(self) -> tuple[str, list[Token]]:
        """What is certain and was not taken before: text, and the tokens that begin in what is taken."""
        ready = len(self._text) - (0 if self._ended or self.stopped else self._held())
        text, self._taken = self._text[self._taken : ready], max(self._taken, ready)
        tokens = list[Token]()
        while self._tokens and (self._tokens[0].start < ready or (self._ended and not self.stopped)):
            tokens.append(self._tokens.popleft())
        return text, tokens

    def _append(self, more: str) -> None:
        """Cut at the first of the stop strings that the text now holds."""
        before = len(self._text)
        self._text += more
        found = [self._text.find(stop, max(0, before - len(stop) + 1)) for stop in self._stops]
        if cuts := [place for place in found if place >= 0]:
            self._text, self.stopped = self._text[: min(cuts)], True

    def _held(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        longest = max(map(len, self._stops), default=0)
        sizes = range(min(longest - 1, len(self._text)), 0, -1)
        return next((n for n in sizes if any(stop.startswith(self._text[-n:]) for stop in self._stops)), 0)


class Sample:
    """One answer as it is written. ends: tokens that end it and are no part of it. reason: why it has ended, if so."""

    def __init__(self, alphabet: Alphabet, stops: Sequence[str], ends: Collection[int]) -> None:
        self._text, self._ends = Text(alphabet, stops), ends
        self.reason: types.StopReason | None = None
        self.take = self._text.take

    def feed(self, token: int, log_prob: float, tops: Tops | None, reason: types.StopReason | None) -> None:
        """The next token; of the last one, why it is that."""
        if self.reason is None:
            if not (reason == "stop" and token in self._ends):
                self._text.push(token, log_prob, tops)
            if reason or self._text.stopped:
                self.finish(reason or "stop")

    def feed_all(self, sequence: types.SampledSequence) -> None:
        """All tokens of an answer that is there."""
        count = len(sequence.tokens)
        tops: Sequence[Tops | None] = sequence.topk_logprobs or [None] * count
        reasons = [*[None] * (count - 1), sequence.stop_reason]
        for each in zip(sequence.tokens, sequence.logprobs or (), tops, reasons, strict=True):
            self.feed(*each)

    def finish(self, reason: types.StopReason) -> None:
        """Nothing follows, for this reason unless there was one before."""
        if self.reason is None:
            self._text.end()
            self.reason = "stop" if self._text.stopped else reason
