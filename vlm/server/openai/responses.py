"""Responses in the shapes of the OpenAI API: bodies, streams and errors. The two endpoints differ in their `Format`."""

import asyncio
import json
import logging
import reprlib
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException  # of which FastAPI's own is a kind

from kshot.errors import ImageError, KshotError, MissingError, ModelError, UnknownNameError
from vlm.server.futures import INTERNAL, status_of
from vlm.server.openai.text import Token, Vocabulary

log = logging.getLogger("kshot.server")
Fields = dict[str, Any]
T = TypeVar("T")
CLOSED_REQUEST = 499  # nginx's status for a client that went away; nobody reads it
UNKNOWN_MODEL = "model_not_found"
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
REASONS = {"extra_forbidden": "is not known to this server; leave it out", "missing": "is missing"}


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


@dataclass(frozen=True)
class Envelope:
    """What all chunks of one response have in common."""

    format: Format
    model: str
    created: int = field(default_factory=lambda: int(time.time()))
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    def body(self, choices: Sequence[Fields], usage: Fields) -> Fields:
        """The body of a response that is no stream."""
        return {**self._head(self.format.object), "choices": list(choices), "usage": usage}

    def chunk(self, choices: Sequence[Fields], *, with_usage: bool, usage: Fields | None = None) -> Fields:
        """An event of a stream; with_usage: whether the stream says how many tokens there were, in its last event."""
        return {**self._head(self.format.chunk), "choices": list(choices), **({"usage": usage} if with_usage else {})}

    def _head(self, kind: str) -> Fields:
        name = f"{self.format.prefix}-{self.key}"
        return {"id": name, "object": kind, "created": self.created, "model": self.model, "system_fingerprint": None}


def usage(prompt: int, completion: int) -> Fields:
    """Positions of the prompts, those of images included, and tokens of completions, those that ended one included."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


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


# Bodies and streams, for as long as the client is there


async def body(request: Request, work: Awaitable[Fields]) -> Response:
    """A body of JSON."""
    return JSONResponse(await _unless_gone(request, work))


async def stream(request: Request, chunks: AsyncGenerator[Fields]) -> Response:
    """Server-sent events. An error before the first of them is raised."""
    first = await _unless_gone(request, anext(chunks))
    return _Events(_events(first, chunks), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def _events(first: Fields, chunks: AsyncGenerator[Fields]) -> AsyncGenerator[str]:
    try:
        yield _event(first)
        async for chunk in chunks:
            yield _event(chunk)
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield _event(error_response(error)[1])
    finally:
        await chunks.aclose()


def _event(data: Fields) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


class _Events(StreamingResponse):
    """A streaming response that closes its iterator, however it ends."""

    async def __call__(self, *args: Any) -> None:
        iterator: Any = self.body_iterator
        try:
            await super().__call__(*args)
        finally:
            await iterator.aclose()


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The work's result; where the client goes away first, the work is cancelled."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(CLOSED_REQUEST, "the client went away")
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    """Until the client goes away; its whole body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


# Errors


class Route(APIRoute):
    """A route whose exceptions become error responses."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        inner = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await inner(request)
            except Exception as error:
                status, body = error_response(error)
                return JSONResponse(body, status)

        return handler


def error_response(error: Exception) -> tuple[int, dict[str, Any]]:
    """HTTP status and body of an error. Of what nobody meant to raise, only the log has details."""
    match error:
        case UnknownNameError() | ModelError() | MissingError():  # nothing but models is looked up here
            return 404, error_body(404, str(error), "model", UNKNOWN_MODEL)
        case RequestValidationError():
            return 400, error_body(400, *_invalid(error.errors()))
        case HTTPException():
            return error.status_code, error_body(error.status_code, str(error.detail))
        case ImageError():
            return 400, error_body(400, str(error), "messages")
        case KshotError():
            return status_of(error), error_body(status_of(error), str(error))
    log.error("a request failed", exc_info=error)
    return 500, error_body(500, INTERNAL)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error with this HTTP status; param: the field that is wrong."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": TYPES.get(status, kind), "param": param, "code": code}
    return {"error": error, "category": "user" if status < 500 else "server"}


def _invalid(errors: Sequence[Any]) -> tuple[str, str | None]:
    """Message and field of the first thing that is wrong with a body."""
    first = errors[0]
    place = [_plain(each) for each, _ in groupby(first["loc"]) if each != "body"]  # a part's kind and field are one
    if first["type"] == "json_invalid":
        return f"the body is no JSON: {first.get('ctx', {}).get('error', first['msg'])}", None
    if first["type"] == "wrong":
        return first["msg"], first["ctx"]["param"]
    name = "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in place).lstrip(".") or "the body"
    value = "" if first["type"] in REASONS else f"; got {reprlib.repr(first['input'])}"
    reason = REASONS.get(first["type"], f"is wrong: {first['msg']}")
    return f"{name} {reason}{value}", str(place[0]) if place else None


def _plain(place: int | str) -> int | str:
    """A name that a client made up, on one line."""
    return place.encode("unicode_escape").decode() if isinstance(place, str) else place
