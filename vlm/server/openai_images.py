"""Image URLs → bytes: data: URLs, and http(s) where the server allows it. Knows no format and no model.

A server that fetches what strangers name can be used to reach what only it can reach. So: public addresses alone,
looked up once and connected to by number (a name may answer otherwise the second time), no redirect, no proxy, and
limits of bytes and time.
"""

import asyncio
import base64
import binascii
import socket
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from urllib.parse import SplitResult, urlsplit

import httpx

from kshot_errors import ImageError

MAX_BYTES = 32 << 20  # of one image
SECONDS = 20.0  # for fetching one
PORTS = {"http": 80, "https": 443}
EMBEDDING = (IPv6Network("64:ff9b::/96"), IPv6Network("2002::/16"), IPv6Network("2001::/32"))  # hold IPv4 addresses
Address = IPv4Address | IPv6Address


async def read(url: str, *, allow_urls: bool) -> bytes:
    """The bytes behind an image URL. Raises ImageError for what is refused, too large or not there."""
    scheme = url.partition(":")[0].lower()
    if scheme == "data":
        return embedded(url)
    if scheme not in PORTS:
        raise ImageError(f"image URL {url!r:.60}: give a data: URL or an http(s) address")
    if not allow_urls:
        raise ImageError(f"image URL {url!r:.60}: this server fetches no images; send it as data:image/png;base64,...")
    return await fetch(url)


def embedded(url: str) -> bytes:
    """The bytes in a base64 data: URL."""
    head, comma, text = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ImageError(f"image URL {url!r:.40}: a data: URL must read data:image/png;base64,...")
    if len(text) > MAX_BYTES * 4 // 3 + 4:
        raise _too_large(url)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"image URL {url!r:.40}: no base64 ({error})") from error


def is_public(address: Address) -> bool:
    """Whether an address is one of the public internet."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if any(address in network for network in EMBEDDING):
            return False
    return address.is_global and not address.is_multicast


async def fetch(url: str, public: Callable[[Address], bool] = is_public) -> bytes:
    """The answer of an http(s) address. public: which addresses may be connected to."""
    try:
        async with asyncio.timeout(SECONDS):
            return await _fetch(url, public)
    except TimeoutError as error:
        raise ImageError(f"image URL {url!r:.60} gave no image within {SECONDS:g} seconds") from error
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        raise ImageError(f"image URL {url!r:.60} cannot be fetched ({type(error).__name__})") from error


async def _fetch(url: str, public: Callable[[Address], bool]) -> bytes:
    parts = urlsplit(url)
    target = await _target(url, parts, public)
    headers = {"Host": parts.netloc, "Accept": "image/*", "Accept-Encoding": "identity"}
    options = {"sni_hostname": parts.hostname}  # the certificate must be that of the name
    async with (
        httpx.AsyncClient(trust_env=False, follow_redirects=False) as client,
        client.stream("GET", target, headers=headers, extensions=options) as response,
    ):
        if response.status_code != httpx.codes.OK:
            raise ImageError(
                f"image URL {url!r:.60} answers with status {response.status_code}; no redirect is followed"
            )
        data = bytearray()
        async for part in response.aiter_raw():
            data += part
            if len(data) > MAX_BYTES:
                raise _too_large(url)
        return bytes(data)


async def _target(url: str, parts: SplitResult, public: Callable[[Address], bool]) -> str:
    """The URL with its host's address in place of the name."""
    if not parts.hostname or parts.username is not None:
        raise ImageError(f"image URL {url!r:.60} must be http(s)://HOST/..., without a user")
    port = parts.port or PORTS[parts.scheme]
    found = await asyncio.get_running_loop().getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    addresses = [ip_address(str(each[4][0]).partition("%")[0]) for each in found]
    if not addresses or not all(map(public, addresses)):
        raise ImageError(f"image URL {url!r:.60} is not at a public address")
    host = f"[{addresses[0]}]" if addresses[0].version == 6 else str(addresses[0])
    return parts._replace(netloc=f"{host}:{port}", fragment="").geturl()


def _too_large(url: str) -> ImageError:
    return ImageError(f"image URL {url!r:.40} holds more than {MAX_BYTES >> 20} MiB; send a smaller image")
