"""What a connection may take: bytes of a head, seconds for each part of a request, and how many there may be.

A protocol on top of uvicorn's (llhttp, which it parses with, has no limit of a head). Seconds are counted by the event
loop, one at a time: while it is held up, or the machine sleeps, no client's time runs out.

Where there are too many connections, the one is closed that has been without a whole request for the longest: who opens
many at once closes his own, and who sends a request at once is served.
"""

import asyncio
import json
import logging
import resource
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from http import HTTPStatus
from ipaddress import IPv6Address, ip_address
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

log = logging.getLogger("kshot.server")

MOST = 4096  # connections at once; half of them may be of one address
RESERVE = 512  # file descriptors that are not for connections: files, and what is accepted in one turn
BACKLOG = 256  # connections that are accepted in one turn of the event loop
HEAD = 64 << 10  # bytes of a request's head, and of what comes between and after the parts of a body
FIELDS = 256  # lines of a head
HEADS = 32 << 20  # bytes of all heads that are in memory
PIPELINED = 8  # requests that a client may send before it has the answer to the first
HEAD_SECONDS = 20  # for a whole head
PATIENCE = 60  # seconds for a body, beside those that RATE gives; and until a client takes what is ready for it
RATE = 16 << 10  # bytes of a body a second
KEEP_ALIVE = 60  # seconds between an answer and the next request
PIECE = 64 << 10  # bytes of an answer that are handed over at once, the next when they are taken
UNREAD = 128 << 20  # bytes of all answers that clients have not taken yet, of those that are larger than PIECE


class Reading(Enum):
    """What is read next from a connection."""

    NOTHING = "nothing"
    HEAD = "a head"
    BODY = "a body"


def most_connections() -> int:
    """How many connections there are file descriptors for, at most MOST. The process's limit is raised where it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST + RESERVE
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return MOST if soft == resource.RLIM_INFINITY else min(MOST, max(soft - RESERVE, soft // 2))


@dataclass(eq=False)
class Connections:
    """All connections of one server. most: how many there may be. second: of the clock that times them; tests have
    shorter ones. closed: how many were closed, by reason."""

    most: int = MOST
    second: float = 1.0
    open: set["Connection"] = field(default_factory=set)
    closed: Counter[str] = field(default_factory=Counter)
    now: int = 0
    heads: int = 0
    unread: int = 0

    def __post_init__(self) -> None:
        self._of_place = Counter[str]()
        self._waiting = dict[str, dict[Connection, None]]()  # by place, those without a whole request, longest first
        self._sending = dict[Connection, int]()  # bytes of their answers, those that began first
        self._said, self._ticking = 0, False

    def protocol(self, **given: Any) -> "Connection":
        """A new connection; `http` of `uvicorn.Config`."""
        return Connection(self, **given)

    def admit(self, new: "Connection") -> bool:
        """Count a new connection, and close another one where there are too many. False: nothing could be closed."""
        if len(self.open) >= self.most and not self.close_longest("too many connections"):
            return False
        if self._of_place[new.place] >= self.most // 2 and not self.close_longest("too many connections", new.place):
            return False
        self.open.add(new)
        if not self._ticking:
            self._wait()
        self._of_place[new.place] += 1
        self.waits(new)
        return True

    def forget(self, connection: "Connection") -> None:
        """A connection has ended, or is about to."""
        if connection in self.open:
            self.open.remove(connection)
            self.is_served(connection)
            self.hold(connection, 0)
            self._of_place[connection.place] -= 1
            if not self._of_place[connection.place]:
                del self._of_place[connection.place]

    def waits(self, connection: "Connection") -> None:
        """A connection has no whole request now."""
        self.is_served(connection)
        if connection in self.open:
            self._waiting.setdefault(connection.place, {})[connection] = None

    def is_served(self, connection: "Connection") -> None:
        """A connection has a whole head."""
        others = self._waiting.get(connection.place, {})
        others.pop(connection, None)
        if not others:
            self._waiting.pop(connection.place, None)

    def close_longest(self, why: str, place: str | None = None) -> bool:
        """Close the connection that has been without a request for the longest, of one place or of the place that has
        most of them. False: there is none."""
        if place is None and self._waiting:
            place = max(self._waiting, key=lambda each: self._of_place[each])
        longest = next(iter(self._waiting.get(place or "", {})), None)
        if longest is not None:
            longest.end(why)
        return longest is not None

    def hold(self, connection: "Connection", size: int) -> bool:
        """Note how many bytes of a head a connection keeps. False: there is no room for them."""
        self.heads += size - connection.held
        connection.held = size
        while self.heads > HEADS:
            waiting = (each for others in self._waiting.values() for each in others)
            other = next((each for each in waiting if each.held and each is not connection), None)
            if other is None:
                return False
            other.end("too many heads")
        return True

    @contextmanager
    def sending(self, connection: "Connection", size: int) -> Iterator[None]:
        """Within: an answer of so many bytes is sent. Where all are too large together, those that began first end."""
        self._sending[connection] = size
        self.unread += size
        while self.unread > UNREAD and len(self._sending) > 1:
            first = next(iter(self._sending))
            self.unread -= self._sending.pop(first)
            first.end("answers not read")
        try:
            yield
        finally:
            self.unread -= self._sending.pop(connection, 0)

    def _tick(self) -> None:
        self._wait()  # first: whatever happens to one, the others' time goes on
        self.now += 1
        for each in [*self.open]:
            each.check(self.now)
        total = self.closed.total()
        if self.now % 60 == 0 and total > self._said:
            log.warning("%d connections closed: %s", total - self._said, dict(self.closed))
            self._said = total

    def _wait(self) -> None:
        self._ticking = bool(self.open)
        if self._ticking:
            asyncio.get_running_loop().call_later(self.second, self._tick)


class Connection(HttpToolsProtocol):
    """One connection. place: whose it is. held: bytes of its head that are in memory."""

    def __init__(self, all_: Connections, **given: Any) -> None:
        super().__init__(**given)
        self.all, self.place, self.held = all_, "", 0
        self.app = partial(self._answer, self.app)
        self._reading, self._since, self._unparsed, self._received = Reading.HEAD, 0, 0, 0
        self._fields, self._unanswered = 0, deque[RequestResponseCycle]()
        self._paused: int | None = None
        self._closing: int | None = None

    # What comes

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        transport.set_write_buffer_limits(PIECE >> 2)
        self.place, self._since = _place(self.client), self.all.now
        if not self.all.admit(self):
            self._refuse(503, "too many connections; try again later")

    def data_received(self, data: bytes) -> None:
        start = 0
        while start < len(data) and not self.transport.is_closing():
            part = data[start : start + HEAD - self._unparsed]  # no more of a head than it may have
            start += len(part)
            self._unparsed += len(part)
            super().data_received(part)
            if self._unparsed >= HEAD and not self.transport.is_closing():
                self._refuse(431, f"the head of a request may have {HEAD:,} bytes")
        if self._reading is Reading.HEAD and not self.all.hold(self, self._unparsed):
            self._refuse(503, "too many large heads at once; try again later")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._reading, self._since, self._fields = Reading.HEAD, self.all.now, 0

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields += 1  # those of a trailer too
        if self._fields <= FIELDS:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.transport.is_closing():
            pass
        elif self._fields > FIELDS:
            self._refuse(431, f"the head of a request may have {FIELDS} lines")
        elif len(self._unanswered) > PIPELINED:
            self._refuse(429, f"{PIPELINED} requests of this connection wait already")
        else:
            self._reading, self._since, self._unparsed, self._received = Reading.BODY, self.all.now, 0, 0
            self.all.is_served(self)
            if not self.all.hold(self, len(self.url) + sum(len(name) + len(value) for name, value in self.headers)):
                self._refuse(503, "too many large heads at once; try again later")
                return
            super().on_headers_complete()
            self._unanswered.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        if not self.transport.is_closing():
            self._unparsed = 0
            self._received += len(body)
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self.transport.is_closing():
            self._reading, self._since = Reading.NOTHING, self.all.now
            super().on_message_complete()

    # What goes

    async def _answer(self, app: Any, scope: Any, receive: Any, send: Any) -> None:
        """The application, whose large answers are handed over in pieces: what a client does not read is not copied."""

        async def send_pieces(message: Any) -> None:
            body = message.get("body", b"")
            if len(body) <= PIECE:
                await send(message)
                return
            with self.all.sending(self, len(body)):
                for start in range(0, len(body), PIECE):
                    if self.transport.is_closing():  # or every piece would be made, and dropped
                        break
                    more = message.get("more_body", False) or start + PIECE < len(body)
                    await send({**message, "body": body[start : start + PIECE], "more_body": more})

        await app(scope, receive, send_pieces)

    def on_response_complete(self) -> None:
        finished = self._unanswered.popleft()
        super().on_response_complete()
        if not self._unanswered:
            if self.scope is finished.scope:  # and not that of a request which has begun to come
                self.scope, self.headers, self.url = {}, [], b""  # type: ignore[typeddict-item]
                self.all.hold(self, 0)
            finished.scope = {"method": finished.scope["method"]}  # type: ignore[typeddict-item]
            self.all.waits(self)
            if self._reading is Reading.NOTHING:
                self._since = self.all.now

    def pause_writing(self) -> None:
        super().pause_writing()
        self._paused = self.all.now

    def resume_writing(self) -> None:
        super().resume_writing()
        self._paused = None

    # How long it takes, and its end

    def check(self, now: int) -> None:
        """End what takes too long. now: seconds that the event loop has counted."""
        passed = now - self._since
        if self.transport.is_closing():  # with bytes that the client does not take
            self._closing = now if self._closing is None else self._closing
            if now - self._closing > PATIENCE:
                self.end("answer not read")
        elif self._paused is not None and now - self._paused > PATIENCE:
            self.end("answer not read")
        elif self._reading is Reading.HEAD and passed > HEAD_SECONDS and not self._unparsed:
            self.transport.close()  # a browser opens some in advance
        elif self._reading is Reading.HEAD and passed > HEAD_SECONDS:
            self._refuse(408, f"no whole head of a request came within {HEAD_SECONDS} seconds")
        elif self._reading is Reading.BODY and not self.flow.read_paused and passed > PATIENCE + self._received / RATE:
            self._refuse(408, f"the body came at less than {RATE:,} bytes a second; send it again")
        elif self._reading is Reading.NOTHING and not self._unanswered and passed > KEEP_ALIVE:
            self.transport.close()

    def end(self, why: str) -> None:
        """Close the connection now; what was not taken is dropped."""
        self.all.closed[why] += 1
        self.all.forget(self)
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.all.forget(self)
        for each in self._unanswered:  # uvicorn tells the last of them alone
            each.disconnected = True
            each.message_event.set()
        super().connection_lost(exc)

    def _refuse(self, status: int, message: str) -> None:
        """Say why, unless an answer is under way, and close."""
        reason, waiting = HTTPStatus(status).phrase.lower(), len(self._unanswered)
        own = waiting == 1 and self._reading is Reading.BODY and not self.cycle.response_started
        if waiting and not own:
            self.end(reason)
            return
        self.all.closed[reason] += 1
        body = json.dumps({"error": message, "category": "user" if status < 500 and status != 429 else "server"})
        lines = ["content-type: application/json", f"content-length: {len(body)}", "connection: close", "", body]
        self.transport.write(STATUS_LINE[status] + "\r\n".join(lines).encode())
        self.transport.close()


def _place(client: tuple[str, int] | None) -> str:
    """Whose an address is. Of IPv6, the first 64 bits: whoever has one of them has them all."""
    if client is None:
        return ""
    address = ip_address(client[0].partition("%")[0])
    if not isinstance(address, IPv6Address):
        return client[0]
    return str(address.ipv4_mapped or int(address) >> 64)
