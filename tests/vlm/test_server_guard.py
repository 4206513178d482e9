"""Who may ask, from where, with what, and how much of it: as an attacker would, over a socket."""

import gzip
import hashlib
import hmac
import json
import logging
import math
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import zstandard

from kshot.errors import InputError, RequestError
from tests.traced import traced
from tests.vlm.raw import FORWARD, JSON, PROTOBUF, SESSION, SESSION_BODY, Raw, refused, until
from tests.vlm.serving import KEY, Server, served
from vlm.server import connections, guard, page
from vlm.server.app import BODIES, HEALTH
from vlm.server.guard import PLAIN, Keys, hosts_of, is_loopback, unpack, unpacked_size

OTHER = "tml-another-key-of-it"
ZSTD = {**PROTOBUF, "Content-Encoding": "zstd"}


def kept_keys(folder: Path, *lines: str) -> Keys:
    path = folder / "keys.txt"
    path.write_text("\n".join(lines))
    return Keys.read(path)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the state folder is in."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def server(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two keys, one of them hashed in the file."""
    hashed = "sha256:" + hashlib.sha256(OTHER.encode()).hexdigest()
    known = kept_keys(tmp_path_factory.mktemp("keys"), "# ours", "", f"  {KEY}  ", hashed)
    with served(home / "state", keys=known) as running:
        running.app.rate_limit.rate = math.inf  # most of these requests are refused
        yield running


# Keys


def test_a_key_is_needed_and_both_headers_carry_it(server: Server) -> None:
    with httpx.Client(base_url=server.address) as client:
        for key in (KEY, OTHER):
            for headers in (
                {"X-API-Key": key},
                {"Authorization": f"Bearer {key}"},
                {"Authorization": f"bearer  {key}"},
            ):
                assert client.get("/api/v1/get_server_capabilities", headers=headers).status_code == 200
        for wrong in (
            {},
            {"X-API-Key": ""},
            {"X-API-Key": KEY[:-1]},
            {"X-API-Key": KEY + "x"},
            {"X-API-Key": KEY.upper()},
            {"X-API-Key": hashlib.sha256(OTHER.encode()).hexdigest()},
            {"X-API-Key": "sha256:" + hashlib.sha256(OTHER.encode()).hexdigest()},
            {"X-API-Key": "wrong", "Authorization": f"Bearer {KEY}"},
            {"Authorization": KEY},
            {"Authorization": f"Basic {KEY}"},
            {"Authorization": "Bearer"},
            {"X-API-Key": "é".encode("latin-1")},
            {"X-API-Key": "é".encode()},
            {"Cookie": f"key={KEY}"},
        ):
            refused(client.get("/api/v1/get_server_capabilities", headers=wrong), 401, "X-API-Key")
        refused(client.get(f"/api/v1/get_server_capabilities?api_key={KEY}"), 401)


def test_no_endpoint_but_health_and_the_page_answers_without_a_right_key(server: Server) -> None:
    described = server.app.app.openapi()["paths"].items()
    paths = [(method.upper(), path) for path, methods in described for method in methods]
    assert len(paths) > 40
    with httpx.Client(base_url=server.address) as client:
        for method, path in [*paths, ("GET", "/metrics"), ("GET", "/openapi.json"), ("GET", "/nothing"), ("PUT", "/")]:
            address = re.sub(r"\{.*?\}", "x", path)
            for headers in ({}, {"X-API-Key": "tml-some-wrong-key"}):
                response = client.request(method, address, headers={**JSON, **headers})
                if path in (HEALTH, *page.FILES):
                    assert response.status_code != 401
                else:
                    refused(response, 401)
        for path in (HEALTH, *page.FILES):
            assert client.get(path).status_code == 200
        for path in ("/docs/", "/redoc", "/api/v1/healthz/", "/page/../metrics", "/page/", "/%2e/metrics"):
            assert client.get(path).status_code == 401


def test_all_keys_are_compared_in_constant_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = kept_keys(tmp_path, *(f"tml-key-number-{n:04d}" for n in range(7)))
    compared = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(len(one) == len(other) == 32)
        return hmac_compare(one, other)

    hmac_compare = hmac.compare_digest
    monkeypatch.setattr(guard.hmac, "compare_digest", compare)
    for key, right in (("tml-key-number-0000", True), ("tml-key-number-0006", True), ("wrong", False), ("", False)):
        compared.clear()
        assert known.accept(key) is right
        assert compared == [True] * 7


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has no key"),
        (b"# nothing\n\n   \n", "has no key"),
        (b"tml-short", "line 1: a key has 16 characters or more, this has 9"),
        (b"# x\ntml-a-key-of-a-test\nshort\n", "line 3: a key has 16"),
        (b"sha256:abc", "line 1: after sha256: come 64 hex digits"),
        (b"sha256:" + b"g" * 64, "64 hex digits"),
        (b"tml-a key with spaces", "line 1: a key is printable ASCII without spaces"),
        ("tml-schlüssel-wörter".encode(), "printable ASCII"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_key_files_that_are_none(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        Keys.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "tml-" not in str(caught.value)  # no key, not even a wrong one


def test_a_key_file_of_another_editor(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(b"\xef\xbb\xbf" + KEY.encode() + b"\r\n#\r\nSHA" + b"x" * 20 + b"\r\n")
    assert Keys.read(path).accept(KEY)
    for none in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match="cannot be read"):
            Keys.read(none)


def test_no_key_is_kept(server: Server, raw: Raw, home: Path, caplog: Any) -> None:
    wrong = "tml-a-wrong-key-to-look-for"
    with caplog.at_level(logging.DEBUG):
        raw.http.get("/api/v1/overview", headers={"X-API-Key": wrong})
        raw.session()
        raw.http.post(SESSION, content=b"{", headers=JSON)
        shown = raw.http.get("/metrics").text + raw.get("overview").text + raw.http.get("/openapi.json").text
    written = [path.read_bytes() for path in home.rglob("*") if path.is_file()]
    for secret in (KEY, OTHER, wrong, hashlib.sha256(KEY.encode()).hexdigest()):
        assert not any(secret.encode() in content for content in written)
        ours = [record.getMessage() for record in caplog.records if not record.name.startswith(("httpcore", "httpx"))]
        assert secret not in shown + "".join(ours) + repr(server.app.keys)


# Where from


def dial(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.address.rpartition(":")[2])), timeout=30)


def reply(server: Server, request: bytes) -> bytes:
    """What the server says to these bytes."""
    with dial(server) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def head(length: int | str | None) -> bytes:
    """Of a request for a session, whose body has this length or, for None, does not say how long it is."""
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    lines = [f"POST {SESSION} HTTP/1.1", "Host: localhost", f"X-API-Key: {KEY}", "Content-Type: application/json", size]
    return "\r\n".join([*lines, "", ""]).encode()


def test_other_names_are_refused(raw: Raw, server: Server) -> None:
    port = server.address.rpartition(":")[2]
    for name in ("localhost", "127.0.0.1", "[::1]", "LOCALHOST", f"localhost:{port}", f"[::1]:{port}", "127.0.0.1:1"):
        assert raw.http.get("/v1/models", headers={"Host": name}).status_code == 200
    for name in (
        "evil.example",
        f"evil.example:{port}",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "localhost@evil.example",
        "192.168.0.1",
        "0.0.0.0",  # noqa: S104
        "[::2]",
        "[::1",
        "",
        "127.1",
        "localhost,evil.example",
    ):
        for path in ("/v1/models", HEALTH, "/"):
            refused(raw.http.get(path, headers={"Host": name}), 403, "--allow-host")


def test_requests_that_name_no_host(server: Server) -> None:
    key = f"X-API-Key: {KEY}\r\n\r\n".encode()
    assert reply(server, b"GET / HTTP/1.0\r\n" + key).startswith(b"HTTP/1.1 403 ")
    assert b" 40" in reply(server, b"GET / HTTP/1.1\r\n" + key)[:14]
    twice = b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n" + key
    assert b" 200 " not in reply(server, twice)[:14] or reply(server, twice).count(b"evil") == 0


def test_without_a_key_file_any_key_is_taken_and_none_under_the_names_that_are_allowed(tmp_path: Path) -> None:
    names = ("kshot.example:80", 200), ("[fe80::1]:8000", 200), ("localhost", 200), ("example", 403)
    with (
        served(tmp_path, hosts=("Kshot.Example", "[fe80::1]")) as server,
        httpx.Client(base_url=server.address) as client,
    ):
        for name, status in names:
            headers = {"Authorization": "Bearer anything", "Host": name}
            assert client.get("/v1/models", headers=headers).status_code == status
        for more in ({}, {"Authorization": "Bearer"}, {"Authorization": "Bearer anything"}, {"X-API-Key": ""}):
            for path in ("/v1/models", "/api/v1/get_server_capabilities"):
                assert client.get(path, headers={"Host": "localhost", **more}).status_code == 200


def test_which_names_those_are_and_what_only_this_machine_reaches() -> None:
    loopback = {"localhost", "127.0.0.1", "::1"}
    assert hosts_of("127.0.0.1", [], keyed=False) == loopback
    assert hosts_of("127.0.0.1", [], keyed=True) == loopback  # a page may know no key, but a browser reaches it
    assert hosts_of("10.0.0.1", ["A.b", "[fe80::1]"], keyed=True) == loopback | {"10.0.0.1", "a.b", "fe80::1"}
    assert hosts_of("0.0.0.0", [], keyed=True) is None  # noqa: S104
    for wrong in ("http://a.b", "a.b:80", "", "a b", "a/b", "[::1]:80", "u@a.b"):
        with pytest.raises(InputError, match="--allow-host"):
            hosts_of("127.0.0.1", [wrong], keyed=False)
    for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        assert is_loopback(host)
    for host in ("127.evil.example", "0.0.0.0", "::", "", "10.0.0.1", "localhost.evil.example"):  # noqa: S104
        assert not is_loopback(host)


def test_pages_of_other_sites_are_refused(raw: Raw, server: Server) -> None:
    own = server.address.removeprefix("http://")
    for origin in (server.address, f"https://{own}"):
        assert raw.http.post(SESSION, json=SESSION_BODY, headers={"Origin": origin}).status_code == 200
    for origin in (
        "http://evil.example",
        "null",
        "",
        "http://127.0.0.1",
        f"http://{own}.evil.example",
        f"http://evil@{own}",
        f"ftp://{own}",
        own,
        "http://[",
        "file://",
    ):
        refused(raw.http.post(SESSION, json=SESSION_BODY, headers={"Origin": origin}), 403, "may not use this server")
        refused(raw.http.get("/v1/models", headers={"Origin": origin}), 403)
    preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    response = raw.http.options(SESSION, headers=preflight)
    assert response.status_code == 403
    assert not any(name.startswith("access-control") for name in response.headers)


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /\xff\xfe HTTP/1.1\r\n",
        b"GET /%ff%fe HTTP/1.1\r\n",
        b"GET /%00 HTTP/1.1\r\n",
        b"GET http://evil.example/v1/models HTTP/1.1\r\n",
        b"NOTHING /v1/models HTTP/1.1\r\n",
        b"CONNECT evil.example:443 HTTP/1.1\r\n",
        b"GET /v1/models HTTP/1.1\r\nX: " + b"x" * (1 << 20) + b"\r\n",
        b"GET /v1/models HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
    ids=range(9),
)
def test_what_is_hardly_http(server: Server, raw: Raw, request_: bytes) -> None:
    """Without a key nothing comes of it, and others are served after it."""
    try:
        answer = reply(server, request_ + b"Host: localhost\r\n\r\n")
    except OSError:
        answer = b""  # it hung up
    assert re.match(rb"HTTP/1.1 4\d\d |$", answer), answer[:80]
    assert b"Traceback" not in answer
    assert raw.http.get("/v1/models").status_code == 200


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
