"""Who may ask, and from where: as an attacker would, over a socket."""

import hashlib
import hmac
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from kshot.errors import InputError
from tests.vlm.raw import JSON, SESSION, SESSION_BODY, Raw, refused
from tests.vlm.serving import KEY, Server, reply, served
from vlm.server import guard, page
from vlm.server.app import HEALTH
from vlm.server.guard import Keys, hosts_of, is_loopback

OTHER = "tml-another-key-of-it"


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
