"""How JSON bodies are read: strictly, so that whatever is taken can be kept and sent again. Knows no endpoint.

Python's own reader takes halves of surrogate pairs, which nothing can send, NaN, which is no JSON, and depths at which
whoever looks at the value later runs out of stack.
"""

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json


class Strict(Request):
    """A request whose body is JSON by the letter of RFC 8259, at most some 200 levels deep."""

    async def json(self) -> Any:
        """The value. Raises json.JSONDecodeError, which the framework answers."""
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from error


class Route(APIRoute):
    """A route that is given its body so."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        inner = super().get_route_handler()

        async def handler(request: Request) -> Response:
            return await inner(Strict(request.scope, request.receive))

        return handler
