"""The OpenAI-compatible endpoints, to be put under /v1 and, as the hosted service has them, under /oai/api/v1.

The way of a request: `requests` reads the body → `chat` turns messages into the model's input, `tools` schemas into a
grammar → `completions` samples or chooses → here the body or the stream is sent, or an error in the API's form. `items`
makes a chat of what the Responses API asks, and items of its answer.
"""

import asyncio
import json
import logging
import reprlib
from collections.abc import AsyncGenerator, Awaitable, Sequence
from itertools import groupby
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException  # of which FastAPI's own is a kind

from kshot.errors import (
    ImageError,
    KshotError,
    MissingError,
    ModelError,
    NotFiniteError,
    PromptError,
    UnknownNameError,
)
from vlm.inputs import model_input
from vlm.local.clients import Grammar, LocalSamplingClient
from vlm.server.futures import INTERNAL, status_of
from vlm.server.guard import PARSED, Route
from vlm.server.openai import chat, items, tools
from vlm.server.openai.completions import ChosenCompletion, Completion, EncodedPrompt, SampledCompletion, limit
from vlm.server.openai.requests import ChatRequest, CompletionRequest, GenerationRequest
from vlm.server.openai.responses import Fields
from vlm.server.owners import Owned, Owner
from vlm.server.state import ServerState
from vlm.server.tinker.sampling import check_room
from vlm.templates import IMAGE_TOKEN, VIDEO_TOKEN

log = logging.getLogger("kshot.server")
T = TypeVar("T")
OWNER, PATH = "kshot", "tinker://"
EVENTS = "text/event-stream"
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {EVENTS: {}}}}  # beside JSON
TOKEN, LOG_PROB = 128, 1024  # bytes of a token of an answer, and of one with its log-probability, as JSON is made of it
CLOSED_REQUEST = 499  # nginx's status for a client that went away; nobody reads it
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
REASONS = {"extra_forbidden": "is not known to this server; leave it out", "missing": "is missing"}


def router(state: ServerState, allow_urls: bool) -> APIRouter:
    """All endpoints. allow_urls: whether the server fetches images from http(s) addresses that clients name."""
    router = APIRouter(route_class=Route)

    def model_fields(name: str) -> Fields:
        return {"id": name, "object": "model", "created": int(state.started), "owned_by": OWNER}

    @router.get("/models")
    async def list_models() -> Fields:
        return {"object": "list", "data": [model_fields(name) for name in state.models]}

    @router.get("/models/{model:path}")
    async def one_model(model: str, owner: Owned) -> Fields:
        if model not in state.models:
            await _sampler(state, model, owner)
        return model_fields(model)

    @router.post("/completions", response_model=None, responses=STREAMED)
    async def completions(request: CompletionRequest, http_request: Request, owner: Owned) -> Response:
        sampler = await _sampler(state, request.model, owner)
        prompts = await asyncio.to_thread(_encode, request, sampler)
        _take_answer(http_request, request, prompts)
        return await _answer(http_request, _completion(request, sampler, prompts))

    async def chat_completion(request: ChatRequest, http_request: Request, owner: Owner) -> Completion:
        sampler = await _sampler(state, request.model, owner)
        grammar = await asyncio.to_thread(_grammar, request, sampler)
        prompt, written = await chat.prompt(request, sampler, http_request.scope[PARSED], allow_urls=allow_urls)
        length = limit(request, prompt, sampler.context)
        encoded = EncodedPrompt(prompt, length, marks=written.marks, within=written.within)
        _take_answer(http_request, request, [encoded])
        return _completion(request, sampler, [encoded], grammar)

    @router.post("/chat/completions", response_model=None, responses=STREAMED)
    async def chat_completions(request: ChatRequest, http_request: Request, owner: Owned) -> Response:
        return await _answer(http_request, await chat_completion(request, http_request, owner))

    @router.post("/responses", response_model=None, responses=STREAMED)
    async def responses(request: items.ResponseRequest, http_request: Request, owner: Owned) -> Response:
        chat = await chat_completion(items.chat_request(request), http_request, owner)
        return await _answer(http_request, items.Response(request, chat))

    return router


def _take_answer(http_request: Request, request: GenerationRequest, prompts: Sequence[EncodedPrompt]) -> None:
    """Take what the answer needs as well, by its length and the tokens beside each. Raises TooLargeError, BusyError."""
    tokens = sum(request.n * each.limit + len(each.echo_tokens) for each in prompts)
    entry = TOKEN if request.top is None else TOKEN + (request.top + 1) * LOG_PROB
    http_request.scope[PARSED].grow(tokens * entry)


async def _sampler(state: ServerState, model: str, owner: Owner) -> LocalSamplingClient:
    """On a base model, or on the checkpoint of a tinker:// path; raises as `check_room` and `Samplers.client`."""
    check_room(state)
    saved = model.startswith(PATH)
    return await state.samplers.client(model if saved else None, None if saved else model, owner)


def _encode(request: CompletionRequest, sampler: LocalSamplingClient) -> list[EncodedPrompt]:
    """A completion's prompts. Raises PromptError for image tokens, RequestError for what is too long."""
    tokenizer, prompts = sampler.get_tokenizer(), list[EncodedPrompt]()
    for prompt in request.prompt:
        tokens = list(tokenizer.encode(prompt)) if isinstance(prompt, str) else prompt  # with what it begins texts with
        for name in (IMAGE_TOKEN, VIDEO_TOKEN):
            if tokenizer.added_tokens_encoder.get(name) in tokens:
                raise PromptError(
                    f"the prompt writes {name}, which stands for an image; ask chat/completions, with the image"
                )
        inputs = model_input(tokens)
        text = prompt if isinstance(prompt, str) else tokenizer.decode(tokens)
        echo = (text, tokens) if request.echo else ("", ())
        prompts.append(EncodedPrompt(inputs, limit(request, inputs, sampler.context), *echo))
    return prompts


def _grammar(request: ChatRequest, sampler: LocalSamplingClient) -> Grammar | None:
    """What the answer must follow. Raises as `tools.grammar` and RequestError for schemas that cannot be followed."""
    tokenizer = sampler.get_tokenizer()
    text = tools.grammar(request, tokenizer)
    return None if text is None else sampler.grammar(text, chat.end_tokens(tokenizer))


def _completion(
    request: GenerationRequest,
    sampler: LocalSamplingClient,
    prompts: Sequence[EncodedPrompt],
    grammar: Grammar | None = None,
) -> Completion:
    if request.choice is None:
        return SampledCompletion(request, sampler, prompts, grammar)
    return ChosenCompletion(request, sampler, prompts)


async def _answer(http_request: Request, completion: Completion | items.Response) -> Response:
    if completion.request.stream:
        return await stream(http_request, completion.chunks())
    return JSONResponse(await _unless_gone(http_request, completion.response()))


# Streams, for as long as the client is there


async def stream(request: Request, chunks: AsyncGenerator[Fields]) -> Response:
    """Server-sent events. An error before the first of them is raised."""
    first = await _unless_gone(request, anext(chunks))
    return _Events(_events(first, chunks), media_type=EVENTS, headers={"Cache-Control": "no-cache"})


async def _events(first: Fields, chunks: AsyncGenerator[Fields]) -> AsyncGenerator[str]:
    try:
        yield _event(first)
        async for chunk in chunks:
            yield _event(chunk)
        yield "data: [DONE]\n\n"
    except Exception as error:
        if not isinstance(error, KshotError):
            log.error("a stream broke off", exc_info=error)
        yield _event(error_response(error)[1])
    finally:
        await chunks.aclose()


def _event(data: Fields) -> str:
    name = f"event: {data['type']}\n" if "type" in data else ""  # of the Responses API
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return f"{name}data: {text}\n\n"


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


def error_response(error: Exception) -> tuple[int, dict[str, Any]]:
    """HTTP status and body of an error. What nobody meant to raise gets no details."""
    status, message, param, code = 500, str(error), None, None
    match error:
        case NotFiniteError():
            status, param = status_of(error), "model"
        case UnknownNameError() | ModelError() | MissingError():  # nothing but models is looked up here
            status, param, code = 404, "model", "model_not_found"
        case RequestValidationError():
            status, (message, param) = 400, _invalid(error.errors())
        case HTTPException():
            status, message = error.status_code, str(error.detail)
        case ImageError():
            status, param = 400, "messages"
        case KshotError():
            status = status_of(error)
        case _:
            message = INTERNAL
    kind, category = ("invalid_request_error", "user") if status < 500 else ("server_error", "server")
    fields = {"message": message, "type": TYPES.get(status, kind), "param": param, "code": code}
    return status, {"error": fields, "category": category}


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
