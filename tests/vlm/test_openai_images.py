"""Image URLs: what data: URLs hold, and that nothing is fetched that is not public, allowed and small."""

import asyncio
import base64
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from typing import Any
from urllib.parse import quote

import openai
import pytest

from kshot.errors import ImageError
from tests.vlm.openai_served import Models, application, connected
from tests.vlm.serving import listening
from vlm import nano
from vlm.local.registry import LocalServiceClient
from vlm.server.openai import chat


def read(url: str, allow_urls: bool = True) -> bytes:
    return asyncio.run(chat.read_image(url, allow_urls=allow_urls))


def fetch(url: str) -> bytes:
    """From anywhere: the checks of addresses are tested by themselves."""
    return asyncio.run(chat.fetch(url, public=lambda _: True))


def test_data_urls() -> None:
    data = bytes(range(256))
    text = base64.b64encode(data).decode()
    for head in (
        "data:image/png;base64",
        "data:;base64",
        "DATA:image/jpeg;BASE64",
        "data:image/png; charset=x; base64",
    ):
        assert read(f"{head},{text}", allow_urls=False) == data


@pytest.mark.parametrize("size", [253, 254, 255])
def test_data_urls_as_clients_write_them(size: int) -> None:
    data = bytes(range(256))[:size]
    text, lines = base64.b64encode(data).decode(), base64.encodebytes(data).decode()
    safe = base64.urlsafe_b64encode(data).decode()
    escaped = quote(text, safe=""), quote(lines, safe=""), quote(text)
    for each in (text, text.rstrip("="), lines, lines.replace("\n", "\r\n\t "), safe, safe.rstrip("="), *escaped):
        assert read(f"data:image/png;base64,{each}") == data


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("data:image/png,abc", "must read"),
        ("data:image/png;base64", "must read"),
        ("data:image/png;base64,ab!c", "no base64"),
        ("data:image/png;base64,abcde", "no base64"),
        ("data:image/png;base64,ab%41%", "no base64"),
        ("data:image/png;base64,é", "no base64"),
        ("file:///etc/passwd", "give a data: URL"),
        ("ftp://example.com/a.png", "give a data: URL"),
        ("", "give a data: URL"),
    ],
)
def test_what_is_no_image_url(url: str, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        read(url)


def test_data_urls_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_BYTES", 9)
    assert read("data:;base64," + base64.b64encode(bytes(9)).decode()) == bytes(9)
    with pytest.raises(ImageError, match="holds more than"):
        read("data:;base64," + "A" * 20)


PUBLIC = ["8.8.8.8", "192.0.1.1", "192.88.98.1", "2606:4700:4700::1111", "2a00:1450:4001:80b::200e", "2001:4860::8888"]
PRIVATE = [  # 169.254.169.254 is where clouds keep their machines' secrets
    *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),  # noqa: S104
    *("224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fc00::1", "ff0e::1"),
    *("::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::"),
    # what stands for an address of IPv4, or did
    *(
        "::ffff:8.8.8.8",
        "::ffff:0:8.8.8.8",
        "::8.8.8.8",
        "::10.0.0.1",
        "64:ff9b::808:808",
        "64:ff9b:1::a00:1",
        "2001::1",
    ),
    # what was given to nobody, to documents or to one network
    *("192.0.0.1", "192.0.0.8", "192.0.0.255", "192.88.99.1", "198.18.0.1", "203.0.113.1", "240.0.0.1"),
    *("fec0::1", "feff::1", "3fff::1", "3fff:fff::1", "5f00::1", "2001:db8::1", "100::1", "4000::1", "fdff::1"),
]


@pytest.mark.parametrize("address", PUBLIC + PRIVATE)
def test_which_addresses_are_public(address: str) -> None:
    assert chat.is_public(ip_address(address)) is (address in PUBLIC)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers["Host"]))  # type: ignore[attr-defined]
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/image")
            self.end_headers()
            return
        self.send_response(404 if self.path == "/missing" else 200)
        self.end_headers()
        for _ in range(100 if self.path == "/slow" else 1):
            self.wfile.write(b"the image")
            if self.path == "/slow":
                time.sleep(0.05)

    def log_message(self, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, *args: Any) -> None:  # a client that hangs up is what some tests are about
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    made = Server(("127.0.0.1", 0), Handler)
    made.seen = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def test_an_address_is_fetched_by_number_under_its_name(server: Any) -> None:
    port = server.server_address[1]
    assert fetch(f"http://localhost:{port}/image?a=b#c") == b"the image"
    assert server.seen == [("/image?a=b", f"localhost:{port}")]


def test_addresses_that_are_not_public_are_never_connected_to(server: Any) -> None:
    port = server.server_address[1]
    for host in ("127.0.0.1", "localhost", "127.1", "2130706433", "[::ffff:127.0.0.1]"):
        with pytest.raises(ImageError, match=r"not at a public address|cannot be fetched"):
            read(f"http://{host}:{port}/image")
    assert server.seen == []


def test_one_address_that_is_not_public_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the name is looked up once: what it answers later is not asked."""
    names = list[str]()

    async def lookup(loop: Any, host: str, port: int, **_: Any) -> Any:
        names.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in ("8.8.8.8", "10.0.0.1")]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", lookup)
    with pytest.raises(ImageError, match="not at a public address"):
        read("http://example.com/a.png")
    assert names == ["example.com"]


def test_redirects_failures_sizes_and_times(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base = f"http://127.0.0.1:{server.server_address[1]}"
    with pytest.raises(ImageError, match="status 302; no redirect"):
        fetch(f"{base}/moved")
    with pytest.raises(ImageError, match="status 404"):
        fetch(f"{base}/missing")
    with pytest.raises(ImageError, match="without a user"):
        fetch(base.replace("//", "//me@"))
    with pytest.raises(ImageError, match="cannot be fetched"):
        fetch("http://127.0.0.1:99999/")
    assert [path for path, _ in server.seen] == ["/moved", "/missing"]
    with monkeypatch.context() as patch:
        patch.setattr(chat, "MAX_BYTES", 8)
        with pytest.raises(ImageError, match="holds more than"):
            fetch(f"{base}/image")
    monkeypatch.setattr(chat, "SECONDS", 0.2)
    with pytest.raises(ImageError, match=r"within 0\.2 seconds"):
        fetch(f"{base}/slow")


def test_a_server_fetches_only_where_it_is_told_to(service: LocalServiceClient, server: Any) -> None:
    url = f"http://127.0.0.1:{server.server_address[1]}/image"
    messages: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    for allow_urls, words in ((False, "fetches no images"), (True, "not at a public address")):
        app = application(Models(service), allow_urls=allow_urls)
        with (
            listening(app) as address,
            connected(address) as api,
            pytest.raises(openai.BadRequestError, match=words) as caught,
        ):
            api.chat.completions.create(model=nano.NAME, messages=messages)
        assert caught.value.param == "messages"
    assert server.seen == []
