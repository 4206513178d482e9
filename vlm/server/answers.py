"""What a request is answered with, and which HTTP status an error has. Knows no endpoint."""

import json
import logging
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any

from kshot_errors import (
    BusyError,
    DeniedError,
    InputError,
    KshotError,
    LostError,
    MissingError,
    TooLargeError,
    UnauthorizedError,
    UnsupportedError,
)

log = logging.getLogger("kshot.server")

JSON, PROTOBUF = "application/json", "application/x-protobuf"
INTERNAL = "the server failed; its log says more"


STATUS = (  # the first that fits
    (TooLargeError, 413),
    (UnauthorizedError, 401),
    (UnsupportedError, 415),
    (LostError, 410),
    (DeniedError, 403),
    (MissingError, 404),
    (BusyError, 429),
    (InputError, 400),
)


@dataclass(frozen=True)
class Answer:
    """A finished request's result. failed: whether it is an error, which the client is told all the same."""

    content: bytes
    content_type: str = JSON
    failed: bool = False


def status_of(error: BaseException) -> int:
    """The HTTP status of an error that is answered at once."""
    return next((status for kind, status in STATUS if isinstance(error, kind)), 500)


def error_body(error: BaseException) -> dict[str, str]:
    """The Tinker protocol's form of an error: one line, and whose fault it is; of an unforeseen one no detail."""
    if isinstance(error, CancelledError):
        return {"error": "the request was cancelled", "category": "user"}
    message = str(error) if isinstance(error, (InputError, BusyError)) else INTERNAL
    return {"error": message, "category": "user" if isinstance(error, InputError) else "server"}


def json_answer(value: Any, *, failed: bool = False) -> Answer:
    """An answer in JSON."""
    return Answer(json.dumps(value, separators=(",", ":")).encode(), failed=failed)


def error_answer(error: BaseException) -> Answer:
    """An answer that says what went wrong. What nobody meant to raise is logged: the answer says nothing of it."""
    if not isinstance(error, KshotError | CancelledError):
        log.error("a request failed", exc_info=error)
    return json_answer(error_body(error), failed=True)


def outcome(future: "Future[Any]") -> Any:
    """What a finished future holds: its result, or the exception that it raised."""
    if future.cancelled():
        return CancelledError()
    return future.exception() or future.result()
