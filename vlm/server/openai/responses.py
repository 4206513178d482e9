"""Answers and chunks of answers in the shapes of the OpenAI API; the two endpoints differ here and nowhere after.

`choice`, `delta` and `log_probs` make plain dicts that go out as JSON. Knows no model and no HTTP.

TODO Bodies and event streams for as long as the client is there to read them. Knows no endpoint and no model.
TODO Errors in the form that OpenAI's clients read. Knows no endpoint.
"""

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
from vlm.server.openai.text import Alphabet, Token

# ---- Answers and chunks of answers in the shapes of the OpenAI API; the two endpoints differ here and nowhere after.

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


# ---- Errors in the form that OpenAI's clients read. Knows no endpoint.

log = logging.getLogger("kshot.server")
UNKNOWN_MODEL = "model_not_found"
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
WORDS = {"extra_forbidden": "is not known to this server; leave it out", "missing": "is missing"}


class Route(APIRoute):
    """A route that answers whatever is raised in it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        inner = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await inner(request)
            except Exception as error:
                status, body = described(error)
                return JSONResponse(body, status)

        return handler


def described(error: Exception) -> tuple[int, dict[str, Any]]:
    """HTTP status and body of an error. Of what nobody meant to raise, only the log has details."""
    match error:
        case UnknownNameError() | ModelError() | MissingError():  # nothing but models is looked up here
            return 404, body(404, str(error), "model", UNKNOWN_MODEL)
        case RequestValidationError():
            return 400, body(400, *_invalid(error.errors()))
        case HTTPException():
            return error.status_code, body(error.status_code, str(error.detail))
        case ImageError():
            return 400, body(400, str(error), "messages")
        case KshotError():
            return status_of(error), body(status_of(error), str(error))
    log.error("a request failed", exc_info=error)
    return 500, body(500, INTERNAL)


def body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
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
    value = "" if first["type"] in WORDS else f"; got {reprlib.repr(first['input'])}"
    said = WORDS.get(first["type"], f"is wrong: {first['msg']}")
    return f"{name} {said}{value}", str(place[0]) if place else None


def _plain(place: int | str) -> int | str:
    """A name that a client made up, on one line."""
    return place.encode("unicode_escape").decode() if isinstance(place, str) else place


# ---- Bodies and event streams for as long as the client is there to read them. Knows no endpoint and no model.

T = TypeVar("T")
CLOSED_REQUEST = 499  # nginx's status for a client that went away; nobody reads it


async def whole(request: Request, work: Awaitable[Fields]) -> Response:
    """One body of JSON."""
    return JSONResponse(await _unless_gone(request, work))


async def stream(request: Request, pieces: AsyncGenerator[Fields]) -> Response:
    """Server-sent events. What goes wrong before the first of them is an error like any other."""
    first = await _unless_gone(request, anext(pieces))
    return _Events(_events(first, pieces), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def _events(first: Fields, pieces: AsyncGenerator[Fields]) -> AsyncGenerator[str]:
    try:
        yield _event(first)
        async for piece in pieces:
            yield _event(piece)
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield _event(described(error)[1])
    finally:
        await pieces.aclose()


def _event(data: Fields) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


class _Events(StreamingResponse):
    """A stream that closes what it streams, however it ends."""

    async def __call__(self, *args: Any) -> None:
        body: Any = self.body_iterator
        try:
            await super().__call__(*args)
        finally:
            await body.aclose()


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
