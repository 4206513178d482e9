"""The OpenAI-compatible endpoints, to be put under /v1 and, as the hosted service has them, under /oai/api/v1.

Knows HTTP alone: what is asked is read by `openai_requests`, turned into tokens by `openai_chat`, and answered by
`openai_writing` or, from a closed list, by `openai_choices`.
"""

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

from fastapi import APIRouter, Request, Response

from kshot.errors import PromptError
from vlm.inputs import model_input
from vlm.server.openai import chat as openai_chat
from vlm.server.openai.completions import Choosing, Closed, Question, Writing, limit
from vlm.server.openai.models import Sampler
from vlm.server.openai.requests import ChatRequest, CompletionRequest, GenerationRequest
from vlm.server.openai.responses import CHAT, COMPLETION, Envelope, Fields, Route, stream, whole

OWNER = "kshot"


class Models(Protocol):
    """The weights that may be asked for."""

    def names(self) -> Sequence[str]:
        """Of the base models."""

    def created(self) -> float:
        """Since when they are served, in seconds since 1970."""

    async def sampler(self, model: str) -> Sampler:
        """By the name of a base model or the path of saved sampler weights. Raises UnknownNameError, MissingError or
        ModelError where it is not here, RequestError for what is no path."""


def router(models: Models, allow_urls: bool) -> APIRouter:
    """All endpoints. allow_urls: whether the server fetches images from http(s) addresses that clients name."""
    each = APIRouter(route_class=Route)

    @each.get("/models")
    async def list_models() -> Fields:
        return {"object": "list", "data": [_model(name, models) for name in models.names()]}

    @each.get("/models/{model:path}")
    async def one_model(model: str) -> Fields:
        if model not in models.names():
            await models.sampler(model)
        return _model(model, models)

    @each.post("/completions", response_model=None)
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        sampler = await models.sampler(asked.model)
        questions = await asyncio.to_thread(_questions, asked, sampler)
        return await _answer(asked, request, sampler, questions)

    @each.post("/chat/completions", response_model=None)
    async def chat(asked: ChatRequest, request: Request) -> Response:
        sampler = await models.sampler(asked.model)
        prompt = await openai_chat.prompt(asked, sampler, allow_urls=allow_urls)
        return await _answer(asked, request, sampler, [Question(prompt, limit(asked, prompt, sampler.context))])

    return each


def _model(name: str, models: Models) -> Fields:
    return {"id": name, "object": "model", "created": int(models.created()), "owned_by": OWNER}


def _questions(asked: CompletionRequest, sampler: Sampler) -> list[Question]:
    """Of a completion's prompts. Raises PromptError for places of images, RequestError for what is too long."""
    tokenizer, questions = sampler.get_tokenizer(), list[Question]()
    for given in asked.prompt:
        tokens = openai_chat.encode(tokenizer, given) if isinstance(given, str) else given
        _check_places(tokenizer, tokens)
        prompt = model_input(tokens)
        echo = given if isinstance(given, str) else tokenizer.decode(tokens)
        echoed = (echo, tokens) if asked.echo else ("", ())
        questions.append(Question(prompt, limit(asked, prompt, sampler.context), *echoed))
    return questions


def _check_places(tokenizer: Any, tokens: Sequence[int]) -> None:
    known = tokenizer.added_tokens_encoder
    for name in (openai_chat.PLACE, openai_chat.VIDEO):
        if known.get(name) in tokens:
            raise PromptError(
                f"the prompt writes {name}, which stands for an image; ask chat/completions, with the image"
            )


async def _answer(
    asked: GenerationRequest, request: Request, sampler: Sampler, questions: Sequence[Question]
) -> Response:
    envelope = Envelope(CHAT if isinstance(asked, ChatRequest) else COMPLETION, asked.model)
    answer: Writing | Choosing
    if asked.choice is None:
        ends = openai_chat.ends(sampler.get_tokenizer())
        answer = Writing(asked, envelope, sampler, questions, ends)
    else:
        closed = await asyncio.to_thread(Closed.of, asked, asked.choice, sampler.get_tokenizer())
        closed.check(asked, questions, sampler.context)
        answer = Choosing(asked, envelope, sampler, questions, closed)
    return await (stream(request, answer.pieces()) if asked.stream else whole(request, answer.response()))
