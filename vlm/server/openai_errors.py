"""Errors in the form that OpenAI's clients read. Knows no endpoint."""

import logging
import reprlib
from collections.abc import Callable, Coroutine, Sequence
from itertools import groupby
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException  # of which FastAPI's own is a kind

from kshot_errors import ImageError, KshotError, MissingError, ModelError, UnknownNameError
from vlm.server.answers import INTERNAL, status_of

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
