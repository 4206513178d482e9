"""What is checked before any endpoint: API keys, host names, origins, content types, and sizes of bodies.

Host names are checked against DNS rebinding, content types and Origin against requests that a foreign page makes the
browser send, bodies for size before and while they are unpacked.
"""

import asyncio
import hashlib
import hmac
import json
import math
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

import zstandard
from fastapi import Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect

from kshot.errors import (
    BusyError,
    DeniedError,
    InputError,
    RequestError,
    TooLargeError,
    UnauthorizedError,
    UnsupportedError,
)
from kshot.untrusted import read_file
from vlm.server.futures import JSON
from vlm.server.limits import sizes
from vlm.server.limits.memory import BODIES, MESSAGES, Memory, Reservation
from vlm.server.limits.rate_limit import LONGEST, REFUSAL, REFUSED, RateLimit, cost_of
from vlm.server.owners import EVERYBODY, NOBODY, Owner, owner_name

T = TypeVar("T")
DISCARDED = 256 << 20  # bytes of a refused body that are read to the end
STEP = 1 << 17  # bytes of a body that is looked through beside the event loop
PARSED = "kshot.parsed"  # in a request's scope: the reservation of what is made of its body
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
SAFE = frozenset({"GET", "HEAD"})
SHORTEST = 16  # characters of a key; what is shorter can be guessed
HASHED = "sha256:"


@dataclass(frozen=True)
class Body:
    """The body that an endpoint reads: its content type, and the most bytes, compressed and decompressed; of JSON the
    most values, and the lists of numbers that count as one."""

    kind: str = JSON
    limit: int = 4 << 20
    values: int = sizes.VALUES
    lists: frozenset[sizes.Path] = frozenset()


PLAIN = Body()


@dataclass(frozen=True)
class Guard:
    """ASGI middleware. hosts: names that a request may be addressed to; None: any. free: paths that need no key.
    bodies: what paths read, where it is not PLAIN. error_response: HTTP status and body of an error at a path. memory:
    from which bodies are taken, and what is made of them. signer: of addresses that are let in without a key.
    """

    app: Any
    keys: "Keys"
    hosts: frozenset[str] | None
    free: frozenset[str]
    bodies: Mapping[str, Body]
    error_response: Callable[[str, Exception], tuple[int, dict[str, Any]]]
    memory: Memory
    signer: "Signer"
    rate_limit: RateLimit = field(default_factory=RateLimit)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # a web socket, of which there is none here
            return await send({"type": "websocket.close", "code": 1008})
        headers, send = Headers(scope=scope), self._limited(scope, send)
        try:
            with self.memory.take(BODIES) as taken, self.memory.take(MESSAGES) as parsed:
                scope[PARSED] = parsed
                scope["owner"] = self._owner(scope["path"], scope["query_string"].decode("latin-1"), headers)
                await self._wait_for_rate(scope)
                if scope["method"] not in SAFE:
                    wanted = self.bodies.get(scope["path"], PLAIN)
                    receive = _replay(await _read(headers, receive, taken, parsed, wanted), receive)
                return await self.app(scope, receive, send)
        except (RequestError, BusyError) as error:
            response = _refusal(*self.error_response(scope["path"], error), headers)
        except ClientDisconnect:
            return None
        return await response(scope, receive, send)  # which may wait: nothing of the body is in memory any more

    def _limited(self, scope: Any, send: Any) -> Any:
        """A `send` that begins a refusal when the client's rate allows it."""

        async def limited(message: Any) -> None:
            if message["type"] == "http.response.start" and message["status"] in REFUSED:
                seconds = self.rate_limit.wait(_client(scope), REFUSAL)
                if seconds >= LONGEST:  # the next one is to need a new connection
                    message = message | {"headers": [*message.get("headers", ()), (b"connection", b"close")]}
                await _sleep(seconds)
            await send(message)

        return limited

    async def _wait_for_rate(self, scope: Any) -> None:
        """Wait until the client's rate allows the request. Raises BusyError where that is too long."""
        if cost := cost_of(scope["path"]):
            seconds = self.rate_limit.wait(_client(scope), cost)
            if seconds >= LONGEST:
                raise BusyError("lists, or sessions, runs and samplers, are asked for too often; send this again later")
            await _sleep(seconds)

    def _owner(self, path: str, query: str, headers: Headers) -> Owner:
        """Whose the request is, once it may be made."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.hosts is not None and _name(host) not in self.hosts:
            raise DeniedError(f"this server is not called {host!r:.80}; say so with --allow-host")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            raise DeniedError(f"pages of {origin!r:.80} may not use this server")
        if query and self.signer.accepts(path, query):
            return EVERYBODY  # of what lies at this path alone
        key = _key(headers)
        if not self.keys.accept(key):
            if path in self.free:
                return NOBODY
            raise UnauthorizedError("no valid API key; send one of the key file as X-API-Key or Authorization: Bearer")
        return self.keys.owner(key)


async def _read(headers: Headers, receive: Any, taken: Reservation, parsed: Reservation, wanted: Body) -> bytes:
    """A request's body, unpacked, once there is room for it (`taken`) and for what is made of it (`parsed`)."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    bare = not kind and headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers
    if kind != wanted.kind and not bare:
        raise UnsupportedError(f"content of type {kind!r:.80} is not read here; send {wanted.kind}")
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "zstd"):
        raise UnsupportedError(f"content encoding {encoding!r:.80} is not read here; send zstd or none")
    _check_size(_number(headers.get("content-length", "0")), wanted.limit)
    body = bytearray()
    async for part in Request({"type": "http"}, receive).stream():
        taken.grow(len(part))
        body += part
        _check_size(len(body), wanted.limit)
    content = bytes(body)
    if encoding == "zstd":
        size = unpacked_size(content)
        _check_size(size, wanted.limit)
        taken.grow(size)
        content = await _in_thread_if_large(size, unpack, content)
    if kind == JSON:
        parsed.grow(sizes.json_bytes(content, wanted.values))
        await _in_thread_if_large(len(content), sizes.check_json, content, wanted.values, wanted.lists)
    elif content:
        parsed.grow(await _in_thread_if_large(len(content), sizes.protobuf_bytes, content))
    return content


async def _in_thread_if_large(size: int, call: Callable[..., T], *args: Any) -> T:
    """A call that takes long for many bytes."""
    return await asyncio.to_thread(call, *args) if size > STEP else call(*args)


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
    """A zstd body's content, of just `unpacked_size` bytes. Raises RequestError for less, more, and what follows."""
    try:
        return zstandard.ZstdDecompressor().decompress(body, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise RequestError(f"the body is not one whole frame of zstd ({error})") from error


def _replay(body: bytes, receive: Any) -> Any:
    """A `receive` that gives the body at once, then what the connection says."""
    first = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Any:
        return first.pop() if first else await receive()

    return replay


def _refusal(status: int, body: dict[str, Any], request_headers: Headers) -> JSONResponse:
    """The response to a refused request. A client may finish its body, and so reads this, unless that is very long."""
    headers = {"retry-after": "1"} if status == 429 else {}
    if "transfer-encoding" in request_headers or _number(request_headers.get("content-length", "0")) > DISCARDED:
        headers["connection"] = "close"
    return JSONResponse(body, status, headers)


async def _sleep(seconds: float) -> None:
    if seconds:  # one that has sent all it has, and closed its side, is answered at once
        await asyncio.sleep(seconds)


def _client(scope: Any) -> str:
    """Address, and owner where there are keys; a key that is not accepted makes no client of its own."""
    owner = scope.get("owner")
    return f"{scope['client'][0] if scope.get('client') else ''} {owner.name if owner and owner.name else ''}"


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
    """The names that requests may be addressed to: those of loopback, the bound one and those allowed; None: any."""
    named = frozenset(_named(name) for name in allowed)
    if not is_loopback(bound) and keyed and not named:  # others reach it, and a foreign page does not know the key
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
    """Counts requests by owner, endpoint and status. ASGI middleware, innermost: `route` is known after the call."""

    app: Any
    counts: Counter[tuple[str | None, str, int]] = field(default_factory=Counter)

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
            if "owner" in scope:  # not the start and the end of the server
                route = scope.get("route")
                self.counts[scope["owner"].name, getattr(route, "path", "none"), status] += 1


# API keys


@dataclass(frozen=True)
class Keys:
    """API keys, kept as SHA-256. digests: of those that are accepted; None accepts any key, and none. shared: whether
    each reaches what was made with the others.

    A key file has one key a line, as it is or as `sha256:` and the 64 hex digits of its SHA-256; lines that begin with
    # are left out. A key is printable ASCII without spaces, as HTTP headers carry it; the SDK insists on keys that
    begin with tml-.
    """

    digests: tuple[bytes, ...] | None = None
    shared: bool = False

    @classmethod
    def read(cls, path: Path, *, shared: bool = False) -> "Keys":
        """The keys of a file. Raises InputError where it cannot be read, has none, or has one that is too short."""
        try:
            lines = read_file(path).decode("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"key file {path} cannot be read ({error}); give one with a key a line") from error
        numbered = [(number, line.strip()) for number, line in enumerate(lines, 1)]
        digests = [_digest(path, number, line) for number, line in numbered if line and not line.startswith("#")]
        if not digests:
            raise InputError(f"key file {path} has no key; write one a line, of {SHORTEST} characters or more")
        return cls(tuple(digests), shared)

    def accept(self, key: str) -> bool:
        """Whether a key is accepted. Takes as long for a wrong key as for a right one."""
        if self.digests is None:
            return True
        digest = _sha256(key)
        return sum(hmac.compare_digest(digest, each) for each in self.digests) > 0  # not any(): all are compared

    def owner(self, key: str) -> Owner:
        """The owner of requests with a key that is accepted; without a key file there is one."""
        return EVERYBODY if self.digests is None else Owner(owner_name(_sha256(key)), self.shared)

    @property
    def owners(self) -> frozenset[str | None]:
        """The names of all owners: of what has another, no key reaches it."""
        return frozenset([None, *map(owner_name, self.digests or ())])


def _sha256(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


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


@dataclass(frozen=True)
class Signer:
    """Makes addresses that whoever has them may read without a key, until they are too old.

    A signature is the HMAC-SHA256 of the path and the time, with a secret of this process.
    """

    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)

    def query(self, path: str, expires: int) -> str:
        """What follows the path of an address. expires: seconds since 1970."""
        return f"expires={expires}&signature={self._signature(path, str(expires))}"

    def accepts(self, path: str, query: str) -> bool:
        """Whether this server made such an address, and not too long ago."""
        given = dict(parse_qsl(query[:1000]))
        signature, expires = given.get("signature", ""), given.get("expires", "")
        right = bool(signature) and hmac.compare_digest(signature.encode(), self._signature(path, expires).encode())
        return right and _number(expires) >= time.time()

    def _signature(self, path: str, expires: str) -> str:
        return hmac.new(self.secret, f"{expires} {path}".encode("utf-8", "surrogatepass"), "sha256").hexdigest()


# JSON bodies


class Strict(Request):
    """A request whose body is JSON by the letter of RFC 8259, at most some 200 levels deep.

    Python's own parser takes halves of surrogate pairs, which nothing can send, NaN, which is no JSON, and depths at
    which whoever looks at the value later runs out of stack.
    """

    async def json(self) -> Any:
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from error  # which the framework answers


class Route(APIRoute):
    """A route whose body is read by `Strict`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        inner = super().get_route_handler()

        async def handler(request: Request) -> Response:
            return await inner(Strict(request.scope, request.receive))

        return handler
