"""With what a request comes, and how much of it: as an attacker would, over a socket."""

import gzip
import json
import math
import re
from collections.abc import Iterator

import pytest
import zstandard

from kshot.errors import RequestError
from tests.traced import traced
from tests.vlm.raw import FORWARD, JSON, PROTOBUF, SESSION, SESSION_BODY, Raw, refused, until
from tests.vlm.serving import KEY, Server, dial, reply, served
from vlm.server import connections
from vlm.server.app import BODIES
from vlm.server.guard import PLAIN, unpack, unpacked_size

ZSTD = {**PROTOBUF, "Content-Encoding": "zstd"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("state")) as running:
        running.app.rate_limit.rate = math.inf  # most of these requests are refused
        yield running


# With what


def test_content_of_other_types_is_not_read(raw: Raw) -> None:
    body = json.dumps(SESSION_BODY).encode()
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/x-protobuf",
        "application/json, text/plain",
        "",
    ):
        refused(raw.http.post(SESSION, content=body, headers={"Content-Type": kind}), 415, "send application/json")
    refused(raw.http.post(SESSION, content=body), 415)
    refused(raw.http.post(SESSION, content=iter([body])), 415)
    refused(raw.http.post(FORWARD, content=body, headers=JSON), 415, "send application/x-protobuf")
    for kind in ("application/json; charset=utf-8", "Application/JSON"):
        assert raw.http.post(SESSION, content=body, headers={"Content-Type": kind}).status_code == 200


def test_other_encodings_are_not_read(raw: Raw) -> None:
    body = json.dumps(SESSION_BODY).encode()
    for encoding in ("gzip", "deflate", "br", "zstd, gzip", "x"):
        headers = {**JSON, "Content-Encoding": encoding}
        refused(raw.http.post(SESSION, content=gzip.compress(body), headers=headers), 415, "zstd")
    packed = zstandard.compress(body)
    for encoding, content in (("zstd", packed), ("ZSTD", packed), ("identity", body)):
        headers = {**JSON, "Content-Encoding": encoding}
        assert raw.http.post(SESSION, content=content, headers=headers).status_code == 200


def bomb(size: int) -> bytes:
    """So many zeros as one frame of zstd."""
    packing = zstandard.ZstdCompressor(level=1).compressobj(size=size)
    block = bytes(1 << 24)
    parts = [packing.compress(block) for _ in range(size >> 24)]
    return b"".join(parts) + packing.flush()


def test_bombs_cost_no_memory(raw: Raw) -> None:
    """The server is in this process."""
    one = bomb(1 << 30)
    assert len(one) < 1 << 17
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 26))
    whole = zstandard.compress(bytes(1 << 26))
    with traced(16 << 20):
        refused(raw.http.post(FORWARD, content=one, headers=ZSTD), 413, "33,554,432 bytes")
        refused(raw.http.post(SESSION, content=one, headers={**JSON, "Content-Encoding": "zstd"}), 413, "4,194,304")
        refused(raw.http.post(FORWARD, content=unsized, headers=ZSTD), 400, "how large its content is")
        refused(raw.http.post(FORWARD, content=whole, headers=ZSTD), 413)


def test_frames_that_are_not_whole(raw: Raw) -> None:
    packed = zstandard.compress(b"x" * 100_000)
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    for content in (
        b"",
        b"x",
        packed[:3],
        packed[:-1],
        packed + packed,
        packed * 1000,
        packed + b"x",
        skippable,
        skippable + packed,
        packed + skippable,
        b"\0" * 100,
    ):
        refused(raw.http.post(FORWARD, content=content, headers=ZSTD), 400, "zstd")
    assert unpack(packed) == b"x" * unpacked_size(packed) == b"x" * 100_000


def test_frames_that_say_they_hold_another_size() -> None:
    whole = zstandard.ZstdCompressor(write_checksum=True).compress(b"x" * 200)
    assert whole[5] == 200
    for size in (1, 199, 201, 255):
        with pytest.raises(RequestError, match="zstd"):
            unpack(bytes([*whole[:5], size, *whole[6:]]))
    with pytest.raises(RequestError, match="how large"):
        unpacked_size(bytes([*whole[:5], 0, *whole[6:]]))


# How much of it


def head(length: int | str | None) -> bytes:
    """Of a request for a session, whose body has this length or, for None, does not say how long it is."""
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    lines = [f"POST {SESSION} HTTP/1.1", "Host: localhost", f"X-API-Key: {KEY}", "Content-Type: application/json", size]
    return "\r\n".join([*lines, "", ""]).encode()


def test_large_bodies_are_refused_by_what_they_say(server: Server) -> None:
    """Before any of it is sent."""
    for length in (PLAIN.limit + 1, 10**18):
        assert reply(server, head(length)).startswith(b"HTTP/1.1 413 ")
    for wrong in ("-1", "abc", "1, 2", "9" * 5000, "+5", "1_0"):
        answer = reply(server, head(wrong))
        assert re.match(rb"HTTP/1.1 4(00|13) ", answer), answer[:60]
        assert b"Traceback" not in answer


def test_large_bodies_are_refused_before_all_of_it_is_read(server: Server) -> None:
    """Of one that does not say how long it is, and would go on for a gigabyte."""
    sent = 0
    with traced(32 << 20), dial(server) as connection:
        connection.sendall(head(None))
        chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
        try:
            for _ in range(1024):
                connection.sendall(chunk)
                sent += len(chunk)
        except (BrokenPipeError, ConnectionResetError):
            pass
    assert PLAIN.limit < sent < 64 << 20  # what was on its way when it hung up


def test_what_fits_is_taken(raw: Raw) -> None:
    body = json.dumps(SESSION_BODY).encode()
    assert raw.http.post(SESSION, content=body.rjust(PLAIN.limit), headers=JSON).status_code == 200
    refused(raw.http.post(SESSION, content=body.rjust(PLAIN.limit + 1), headers=JSON), 413)
    limit = BODIES[FORWARD].limit
    refused(raw.http.post(FORWARD, content=bytes(limit), headers=PROTOBUF), 400, "no protobuf")
    refused(raw.http.post(FORWARD, content=zstandard.compress(bytes(limit)), headers=ZSTD), 400, "no protobuf")
    refused(raw.http.post(FORWARD, content=zstandard.compress(bytes(limit + 1)), headers=ZSTD), 413)


def test_json_of_too_many_values_is_not_read(raw: Raw) -> None:
    for path in ("/api/v1/asample", "/v1/completions", "/oai/api/v1/chat/completions", SESSION):
        for value in (b"[]", b"1", b'"a"'):
            content = b"[" + value + (b"," + value) * BODIES.get(path, PLAIN).values + b"]"
            assert len(content) < PLAIN.limit
            refused(raw.http.post(path, content=content, headers=JSON), 413, "values")
        refused(raw.http.post(path, content=b"[" * (1 << 20), headers=JSON))


def test_many_wrong_values_are_not_all_noted(raw: Raw) -> None:
    """A megabyte of wrong tags: the framework would note each of them, 500 MB in all."""
    content = json.dumps({"sdk_version": "1", "tags": [1] * (1 << 19)}).encode()
    with traced(32 << 20):
        refused(raw.http.post(SESSION, content=content, headers=JSON), 413, "values")


def test_too_much_at_once_is_asked_for_again_later(server: Server, raw: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bodies that do not end, until there is no room; and room again when they have gone."""
    memory = server.app.memory
    assert memory is server.state.memory
    monkeypatch.setattr(memory, "limit", 20 << 20)  # a body takes five times its bytes, with what is made of it
    body = json.dumps(SESSION_BODY).encode()
    before = sum(memory.taken.values())
    with dial(server) as first:
        first.sendall(head(4 << 20) + b" " * ((4 << 20) - 1))
        until(lambda: memory.taken["bodies"] == (4 << 20) - 1)
        assert raw.http.post(SESSION, content=body, headers=JSON).status_code == 200  # small ones go on
        late = raw.http.post(SESSION, content=body.rjust(3 << 20), headers=JSON)
        refused(late, 429, "again later")
        assert late.headers["retry-after"] == "1"
        packed = zstandard.compress(body.rjust(3 << 20))
        refused(raw.http.post(SESSION, content=packed, headers={**JSON, "Content-Encoding": "zstd"}), 429)
    until(lambda: sum(memory.taken.values()) == before)
    assert raw.http.post(SESSION, content=body.rjust(3 << 20), headers=JSON).status_code == 200
    monkeypatch.setattr(memory, "limit", 10 << 20)
    refused(raw.http.post(SESSION, content=body.rjust(3 << 20), headers=JSON), 413, "--memory")
    until(lambda: sum(memory.taken.values()) == before)


def test_a_body_that_stops_coming_is_not_waited_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "PATIENCE", 0)
    with dial(server) as slow:
        slow.sendall(head(99) + b"{")
        assert slow.recv(4096).startswith(b"HTTP/1.1 408")
    until(lambda: server.app.memory.taken["bodies"] == 0)  # its part is given back
