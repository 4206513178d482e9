"""Heads, bodies and answers that do not end, and too many connections: who asks plainly is served."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest

from tests.traced import traced
from tests.vlm.raw import Raw, until
from tests.vlm.serving import Server, listening
from vlm.server import connections
from vlm.server.connections import (
    FIELDS,
    HEAD,
    HEAD_SECONDS,
    KEEP_ALIVE,
    PATIENCE,
    PIPELINED,
    Connections,
    most_connections,
)

LATER = 3600.0  # after which a clock would tick: time passes where a test says so, on any machine
ANSWER = b"x" * (16 << 20)  # more than the buffers of both sockets


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Says how many bytes came; at /large a long answer; at /never none."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, more = size + len(message["body"]), message["more_body"]
    if scope["path"] == "/never":
        await receive()  # until it hangs up
        return
    body = ANSWER if scope["path"] == "/large" else b"%d" % size
    length = (b"content-length", b"%d" % len(body))
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def kept() -> Connections:
    return Connections(most=40, second=LATER)


@pytest.fixture
def seconds(kept: Connections) -> Callable[[int], None]:
    """Lets so many seconds pass, once there is a connection."""

    def passed(number: int) -> None:
        until(lambda: bool(kept.open))
        loop, done = next(iter(kept.open)).loop, threading.Event()
        for _ in range(number):
            loop.call_soon_threadsafe(kept._tick)
        loop.call_soon_threadsafe(done.set)
        assert done.wait(60)

    return passed


@pytest.fixture
def dial(kept: Connections) -> Iterator[Any]:
    """What opens one more connection, sends these bytes, and reads at most so many at once."""
    with listening(app, kept, lifespan="off") as address, ExitStack() as opened:
        place = address.removeprefix("http://").split(":")

        def dialled(*parts: bytes, buffer: int | None = None, source: str = "127.0.0.1") -> socket.socket:
            connection = opened.enter_context(socket.socket())
            connection.settimeout(60)
            if buffer is not None:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            connection.bind((source, 0))
            connection.connect((place[0], int(place[1])))
            with suppress(BrokenPipeError, ConnectionResetError):  # it may hang up meanwhile
                for part in parts:
                    connection.sendall(part)
            return connection

        yield dialled


def text(connection: socket.socket) -> bytes:
    """All that comes until the other side hangs up."""
    found = bytearray()
    with suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            found += part
    return bytes(found)


def head(path: str = "/", *lines: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()


ASKED = head("/", "Connection: close")


def said(answer: bytes, status: int, words: str) -> None:
    start, _, body = answer.partition(b"\r\n\r\n")
    assert start.startswith(b"HTTP/1.1 %d " % status), answer[:200]
    error = json.loads(body)
    assert set(error) == {"error", "category"}
    assert words in error["error"]


LINE = b"X-Line: " + b"x" * 1000 + b"\r\n"
ENDLESS = {
    "address": (b"GET /", b"x" * (1 << 20)),
    "name of a field": (head()[:-2], b"x" * (1 << 20)),
    "value of a field": (head()[:-2] + b"X: ", b"x" * (1 << 20)),
    "fields": (head()[:-2], LINE * 1000),
    "small fields": (head()[:-2], b"a:\r\n" * (1 << 18)),
    "empty lines": (b"", b"\r\n" * (1 << 19)),
    "trailer": (head("/", "Transfer-Encoding: chunked", method="POST") + b"1\r\nx\r\n0\r\n", LINE * 1000),
    "extension of a chunk": (head("/", "Transfer-Encoding: chunked", method="POST") + b"1;", b"x" * (1 << 20)),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_heads_without_an_end_take_no_memory(dial: Any, kept: Connections, what: str) -> None:
    """64 megabytes of each, which this process sends and reads: both count."""
    start, more = ENDLESS[what]
    with traced(4 << 20):
        ends = [dial(start, *[more] * 16) for _ in range(4)]
        answers = [text(end) for end in ends]
        until(lambda: not kept.open)
    assert kept.heads == 0
    assert kept.closed.total() == 4
    for answer in answers:
        assert not answer or answer.startswith(b"HTTP/1.1 431 "), answer[:80]  # else it hung up while we sent
    assert text(dial(ASKED)).endswith(b"\r\n0")


def test_a_head_has_so_many_bytes_and_lines(dial: Any, kept: Connections) -> None:
    for size in (HEAD - 1000, HEAD - 100):
        assert b" 200 " in text(dial(head("/", "Connection: close", "X: " + "x" * (size - 200))))[:20]
    said(text(dial(head("/", "X: " + "x" * HEAD))), 431, "65,536 bytes")
    lines = [f"X-{n}: x" for n in range(FIELDS)]
    assert b" 200 " in text(dial(head("/", "Connection: close", *lines[2:])))[:20]
    said(text(dial(head("/", *lines))), 431, "256 lines")
    assert kept.closed == {"request header fields too large": 2}


def test_what_a_head_said_is_dropped_after_the_answer(dial: Any, kept: Connections) -> None:
    """Of connections that stay open."""
    large = head("/", "X: " + "x" * 60_000)
    with traced(1 << 20):
        for _ in range(15):
            assert dial(large).recv(4096)
        until(lambda: kept.heads == 0)
    assert len(kept.open) == 15


def test_heads_have_room_together(dial: Any, kept: Connections, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADS", 200_000)
    halves = [dial(head("/", "X: " + "x" * 30_000)[:-2]) for _ in range(10)]
    until(lambda: kept.closed["too many heads"] == 4)  # the first of them
    assert kept.heads <= 200_000
    assert [text(each) for each in halves[:4]] == [b""] * 4


def test_half_heads_end_and_others_are_served_meanwhile(dial: Any, kept: Connections) -> None:
    """Many times as many as there is room for."""
    halves = [dial(head()[:30]) for _ in range(200)]
    assert len(kept.open) <= kept.most // 2
    assert text(dial(ASKED)).endswith(b"\r\n0")
    assert kept.closed["too many connections"] >= 180
    assert [text(each) for each in halves[:100]] == [b""] * 100


def test_seconds_are_those_of_a_clock(dial: Any, kept: Connections) -> None:
    kept.second = 0.01
    dial(head("/never"))
    until(lambda: kept.now > 5)


@pytest.mark.parametrize(
    ("start", "patience"),
    [(b"GET / HT", HEAD_SECONDS), (head("/", "Content-Length: 9", method="POST") + b"{", PATIENCE)],
    ids=["head", "body"],
)
def test_what_stops_coming_is_not_waited_for(
    dial: Any, kept: Connections, seconds: Any, start: bytes, patience: int
) -> None:
    stopped = dial(start)
    until(lambda: kept.heads > 0)
    seconds(patience)
    assert kept.open
    seconds(1)
    said(text(stopped), 408, "")
    assert kept.closed == {"request timeout": 1}


def test_a_body_that_comes_too_slowly_is_not_waited_for(dial: Any, kept: Connections, seconds: Any) -> None:
    slow = dial(head("/", "Content-Length: 1000000", method="POST"))
    until(lambda: kept.heads > 0)
    for _ in range(PATIENCE + 1):
        slow.sendall(b"x")
        seconds(1)
    until(lambda: kept.closed.total() == 1)
    assert kept.closed == {"request timeout": 1}


def test_what_sends_nothing_or_nothing_more_is_closed(dial: Any, kept: Connections, seconds: Any) -> None:
    nothing, idle = dial(), dial(head())
    assert idle.recv(4096)
    seconds(HEAD_SECONDS + 1)
    assert text(nothing) == b""
    assert len(kept.open) == 1
    dripping = dial(b"\r\n")
    until(lambda: kept.heads > 0)
    for _ in range(HEAD_SECONDS):
        dripping.sendall(b"\r\n")
        seconds(1)
    seconds(1)
    said(text(dripping), 408, "no whole head")
    seconds(KEEP_ALIVE - 2 * HEAD_SECONDS - 1)
    text(idle)
    until(lambda: not kept.open)


def paused(kept: Connections) -> int:
    """How many connections wait, from now on, for their clients to take what is ready."""
    return sum(each._paused == kept.now for each in [*kept.open])


def test_answers_that_nobody_reads_are_not_copied_and_end(dial: Any, kept: Connections, seconds: Any) -> None:
    """They were: as many times as there are clients."""
    with traced(6 << 20):
        readers = [dial(head("/large"), buffer=4096) for _ in range(7)]
        assert text(dial(ASKED)).endswith(b"\r\n0")
        until(lambda: paused(kept) == 7)
        seconds(PATIENCE + 1)
        assert kept.closed["answer not read"] == 7
        until(lambda: not kept.open and kept.unread == 0)
    assert all(each.fileno() > 0 for each in readers)


def test_a_slow_reader_has_the_whole_answer(dial: Any, kept: Connections, seconds: Any) -> None:
    """It takes many times as long as one who reads nothing has."""
    reader = dial(head("/large", "Connection: close"), buffer=4096)
    found = bytearray()
    for _ in range(4):
        until(lambda: paused(kept) == 1)
        seconds(PATIENCE)
        more = len(found) + (len(ANSWER) >> 3)  # a part of it
        while len(found) < more:
            found += reader.recv(1 << 16)
    assert (bytes(found) + text(reader)).endswith(ANSWER)
    assert not kept.closed


def test_unread_answers_have_room_together(dial: Any, kept: Connections, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "UNREAD", 3 * len(ANSWER))
    for _ in range(6):
        dial(head("/large"), buffer=4096)
    until(lambda: kept.closed["answers not read"] == 3)
    assert text(dial(head("/large", "Connection: close"))).endswith(ANSWER)
    until(lambda: kept.unread == 2 * len(ANSWER))


def test_there_is_room_for_other_addresses_and_for_who_is_served(dial: Any, kept: Connections) -> None:
    for _ in range(20):
        dial(head("/never"))
    until(lambda: len(kept.open) == 20)
    said(text(dial(ASKED)), 503, "too many connections")
    assert text(dial(ASKED, source="127.0.0.2")).endswith(b"\r\n0")
    for _ in range(60):
        dial(head()[:20], source="127.0.0.2")
    assert text(dial(ASKED, source="127.0.0.3")).endswith(b"\r\n0")
    assert len(kept.open) <= 40


def test_requests_ahead_of_their_answers(dial: Any, kept: Connections) -> None:
    few = dial(head() * PIPELINED + ASKED)
    assert text(few).count(b" 200 ") == PIPELINED + 1
    many = head("/never") + head() * 100_000
    with traced(4 << 20):
        assert text(dial(many)) == b""
    until(lambda: not kept.open)


def test_descriptors_are_raised_and_shared() -> None:
    import resource

    given = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, given[1]))
        assert most_connections() == min(4096, given[1] - 512)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(given[1], 4096 + 512)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, given)


def test_many_clients_of_one_machine(server: Server) -> None:
    """64 of them with 4 connections each, all open at once: few enough for a limit of 1,024 file descriptors."""

    async def one(everybody: asyncio.Barrier) -> bool:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(server.address.rpartition(":")[2]))
        await everybody.wait()
        writer.write(head("/api/v1/healthz", "Connection: close"))
        answer = await reader.read()
        writer.close()
        return b" 200 " in answer[:20]

    async def ask() -> list[bool]:
        everybody = asyncio.Barrier(256)
        return await asyncio.gather(*[one(everybody) for _ in range(256)])

    assert all(asyncio.run(ask()))
    assert not server.connections.closed


def test_they_are_in_the_metrics(raw: Raw, server: Server) -> None:
    server.connections.closed["a reason"] = 3
    shown = raw.http.get("/metrics").text.splitlines()
    assert 'kshot_connections_closed_total{reason="a reason"} 3' in shown
    assert "kshot_unread_bytes 0" in shown
    assert next(int(line.split()[1]) for line in shown if line.startswith("kshot_connections ")) >= 1
