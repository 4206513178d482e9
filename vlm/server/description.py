"""What /openapi.json says beyond what the framework derives: errors, keys, and content that endpoints read or write
themselves. Knows no endpoint's work."""

from collections.abc import Mapping
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, TypeAdapter
from tinker import types

from vlm.server.answers import JSON, PROTOBUF

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
