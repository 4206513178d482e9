"""What comes before any endpoint: who asks, from where, with what content, and how much of it. Knows no endpoint.

Host names are checked against DNS rebinding, content types and Origin against requests that a foreign page makes the
browser send, bodies for size before and while they are unpacked.

TODO Who may ask: API keys, kept as SHA-256 and compared in constant time. Knows no HTTP.

A key file has one key a line, as it is or as `sha256:` and the 64 hex digits of its SHA-256; lines that begin with #
are left out. A key is printable ASCII without spaces, as HTTP headers carry it; the SDK insists on keys that begin
with tml-.
TODO How JSON bodies are read: strictly, so that whatever is taken can be kept and sent again. Knows no endpoint.

Python's own reader takes halves of surrogate pairs, which nothing can send, NaN, which is no JSON, and depths at which
whoever looks at the value later runs out of stack.
"""

import asyncio
import hashlib
import hmac
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import zstandard
from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.datastructures import Headers

from kshot.errors import (
    BusyError,
    DeniedError,
    InputError,
    RequestError,
    TooLargeError,
    UnauthorizedError,
    UnsupportedError,
)
from vlm.server.futures import JSON

# ---- Who may ask: API keys, kept as SHA-256 and compared in constant time. Knows no HTTP.

SHORTEST = 16  # characters; what is shorter can be guessed
HASHED = "sha256:"


@dataclass(frozen=True)
class Keys:
    """digests: of the keys that are accepted; None accepts any key, but not none."""

    digests: tuple[bytes, ...] | None = None

    @classmethod
    def read(cls, path: Path) -> "Keys":
        """The keys of a file. Raises InputError where it cannot be read, has none, or has one that is too short."""
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"key file {path} cannot be read ({error}); give one with a key a line") from error
        written = [(number, line.strip()) for number, line in enumerate(lines, 1)]
        digests = [_digest(path, number, line) for number, line in written if line and not line.startswith("#")]
        if not digests:
            raise InputError(f"key file {path} has no key; write one a line, of {SHORTEST} characters or more")
        return cls(tuple(digests))

    def accept(self, key: str) -> bool:
        """Whether a client with this key may ask. Takes as long for a wrong key as for a right one."""
        if self.digests is None:
            return bool(key)
        given = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        return sum(hmac.compare_digest(given, digest) for digest in self.digests) > 0  # not any(): all are compared


def _digest(path: Path, number: int, line: str) -> bytes:
    if line.startswith(HASHED):
        digits = line.removeprefix(HASHED)
        if not re.fullmatch(r"[0-9a-fA-F]{64}", digits):
            raise InputError(f"key file {path}, line {number}: after {HASHED} come 64 hex digits, as sha256sum prints")
        return bytes.fromhex(digits)
    if not re.fullmatch(r"[!-~]*", line):
        raise InputError(f"key file {path}, line {number}: a key is printable ASCII without spaces")
    if len(line) < SHORTEST:
        raise InputError(
            f"key file {path}, line {number}: a key has {SHORTEST} characters or more, this has {len(line)}"
        )
    return hashlib.sha256(line.encode()).digest()


# ---- What comes before any endpoint: who asks, from where, with what content, and how much of it. Knows no endpoint.

MAX_VALUES = 1 << 22  # of a JSON body, as far as commas and brackets tell: each takes some 64 bytes once it is read
MAX_AT_ONCE = 512 << 20  # bytes of all bodies that are being read
DISCARDED = 256 << 20  # bytes of a body that is refused
STEP = 1 << 20
SMALL = 1 << 16  # bytes of a body that there is always room for
PATIENCE = 60.0  # seconds for the next part of a body
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
SAFE = frozenset({"GET", "HEAD"})


@dataclass(frozen=True)
class Body:
    """What an endpoint takes: content of one type, of so many bytes at most, packed and unpacked.

    What is built from a body takes more: up to 30 times as much from protobuf, 20 times from JSON.
    """

    kind: str = JSON
    limit: int = 4 << 20


PLAIN = Body()


@dataclass(frozen=True)
class Guard:
    """ASGI middleware. hosts: names that a request may be addressed to; None: any. free: paths that need no key.
    bodies: what is sent to each path; to all others it is PLAIN. told: HTTP status and body of an error at a path.

    Raises nothing: what is refused is answered as an endpoint there answers an error.
    """

    app: Any
    keys: Keys
    hosts: frozenset[str] | None
    free: frozenset[str]
    bodies: Mapping[str, Body]
    told: Callable[[str, Exception], tuple[int, dict[str, Any]]]
    budget: "Budget"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # a web socket, of which there is none here
            return await send({"type": "websocket.close", "code": 1008})
        headers, held = Headers(scope=scope), _Held(self.budget)
        try:
            self._check(scope["path"], headers)
            if scope["method"] not in SAFE:
                wanted = self.bodies.get(scope["path"], PLAIN)
                receive = _given(await _read(headers, receive, held, wanted), receive)
            return await self.app(scope, receive, send)
        except (RequestError, BusyError) as error:
            return await _refuse(send, *self.told(scope["path"], error), headers)
        except _GoneError:
            return None
        finally:
            held.release()

    def _check(self, path: str, headers: Headers) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.hosts is not None and _name(host) not in self.hosts:
            raise DeniedError(f"this server is not called {host!r:.80}; say so with --allow-host")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            raise DeniedError(f"pages of {origin!r:.80} may not use this server")
        if path not in self.free and not self.keys.accept(_key(headers)):
            raise UnauthorizedError(
                "no valid API key; send X-API-Key or Authorization: Bearer (without --api-key-file: any)"
            )


@dataclass
class Budget:
    """How many bytes of bodies are being read or worked on, of how many that may be at once."""

    limit: int = MAX_AT_ONCE
    taken: int = 0


@dataclass
class _Held:
    """The part of the budget that one request has taken."""

    budget: Budget
    bytes: int = 0

    def take(self, size: int) -> None:
        """Raises BusyError where that is too much beside others."""
        full = self.budget.taken + size > self.budget.limit and self.budget.taken > self.bytes
        if full and self.bytes + size > SMALL:
            raise BusyError("too many large requests at once; send it again later")
        self.budget.taken, self.bytes = self.budget.taken + size, self.bytes + size

    def release(self) -> None:
        self.budget.taken, self.bytes = self.budget.taken - self.bytes, 0


class _GoneError(Exception):
    """The client went away."""


async def _read(headers: Headers, receive: Any, held: _Held, wanted: Body) -> bytes:
    """The body, unpacked."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    bare = not kind and headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers
    if kind != wanted.kind and not bare:
        raise UnsupportedError(f"content of type {kind!r:.80} is not read here; send {wanted.kind}")
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "zstd"):
        raise UnsupportedError(f"content encoding {encoding!r:.80} is not read here; send zstd or none")
    _check_size(_number(headers.get("content-length", "0")), wanted.limit)
    body = bytearray()
    async for part in _parts(receive):
        held.take(len(part))
        body += part
        _check_size(len(body), wanted.limit)
    content = bytes(body)
    if encoding == "zstd":
        size = unpacked_size(content)
        _check_size(size, wanted.limit)
        held.take(size)
        content = await asyncio.to_thread(unpack, content) if size > STEP else unpack(content)
    if kind == JSON and sum(map(content.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise TooLargeError(f"the body has more than {MAX_VALUES:,} values; send it in smaller parts")
    return content


def _check_size(size: float, limit: int) -> None:
    if size > limit:
        raise TooLargeError(f"the body has more than {limit:,} bytes; send it in smaller parts")


def unpacked_size(body: bytes) -> int:
    """Bytes of a zstd body's content, as its one frame says. Raises RequestError for what is no such frame."""
    try:
        size = zstandard.frame_content_size(body)
    except zstandard.ZstdError as error:
        raise RequestError(f"the body is not what zstd writes ({error})") from error
    if size < 1:
        raise RequestError("the zstd body does not say how large its content is; pack it as a whole, not as a stream")
    return size


def unpack(body: bytes) -> bytes:
    """A zstd body's content, of just `unpacked_size` bytes. Raises RequestError for less, for more, and for what
    follows."""
    try:
        return zstandard.ZstdDecompressor().decompress(body, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise RequestError(f"the body is not one whole frame of zstd ({error})") from error


async def _parts(receive: Any) -> Any:
    more = True
    while more:
        try:
            async with asyncio.timeout(PATIENCE):
                message = await receive()
        except TimeoutError as error:
            raise BusyError(f"nothing of the body came for {PATIENCE:.0f} seconds; send it again") from error
        if message["type"] == "http.disconnect":
            raise _GoneError
        yield message.get("body", b"")
        more = message.get("more_body", False)


def _given(body: bytes, receive: Any) -> Any:
    """A `receive` that gives the body at once, then what the connection says."""
    first = [{"type": "http.request", "body": body, "more_body": False}]

    async def given() -> Any:
        return first.pop() if first else await receive()

    return given


async def _refuse(send: Any, status: int, body: dict[str, Any], asked: Headers) -> None:
    """Answer with an error. A client is let finish its body, so that it reads this, unless that may take for ever."""
    content = json.dumps(body).encode()
    headers = [(b"content-type", JSON.encode()), (b"content-length", str(len(content)).encode())]
    if status == 429:
        headers.append((b"retry-after", b"1"))
    if "transfer-encoding" in asked or _number(asked.get("content-length", "0")) > DISCARDED:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def _key(headers: Headers) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return headers.get("x-api-key") or (token.strip() if scheme.lower() == "bearer" else "")


def _name(host: str) -> str:
    """Of a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _number(text: str) -> float:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else math.inf


def hosts_of(bound: str, allowed: Iterable[str], *, keyed: bool) -> frozenset[str] | None:
    """The names that requests may be addressed to: those of loopback, the bound one and those allowed.

    With keys, on an address that others reach, and none named: any; a foreign page does not know the key.
    """
    named = frozenset(_named(name) for name in allowed)
    if not is_loopback(bound) and keyed and not named:
        return None
    return LOOPBACK | named | {bound.lower()}


def _named(text: str) -> str:
    name = text.lower().removeprefix("[").removesuffix("]")
    if not re.fullmatch("[a-z0-9._-]+", name) and not _is_address(name):
        raise InputError(f"--allow-host {text!r}: give a name or an address alone, without http:// and without a port")
    return name


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    return ip_address(host).is_loopback if _is_address(host) else host in LOOPBACK


def _is_address(host: str) -> bool:
    try:
        return bool(ip_address(host))
    except ValueError:
        return False


@dataclass
class Requests:
    """Counts requests by endpoint and status as ASGI middleware, innermost: `route` is known after the call."""

    app: Any
    counts: Counter[tuple[str, int]] = field(default_factory=Counter)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        status = 500

        async def noted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            route = scope.get("route")
            self.counts[getattr(route, "path", "none"), status] += 1


# ---- How JSON bodies are read: strictly, so that whatever is taken can be kept and sent again. Knows no endpoint.


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
