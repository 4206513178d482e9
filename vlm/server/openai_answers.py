"""Answers and chunks of answers in the shapes of the OpenAI API; the two endpoints differ here and nowhere after.

`choice`, `delta` and `log_probs` make plain dicts that go out as JSON. Knows no model and no HTTP.
"""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm.server.openai_text import Alphabet, Token

Fields = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """How an endpoint writes. choice(index, text, reason, log_probs) → one whole answer; delta(index, text, reason,
    log_probs) → a piece of one; opening: the delta before the first piece, if there is one."""

    prefix: str
    object: str
    chunk: str
    choice: Callable[[int, str, str | None, Fields | None], Fields]
    delta: Callable[[int, str, str | None, Fields | None], Fields]
    log_probs: Callable[[Alphabet, Sequence[Token], int], Fields]
    opening: Callable[[int], Fields] | None = None


@dataclass(frozen=True)
class Envelope:
    """What all parts of one response have in common."""

    form: Form
    model: str
    created: int = field(default_factory=lambda: int(time.time()))
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    def whole(self, choices: Sequence[Fields], usage: Fields) -> Fields:
        """The body of a response that is no stream."""
        return {**self._head(self.form.object), "choices": list(choices), "usage": usage}

    def piece(self, choices: Sequence[Fields], *, with_usage: bool, usage: Fields | None = None) -> Fields:
        """An event of a stream; with_usage: whether the stream says how many tokens there were, in its last event."""
        return {**self._head(self.form.chunk), "choices": list(choices), **({"usage": usage} if with_usage else {})}

    def _head(self, kind: str) -> Fields:
        name = f"{self.form.prefix}-{self.key}"
        return {"id": name, "object": kind, "created": self.created, "model": self.model, "system_fingerprint": None}


def usage(prompt: int, written: int) -> Fields:
    """Positions of the prompts, those of images included, and tokens written, those that ended an answer included."""
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def _text_choice(index: int, text: str, reason: str | None, log_probs: Fields | None) -> Fields:
    return {"index": index, "text": text, "logprobs": log_probs, "finish_reason": reason}


def _message_choice(index: int, text: str, reason: str | None, log_probs: Fields | None) -> Fields:
    message = {"role": "assistant", "content": text, "refusal": None}
    return {"index": index, "message": message, "logprobs": log_probs, "finish_reason": reason}


def _message_delta(index: int, text: str, reason: str | None, log_probs: Fields | None) -> Fields:
    delta = {"content": text} if text or log_probs else {}
    return {"index": index, "delta": delta, "logprobs": log_probs, "finish_reason": reason}


def _message_opening(index: int) -> Fields:
    delta = {"role": "assistant", "content": ""}
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _text_log_probs(alphabet: Alphabet, tokens: Sequence[Token], top: int) -> Fields:
    """top_logprobs holds the token itself too, so top + 1 entries where it is none of the likeliest."""
    tops = [
        None if t.log_prob is None else {alphabet.name(i): v for i, v in [*(t.tops or ())[:top], (t.id, t.log_prob)]}
        for t in tokens
    ]
    return {
        "tokens": [alphabet.name(token.id) for token in tokens],
        "token_logprobs": [token.log_prob for token in tokens],
        "top_logprobs": tops,
        "text_offset": [token.start for token in tokens],
    }


def _message_log_probs(alphabet: Alphabet, tokens: Sequence[Token], top: int) -> Fields:
    def entry(token: int, log_prob: float | None) -> Fields:
        data = alphabet.data(token)
        return {"token": data.decode(errors="replace"), "logprob": log_prob, "bytes": list(data)}

    content = [
        {**entry(t.id, t.log_prob), "top_logprobs": [entry(*each) for each in (t.tops or ())[:top]]} for t in tokens
    ]
    return {"content": content, "refusal": None}


COMPLETION = Form("cmpl", "text_completion", "text_completion", _text_choice, _text_choice, _text_log_probs)
CHAT = Form(
    "chatcmpl",
    "chat.completion",
    "chat.completion.chunk",
    _message_choice,
    _message_delta,
    _message_log_probs,
    _message_opening,
)
