"""The OpenAI-compatible endpoints of a local service over loopback, in a thread, for the official client."""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast
from unittest.mock import ANY

import openai
import pytest
from fastapi import FastAPI

from kshot.errors import UnknownNameError
from vlm import nano
from vlm.local.clients import LocalSamplingClient
from vlm.local.registry import LocalServiceClient
from vlm.local.sampling.sampler import SamplingRequest
from vlm.prompts import PREFILL, QUESTION
from vlm.server.app import handle_errors
from vlm.server.guard import PARSED
from vlm.server.limits.memory import MESSAGES, Memory
from vlm.server.openai.routes import router
from vlm.server.owners import EVERYBODY, Owner, owner_of

PREFIXES = ("/v1", "/oai/api/v1")
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]


@dataclass
class Models:
    """In place of the server's state. requests, samplings: all of its samplers."""

    service: LocalServiceClient
    requests: list[SamplingRequest] = field(default_factory=list)
    samplings: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.models, self.started = [nano.NAME], 1_700_000_000.5
        self.samplers, self.registry = self, self.service._registry

    async def client(self, model_path: str | None, base_model: str | None, _: Owner) -> Any:
        if base_model not in (None, nano.NAME):
            raise UnknownNameError("model", str(base_model), self.models)
        sampler = self.service.create_sampling_client(model_path=model_path, base_model=base_model)
        return Watched(await sampler, self)


@dataclass
class Watched:
    """A sampler that notes what it is asked."""

    inner: LocalSamplingClient
    models: Models

    def start(self, ask: SamplingRequest, on_token: Any = None) -> Any:
        self.models.requests.append(ask)
        self.models.samplings.append(self.inner.start(ask, on_token))
        return self.models.samplings[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@dataclass
class Reserving:
    """In place of the guard: a reservation for each request."""

    app: Any

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with Memory(1 << 30).take(MESSAGES) as scope[PARSED]:
            await self.app(scope, receive, send)


def application(models: Models, *, allow_urls: bool = False) -> FastAPI:
    app = FastAPI()
    app.add_middleware(Reserving)
    app.dependency_overrides[owner_of] = lambda: EVERYBODY  # there is no guard
    for prefix in PREFIXES:
        app.include_router(router(cast(Any, models), allow_urls), prefix=prefix)
    handle_errors(app, lambda *_: None)
    return app


@contextmanager
def connected(address: str, prefix: str = "/v1") -> Iterator[openai.OpenAI]:
    """The official client. It validates nothing by itself: see `checked`."""
    with openai.OpenAI(base_url=address + prefix, api_key="none", max_retries=0) as made:
        yield made


def ask(api: openai.OpenAI, **fields: Any) -> Any:
    """What the client gives for a prompt or for messages at temperature 0: an answer that is `checked`, or a stream."""
    endpoint: Any = api.completions if "prompt" in fields else api.chat.completions
    answer = endpoint.create(**{"model": nano.NAME, "temperature": 0.0, **fields})
    return answer if fields.get("stream") else checked(answer)


def refusal(api: openai.OpenAI, path: str, words: str, param: Any = ANY, /, **wrong: Any) -> None:
    """A good request with wrong fields is refused with these words, and by an error about this field."""
    good = {"prompt": "a"} if path == "completions" else {"messages": HELLO}
    with pytest.raises(openai.BadRequestError) as caught:
        api.post(f"/{path}", cast_to=object, body={"model": nano.NAME, **good, **wrong})
    assert caught.value.type == "invalid_request_error"
    assert caught.value.response.json()["category"] == "user"
    assert "\n" not in caught.value.body["message"]  # type: ignore[index]
    assert words in caught.value.message
    assert caught.value.param == param


def checked(answer: Any) -> Any:
    """The answer, once its own type has accepted what it holds: the client itself only constructs."""
    kind = type(answer)
    return kind.model_validate(answer.model_dump(exclude_none=True, by_alias=True), strict=True) and answer


def image_part(image: bytes, kind: str = "jpeg", **options: Any) -> dict[str, Any]:
    url = f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
    return {"type": "image_url", "image_url": {"url": url, **options}}


def recipe(image: bytes) -> list[dict[str, Any]]:
    """The recipe's conversation, its answer begun."""
    question = [image_part(image), {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": PREFILL}]
