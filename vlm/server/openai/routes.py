"""The OpenAI-compatible endpoints, to be put under /v1 and, as the hosted service has them, under /oai/api/v1.

The way of a request: `requests` reads the body → `chat` turns messages into the model's input → `completions` samples
or chooses → `responses` writes the body or the stream.
"""

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

from fastapi import APIRouter, Request, Response

from kshot.errors import PromptError
from vlm.inputs import model_input
from vlm.server.openai import chat
from vlm.server.openai.completions import (
    ChoiceList,
    ChosenCompletion,
    Completion,
    EncodedPrompt,
    SampledCompletion,
    limit,
)
from vlm.server.openai.models import Sampler
from vlm.server.openai.requests import ChatRequest, CompletionRequest, GenerationRequest
from vlm.server.openai.responses import CHAT, COMPLETION, Envelope, Fields, Route, body, stream

OWNER = "kshot"


class Models(Protocol):
    """The weights that are served."""

    def names(self) -> Sequence[str]:
        """Of the base models."""

    def created(self) -> float:
        """Since when they are served, in seconds since 1970."""

    async def sampler(self, model: str) -> Sampler:
        """By the name of a base model or the path of saved sampler weights. Raises UnknownNameError, MissingError or
        ModelError where it is not here, RequestError for what is no path."""


def router(models: Models, allow_urls: bool) -> APIRouter:
    """All endpoints. allow_urls: whether the server fetches images from http(s) addresses that clients name."""
    router = APIRouter(route_class=Route)

    def model_fields(name: str) -> Fields:
        return {"id": name, "object": "model", "created": int(models.created()), "owned_by": OWNER}

    @router.get("/models")
    async def list_models() -> Fields:
        return {"object": "list", "data": [model_fields(name) for name in models.names()]}

    @router.get("/models/{model:path}")
    async def one_model(model: str) -> Fields:
        if model not in models.names():
            await models.sampler(model)
        return model_fields(model)

    @router.post("/completions", response_model=None)
    async def completions(request: CompletionRequest, http_request: Request) -> Response:
        sampler = await models.sampler(request.model)
        prompts = await asyncio.to_thread(_encode, request, sampler)
        return await _answer(request, http_request, sampler, prompts)

    @router.post("/chat/completions", response_model=None)
    async def chat_completions(request: ChatRequest, http_request: Request) -> Response:
        sampler = await models.sampler(request.model)
        prompt = await chat.prompt(request, sampler, allow_urls=allow_urls)
        encoded = EncodedPrompt(prompt, limit(request, prompt, sampler.context))
        return await _answer(request, http_request, sampler, [encoded])

    return router


def _encode(request: CompletionRequest, sampler: Sampler) -> list[EncodedPrompt]:
    """A completion's prompts. Raises PromptError for image tokens, RequestError for what is too long."""
    tokenizer, prompts = sampler.get_tokenizer(), list[EncodedPrompt]()
    for prompt in request.prompt:
        tokens = chat.encode(tokenizer, prompt) if isinstance(prompt, str) else prompt
        _check_no_image_token(tokenizer, tokens)
        inputs = model_input(tokens)
        text = prompt if isinstance(prompt, str) else tokenizer.decode(tokens)
        echo = (text, tokens) if request.echo else ("", ())
        prompts.append(EncodedPrompt(inputs, limit(request, inputs, sampler.context), *echo))
    return prompts


def _check_no_image_token(tokenizer: Any, tokens: Sequence[int]) -> None:
    for name in (chat.IMAGE_TOKEN, chat.VIDEO_TOKEN):
        if tokenizer.added_tokens_encoder.get(name) in tokens:
            raise PromptError(
                f"the prompt writes {name}, which stands for an image; ask chat/completions, with the image"
            )


async def _answer(
    request: GenerationRequest, http_request: Request, sampler: Sampler, prompts: Sequence[EncodedPrompt]
) -> Response:
    envelope = Envelope(CHAT if isinstance(request, ChatRequest) else COMPLETION, request.model)
    tokenizer = sampler.get_tokenizer()
    completion: Completion
    if request.choice is None:
        completion = SampledCompletion(request, envelope, sampler, prompts, chat.end_tokens(tokenizer))
    else:
        choices = await asyncio.to_thread(ChoiceList.of, request, request.choice, tokenizer)
        choices.check(request, prompts, sampler.context)
        completion = ChosenCompletion(request, envelope, sampler, prompts, choices)
    if request.stream:
        return await stream(http_request, completion.chunks())
    return await body(http_request, completion.response())
