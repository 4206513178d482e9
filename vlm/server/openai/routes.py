"""The OpenAI-compatible endpoints, to be put under /v1 and, as the hosted service has them, under /oai/api/v1.

The way of a request: `requests` reads the body → `chat` turns messages into the model's input → `completions` samples
or chooses → `responses` writes the body or the stream.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response

from kshot.errors import BusyError, PromptError
from vlm.inputs import model_input
from vlm.local.clients import LocalSamplingClient
from vlm.server.openai import chat
from vlm.server.openai.completions import (
    ChoiceList,
    ChosenCompletion,
    Completion,
    EncodedPrompt,
    SampledCompletion,
    limit,
)
from vlm.server.openai.requests import ChatRequest, CompletionRequest, GenerationRequest
from vlm.server.openai.responses import CHAT, COMPLETION, Envelope, Fields, Route, body, stream
from vlm.server.state import ServerState
from vlm.server.tinker.sampling import WAITING

OWNER, PATH = "kshot", "tinker://"


@dataclass(frozen=True)
class Models:
    """The weights that are served."""

    state: ServerState

    def names(self) -> Sequence[str]:
        """Of the base models."""
        return list(self.state.models)

    def created(self) -> float:
        """Since when they are served, in seconds since 1970."""
        return self.state.started

    async def sampler(self, model: str) -> LocalSamplingClient:
        """A client on a base model or on the checkpoint of a tinker:// path; raises as `Samplers.client`, and BusyError
        where too many requests wait."""
        if max(len(self.state.samplings), self.state.registry.scheduler.waiting_samples) >= WAITING:
            raise BusyError(f"{WAITING} sampling requests are waiting; send this one again later")
        saved = model.startswith(PATH)
        return await self.state.samplers.client(model if saved else None, None if saved else model)


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


def _encode(request: CompletionRequest, sampler: LocalSamplingClient) -> list[EncodedPrompt]:
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
    request: GenerationRequest, http_request: Request, sampler: LocalSamplingClient, prompts: Sequence[EncodedPrompt]
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
