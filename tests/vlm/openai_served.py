"""The OpenAI-compatible endpoints of a local service over loopback, in a thread, for the official client."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import openai
import uvicorn
from fastapi import FastAPI

from kshot.errors import UnknownNameError
from vlm import nano
from vlm.local.clients import LocalSamplingClient
from vlm.local.registry import LocalServiceClient
from vlm.local.sampling import SamplingRequest
from vlm.server.openai.routes import router

PREFIXES = ("/v1", "/oai/api/v1")


@dataclass
class Models:
    """In place of `vlm.server.openai.routes.Models`. requests, samplings: all of its samplers."""

    service: LocalServiceClient
    requests: list[SamplingRequest] = field(default_factory=list)
    samplings: list[Any] = field(default_factory=list)

    def names(self) -> list[str]:
        return [nano.NAME]

    def created(self) -> float:
        return 1_700_000_000.5

    async def sampler(self, model: str) -> Any:
        if model.startswith("tinker://"):
            return Watched(await self.service.create_sampling_client(model_path=model), self)
        if model != nano.NAME:
            raise UnknownNameError("model", model, self.names())
        return Watched(await self.service.create_sampling_client(base_model=model), self)


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


def application(models: Models, *, allow_urls: bool = False) -> FastAPI:
    app = FastAPI()
    for prefix in PREFIXES:
        app.include_router(router(cast(Any, models), allow_urls), prefix=prefix)
    return app


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """The address of an application while it is served."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def connected(address: str, prefix: str = "/v1") -> Iterator[openai.OpenAI]:
    """The official client. It validates nothing by itself: see `checked`."""
    with openai.OpenAI(base_url=address + prefix, api_key="none", max_retries=0) as made:
        yield made


def checked(answer: Any) -> Any:
    """The answer, once its own type has accepted what it holds: the client itself only constructs."""
    kind = type(answer)
    return kind.model_validate(answer.model_dump(exclude_none=True), strict=True) and answer
