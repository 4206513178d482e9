"""The server as one ASGI application: endpoints, errors, and the guard before them. Knows no sockets."""

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from kshot_errors import KshotError, RequestError
from vlm.server import openai_errors, openai_routes, page, routes_lists, routes_training, watch
from vlm.server.answers import PROTOBUF, error_body, status_of
from vlm.server.core import Core
from vlm.server.description import describe
from vlm.server.guard import Body, Budget, Guard, hosts_of
from vlm.server.keys import Keys
from vlm.server.openai_models import OpenAIModels
from vlm.server.routes_training import first_fault
from vlm.server.sampling import Samples
from vlm.server.training import Training

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
    `vlm.server.sampling.Samples`. Raises InputError for a host that is no name."""

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


def application(core: Core, options: Options) -> Any:
    """The ASGI application of a server; it closes `core` when it ends."""
    requests: Counter[tuple[str, int]] = Counter()
    api = FastAPI(title="kshot", docs_url=None, redoc_url=None, lifespan=_lifespan(core))
    samples = Samples(core, options.image_log_probs)
    training = Training(core)
    api.include_router(routes_training.routes(core, training, samples))
    api.include_router(routes_lists.routes(core))
    api.include_router(watch.routes(core, requests, options.address))
    for prefix in OPENAI:
        api.include_router(openai_routes.router(OpenAIModels(core), options.allow_urls), prefix=prefix)
    api.include_router(page.routes())
    free = frozenset({HEALTH, *PAGE})
    describe(api, OPENAI, free)
    _errors(api, training)
    api.add_middleware(watch.Requests, counts=requests)
    return Guard(api, options.keys, options.names, free, BODIES, told, Budget())


def _lifespan(core: Core) -> Any:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tidying = asyncio.create_task(core.keep_tidy())
        yield
        tidying.cancel()
        with suppress(asyncio.CancelledError):
            await tidying
        await core.close()

    return lifespan


def told(path: str, error: Exception) -> tuple[int, dict[str, Any]]:
    """An error's HTTP status and body, in the form that the clients of a path read."""
    if path.startswith(OPENAI):
        return openai_errors.described(error)
    return status_of(error), error_body(error)


def _errors(api: FastAPI, training: Training) -> None:
    """All in the protocol's form, {"error", "category"}."""

    @api.exception_handler(KshotError)
    async def ours(request: Request, error: KshotError) -> JSONResponse:
        status, body = told(request.url.path, error)
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
            _, body = openai_errors.described(error)
        return JSONResponse(body, error.status_code, error.headers)

    @api.exception_handler(Exception)
    async def unforeseen(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body(error), 500)  # the framework logs it
