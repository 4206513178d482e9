"""The server as one ASGI application: endpoints, error responses, the guard before them, and /openapi.json."""

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import TypeAdapter
from starlette.exceptions import HTTPException
from tinker import types

from kshot.errors import KshotError, RequestError
from vlm import templates
from vlm.server import page, watch
from vlm.server.connections import Connections
from vlm.server.futures import PROTOBUF, error_body, status_of
from vlm.server.guard import Body, Guard, Keys, Requests, Signer, hosts_of
from vlm.server.limits import images
from vlm.server.openai import routes as openai_routes
from vlm.server.owners import Owner
from vlm.server.retention import KEEP
from vlm.server.state import ServerState
from vlm.server.tinker import routes as tinker_routes
from vlm.server.tinker.routes import StrictBody, accepted, first_fault
from vlm.server.tinker.sampling import SamplingService
from vlm.server.tinker.training import TrainingService

OPENAI = ("/v1", "/oai/api/v1")
LARGE = Body(limit=64 << 20, values=1 << 13)  # images in base64, long texts, schemas
TARGETS = ("data", "shape", "sparse_crow_indices", "sparse_col_indices")
TOKENS = {("prompt", "chunks", "*", "tokens"), *(("target_prompt_logprobs", name) for name in TARGETS)}
PROMPTS = {("prompt",), ("prompt", "*")}  # of completions: token ids, or lists of them
BODIES = {
    "/api/v1/forward_backward": Body(PROTOBUF, 32 << 20),  # the SDK sends parts of 5 MB; one datum may be larger
    "/api/v1/asample": replace(LARGE, lists=frozenset(TOKENS)),
    "/api/v1/telemetry": Body(values=1 << 16),  # of which nothing is checked
    **{f"{prefix}/{name}": LARGE for prefix in OPENAI for name in ("chat/completions", "responses")},
    **{f"{prefix}/completions": replace(LARGE, lists=frozenset(PROMPTS)) for prefix in OPENAI},
}
HEALTH = "/api/v1/healthz"


@dataclass(frozen=True)
class Options:
    """How a server is reached. host, port: where it listens. keys: the API keys that it accepts. hosts: further names
    that requests may be addressed to. allow_urls: whether images may be fetched from http addresses. image_log_probs:
    see `vlm.server.tinker.sampling.SamplingService`. keep: seconds for which what is over is kept, see
    `vlm.server.retention`. Raises InputError for a host that is no name."""

    host: str = "127.0.0.1"
    port: int = 8000
    keys: Keys = field(default_factory=Keys)
    hosts: tuple[str, ...] = ()
    allow_urls: bool = False
    image_log_probs: float = math.nan
    keep: float = KEEP

    def __post_init__(self) -> None:
        _ = self.names

    @property
    def names(self) -> frozenset[str] | None:
        """What requests may be addressed to; None: anything."""
        return hosts_of(self.host, self.hosts, keyed=self.keys.digests is not None)

    @property
    def address(self) -> str:
        """Where clients connect to."""
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"


def application(state: ServerState, options: Options, connections: Connections) -> Any:
    """The ASGI application of a server; it closes `state` when it ends. connections: what its metrics count."""
    requests, training = Counter[tuple[str | None, str, int]](), TrainingService(state)
    api = FastAPI(title="kshot", docs_url=None, redoc_url=None, lifespan=_lifespan(state))
    signer = Signer()
    tinker = tinker_routes.routes(state, training, SamplingService(state, options.image_log_probs), signer)
    for router in (tinker, watch.routes(state, requests, connections, options.address)):
        api.include_router(router, responses=_failures(Failure))
    openai = openai_routes.router(state, options.allow_urls)
    for prefix in OPENAI:
        api.include_router(openai, prefix=prefix, responses=_failures(OpenAIFailure))
    api.include_router(page.routes())
    _describe(api)
    handle_errors(api, training.refuse_body)
    api.add_middleware(Requests, counts=requests)
    free = frozenset({HEALTH, *page.FILES})  # they hold no data; what the page shows is fetched with a key
    return Guard(api, options.keys, options.names, free, BODIES, error_response, state.memory, signer)


def _lifespan(state: ServerState) -> Any:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tidying = asyncio.create_task(state.keep_tidy())
        yield
        tidying.cancel()
        with suppress(asyncio.CancelledError):
            await tidying
        await state.close()
        for close in (templates.close, images.close):
            await asyncio.to_thread(close)

    return lifespan


def error_response(path: str, error: Exception) -> tuple[int, dict[str, Any]]:
    """An error's HTTP status and body, in the form that the clients of this path read."""
    if path.startswith(OPENAI):
        return openai_routes.error_response(error)
    return status_of(error), error_body(error)


def handle_errors(api: FastAPI, refuse: Callable[[Any, Owner, RequestError], tuple[str, str] | None]) -> None:
    """Answer exceptions, in the form of their paths. refuse: see `TrainingService.refuse_body`."""

    async def answered(request: Request, error: Any) -> JSONResponse:
        path = request.url.path
        if isinstance(error, HTTPException) and not path.startswith(OPENAI):
            body = {"error": f"{request.method} {path}: {error.detail}", "category": "user"}
            return JSONResponse(body, error.status_code, error.headers)
        if isinstance(error, RequestValidationError) and not path.startswith(OPENAI):
            fault = RequestError(first_fault(error.errors()))
            ids = refuse(error.body, request.scope["owner"], fault)
            return JSONResponse(accepted(*ids)) if ids else JSONResponse(error_body(fault), 422)
        status, body = error_response(path, error)
        return JSONResponse(body, status, {"retry-after": "1"} if status == 429 else None)

    for kind in (KshotError, RequestValidationError, HTTPException, Exception):
        api.add_exception_handler(kind, answered)


# What /openapi.json says beyond what FastAPI derives

REFERENCE = "#/components/schemas/{model}"
KEYS = {
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "bearer": {"type": "http", "scheme": "bearer"},
}


class Failure(StrictBody):
    """What went wrong, in one line, and whose fault it is."""

    error: str
    category: Literal["user", "server"]


class OpenAIError(StrictBody):
    """An error as OpenAI's clients read it."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIFailure(StrictBody):
    """What went wrong, in OpenAI's form."""

    error: OpenAIError
    category: Literal["user", "server"]


def _failures(model: type[StrictBody]) -> dict[int | str, dict[str, Any]]:
    return {
        "4XX": {"description": "The request is wrong, or comes at a wrong time", "model": model},
        "5XX": {"description": "The server failed", "model": model},
    }


def _describe(api: FastAPI) -> None:
    derived = api.openapi

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            schema = derived()
            sample = TypeAdapter(types.SampleRequest).json_schema(ref_template=REFERENCE)
            schema["components"]["schemas"] |= sample.pop("$defs", {}) | {"SampleRequest": sample}
            schema["components"]["securitySchemes"] = KEYS
            schema["security"] = [{name: []} for name in KEYS]
            api.openapi_schema = schema
        return api.openapi_schema

    api.openapi = openapi  # type: ignore[method-assign]  # as the framework's manual says
