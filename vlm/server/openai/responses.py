"""The shapes of responses in the OpenAI API. The endpoints differ in their `Format`, and so do chats with tools."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlm.server.openai import tools
from vlm.server.openai.text import Token, Vocabulary

Fields = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """The shapes of an endpoint. choice(index, text, reason, log_probs) → a whole completion; delta(index, text,
    reason, log_probs) → a part of one; opening: the delta before the first part, if there is one."""

    prefix: str
    object: str
    chunk: str
    choice: Callable[[int, str, str | None, Fields | None], Fields]
    delta: Callable[[int, str, str | None, Fields | None], Fields]
    log_probs: Callable[[Vocabulary, Sequence[Token], int], Fields]
    opening: Callable[[int], Fields] | None = None


def _text_choice(index: int, text: str, reason: str | None, log_probs: Fields | None) -> Fields:
    return {"index": index, "text": text, "logprobs": log_probs, "finish_reason": reason}


def _message_choice(index: int, text: str, reason: str | None, log_probs: Fields | None) -> Fields:
    message = {"role": "assistant", "content": text, "refusal": None}
    return {"index": index, "message": message, "logprobs": log_probs, "finish_reason": reason}


def _calling_choice(index: int, text: str, reason: str | None, log_probs: Fields | None) -> Fields:
    fields, reason = tools.message(text, reason)
    message = {"role": "assistant", "refusal": None, **fields}
    return {"index": index, "message": message, "logprobs": log_probs, "finish_reason": reason}


def _message_delta(index: int, text: str, reason: str | None, log_probs: Fields | None) -> Fields:
    delta = {"content": text} if text or log_probs else {}
    return {"index": index, "delta": delta, "logprobs": log_probs, "finish_reason": reason}


def _message_opening(index: int) -> Fields:
    delta = {"role": "assistant", "content": ""}
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _text_log_probs(vocabulary: Vocabulary, tokens: Sequence[Token], top: int) -> Fields:
    """top_logprobs holds the token itself too, so top + 1 entries where it is none of the likeliest."""
    tops = [
        None if t.log_prob is None else {vocabulary.name(i): v for i, v in [*(t.top or ())[:top], (t.id, t.log_prob)]}
        for t in tokens
    ]
    return {
        "tokens": [vocabulary.name(token.id) for token in tokens],
        "token_logprobs": [token.log_prob for token in tokens],
        "top_logprobs": tops,
        "text_offset": [token.start for token in tokens],
    }


def _message_log_probs(vocabulary: Vocabulary, tokens: Sequence[Token], top: int) -> Fields:
    def entry(token: int, log_prob: float | None) -> Fields:
        data = vocabulary.data(token)
        return {"token": data.decode(errors="replace"), "logprob": log_prob, "bytes": list(data)}

    content = [
        {**entry(t.id, t.log_prob), "top_logprobs": [entry(*each) for each in (t.top or ())[:top]]} for t in tokens
    ]
    return {"content": content, "refusal": None}


COMPLETION = Format("cmpl", "text_completion", "text_completion", _text_choice, _text_choice, _text_log_probs)
CHAT = Format(
    "chatcmpl",
    "chat.completion",
    "chat.completion.chunk",
    _message_choice,
    _message_delta,
    _message_log_probs,
    _message_opening,
)
TOOL_CHAT = replace(CHAT, choice=_calling_choice)
