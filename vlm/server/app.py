"""The server as one ASGI application: endpoints, errors, and the guard before them. Knows no sockets.

TODO What /openapi.json says beyond what the framework derives: errors, keys, and content that endpoints read or write
themselves. Knows no endpoint's work.
"""

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, TypeAdapter
from starlette.exceptions import HTTPException
from tinker import types

from kshot.errors import KshotError, RequestError
from vlm.server import page, watch
from vlm.server.futures import JSON, PROTOBUF, error_body, status_of
from vlm.server.guard import Body, Budget, Guard, Keys, Requests, hosts_of
from vlm.server.openai import responses
from vlm.server.openai import routes as openai_routes
from vlm.server.openai.models import OpenAIModels
from vlm.server.state import ServerState
from vlm.server.tinker import routes as tinker_routes
from vlm.server.tinker.routes import first_fault
from vlm.server.tinker.sampling import SamplingService
from vlm.server.tinker.training import TrainingService

# ---- What /openapi.json says beyond what the framework derives: errors, keys, and content that endpoints read or

REFERENCE = "#/components/schemas/{model}"
EVENTS, TEXT = "text/event-stream", "text/plain"
KEYS = {
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "bearer": {"type": "http", "scheme": "bearer"},
}


class Failure(BaseModel):
    """What went wrong, in one line, and whose fault it is."""

    model_config = ConfigDict(extra="forbid")
    error: str
    category: Literal["user", "server"]


class OpenAIError(BaseModel):
    """As OpenAI's clients read it."""

    model_config = ConfigDict(extra="forbid")
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIFailure(BaseModel):
    """The same in OpenAI's form."""

    model_config = ConfigDict(extra="forbid")
    error: OpenAIError
    category: Literal["user", "server"]


SCHEMAS: dict[str, Any] = {"Failure": Failure, "OpenAIFailure": OpenAIFailure, "SampleRequest": types.SampleRequest}
ANSWERS = {"/api/v1/retrieve_future": (JSON, PROTOBUF), "/metrics": (TEXT,)}  # else JSON


def describe(api: FastAPI, openai: tuple[str, ...], free: frozenset[str]) -> None:
    """Let an application's description say all of it. openai: prefixes of paths whose errors have OpenAI's form.
    free: paths that need no key."""
    derived = api.openapi

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            api.openapi_schema = _completed(derived(), openai, free)
        return api.openapi_schema

    api.openapi = openapi  # type: ignore[method-assign]  # as the framework's manual says


def _completed(schema: dict[str, Any], openai: tuple[str, ...], free: frozenset[str]) -> dict[str, Any]:
    components = schema["components"]
    components["securitySchemes"] = KEYS
    schema["security"] = [{name: []} for name in KEYS]
    for name, kind in SCHEMAS.items():
        own = TypeAdapter(kind).json_schema(ref_template=REFERENCE)
        components["schemas"] |= own.pop("$defs", {}) | {name: own}
    for unused in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(unused, None)
    for path, operations in schema["paths"].items():
        failure = "OpenAIFailure" if path.startswith(openai) else "Failure"
        for method, operation in operations.items():
            _complete(operation, path, failure)
            if path.startswith(openai) and method == "post":
                operation["responses"]["200"]["content"][EVENTS] = {}
            if path in free:
                operation["security"] = []
    return schema


def _complete(operation: dict[str, Any], path: str, failure: str) -> None:
    content = {JSON: {"schema": _reference(failure)}}
    operation["responses"].pop("422", None)
    operation["responses"] |= {
        "4XX": {"description": "The request is wrong, or comes at a wrong time", "content": content},
        "5XX": {"description": "The server failed", "content": content},
    }
    if path in ANSWERS:
        operation["responses"]["200"]["content"] = {kind: {} for kind in ANSWERS[path]}


def _reference(name: str) -> Mapping[str, str]:
    return {"$ref": REFERENCE.format(model=name)}


# ---- The server as one ASGI application: endpoints, errors, and the guard before them. Knows no sockets.

OPENAI = ("/v1", "/oai/api/v1")
LARGE = Body(limit=64 << 20)  # images in base64, long prompts
BODIES = {
    "/api/v1/forward_backward": Body(PROTOBUF, 32 << 20),  # the SDK sends parts of 5 MB; one datum may be larger
    "/api/v1/asample": LARGE,
    **{f"{prefix}/{name}": LARGE for prefix in OPENAI for name in ("completions", "chat/completions")},
}
HEALTH = "/api/v1/healthz"
PAGE = ("/", "/page/page.css", "/page/page.js")  # nothing in them is anybody's; what they show needs a key


@dataclass(frozen=True)
class Options:
    """How a server is reached. host, port: where it listens. keys: who may ask. hosts: further names that requests may
    be addressed to. allow_urls: whether images may be fetched from http addresses. image_log_probs: see
    `vlm.server.tinker.sampling.Samples`. Raises InputError for a host that is no name."""

    host: str = "127.0.0.1"
    port: int = 8000
    keys: Keys = field(default_factory=Keys)
    hosts: tuple[str, ...] = ()
    allow_urls: bool = False
    image_log_probs: float = math.nan

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


def application(state: ServerState, options: Options) -> Any:
    """The ASGI application of a server; it closes `state` when it ends."""
    requests: Counter[tuple[str, int]] = Counter()
    api = FastAPI(title="kshot", docs_url=None, redoc_url=None, lifespan=_lifespan(state))
    samples = SamplingService(state, options.image_log_probs)
    training = TrainingService(state)
    api.include_router(tinker_routes.routes(state, training, samples))
    api.include_router(tinker_routes.list_routes(state))
    api.include_router(watch.routes(state, requests, options.address))
    for prefix in OPENAI:
        api.include_router(openai_routes.router(OpenAIModels(state), options.allow_urls), prefix=prefix)
    api.include_router(page.routes())
    free = frozenset({HEALTH, *PAGE})
    describe(api, OPENAI, free)
    _errors(api, training)
    api.add_middleware(Requests, counts=requests)
    return Guard(api, options.keys, options.names, free, BODIES, error_response, Budget())


def _lifespan(state: ServerState) -> Any:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tidying = asyncio.create_task(state.keep_tidy())
        yield
        tidying.cancel()
        with suppress(asyncio.CancelledError):
            await tidying
        await state.close()

    return lifespan


def error_response(path: str, error: Exception) -> tuple[int, dict[str, Any]]:
    """An error's HTTP status and body, in the form that the clients of a path read."""
    if path.startswith(OPENAI):
        return responses.described(error)
    return status_of(error), error_body(error)


def _errors(api: FastAPI, training: TrainingService) -> None:
    """All in the protocol's form, {"error", "category"}."""

    @api.exception_handler(KshotError)
    async def ours(request: Request, error: KshotError) -> JSONResponse:
        status, body = error_response(request.url.path, error)
        return JSONResponse(body, status, {"retry-after": "1"} if status == 429 else None)

    @api.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        fault = RequestError(first_fault(error.errors()))
        if (taken := training.refused(error.body, fault)) is not None:
            return JSONResponse(taken)
        return JSONResponse(error_body(fault), 422)

    @api.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> JSONResponse:
        path = request.url.path
        body = {"error": f"{request.method} {path}: {error.detail}", "category": "user"}
        if path.startswith(OPENAI):
            _, body = responses.described(error)
        return JSONResponse(body, error.status_code, error.headers)

    @api.exception_handler(Exception)
    async def unforeseen(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body(error), 500)  # the framework logs it
