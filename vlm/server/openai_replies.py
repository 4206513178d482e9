"""Bodies and event streams for as long as the client is there to read them. Knows no endpoint and no model."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, TypeVar

from fastapi import HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from vlm.server.openai_answers import Fields
from vlm.server.openai_errors import described

T = TypeVar("T")
CLOSED_REQUEST = 499  # nginx's status for a client that went away; nobody reads it


async def whole(request: Request, work: Awaitable[Fields]) -> Response:
    """One body of JSON."""
    return JSONResponse(await _unless_gone(request, work))


async def stream(request: Request, pieces: AsyncGenerator[Fields]) -> Response:
    """Server-sent events. What goes wrong before the first of them is an error like any other."""
    first = await _unless_gone(request, anext(pieces))
    return _Events(_events(first, pieces), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def _events(first: Fields, pieces: AsyncGenerator[Fields]) -> AsyncGenerator[str]:
    try:
        yield _event(first)
        async for piece in pieces:
            yield _event(piece)
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield _event(described(error)[1])
    finally:
        await pieces.aclose()


def _event(data: Fields) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


class _Events(StreamingResponse):
    """A stream that closes what it streams, however it ends."""

    async def __call__(self, *args: Any) -> None:
        body: Any = self.body_iterator
        try:
            await super().__call__(*args)
        finally:
            await body.aclose()


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The work's result; where the client goes away first, the work is cancelled."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(CLOSED_REQUEST, "the client went away")
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    """Until the client goes away; its whole body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
