"""What leaves through the API: the files of a checkpoint, each at an address of its own, or all in one archive.

An address is signed (HMAC-SHA256, with a secret of this process) and good for one file and an hour. Whoever has it
needs no key: the SDK's command line and urllib send none. Files are read as they are sent; the optimizer's state stays.
"""

import hmac
import secrets
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, StreamingResponse

from kshot.checks import folder_of
from kshot.errors import DeniedError, MissingError
from vlm.local.registry import ENCRYPTED, OPTIMIZER
from vlm.server.guard import SIGNED
from vlm.server.state import ServerState

LIFETIME = 3600  # seconds
ARCHIVE = "archive.tar"
PART = 1 << 20  # bytes that are read at a time
CHECKPOINT = "/training_runs/{run}/checkpoints/{kind}/{name}"
CONTENT: dict[int | str, dict[str, Any]] = {200: {"content": {"application/octet-stream": {}}}}


@dataclass(frozen=True)
class Downloads:
    """Signs addresses, and opens what they lead to."""

    state: ServerState
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32))

    def files(self, path: str) -> dict[str, Path]:
        """Name → file: those of PEFT and kshot's record; of an encrypted checkpoint the encrypted ones. Raises as
        `Checkpoints.existing`."""
        folder = folder_of(self.state.checkpoints.root, self.state.checkpoints.existing(path).path)
        if not folder.is_dir():
            raise MissingError(f"the files of checkpoint {path} are gone from this server's state folder")
        files = {file.name: file for file in sorted(folder.iterdir()) if file.name != OPTIMIZER}
        return {name: file for name, file in files.items() if name.endswith(ENCRYPTED)} or files

    def address(self, base: str, path: str, file: str, expires: int) -> str:
        """Where this file of a checkpoint is until then. base: of the server, as the client calls it."""
        place = quote(f"{path.removeprefix('tinker://')}/{file}")
        return f"{base.rstrip('/')}{SIGNED}{place}?expires={expires}&signature={self._sign(path, file, expires)}"

    def response(self, path: str, file: str, expires: int, signature: str) -> Response:
        """The file. Raises DeniedError for an address that was not signed here or is too old, MissingError."""
        if not hmac.compare_digest(signature.encode(), self._sign(path, file, expires).encode()):
            raise DeniedError("this address was not made by this server; ask it for another one")
        if expires < time.time():
            raise DeniedError("this address is too old; ask for another one")
        files = self.files(path)
        if file == ARCHIVE:
            return _archive(list(files.values()))
        if file not in files:
            raise MissingError(f"checkpoint {path} has no file {file}")
        return FileResponse(files[file], media_type="application/octet-stream")

    def _sign(self, path: str, file: str, expires: int) -> str:
        return hmac.new(self.secret, f"{path}/{file}/{expires}".encode("utf-8", "surrogatepass"), "sha256").hexdigest()


def add(router: APIRouter, state: ServerState) -> None:
    """The endpoints."""
    downloads = Downloads(state)

    @router.get(f"{CHECKPOINT}/external_weights_urls")
    async def external_weights_urls(request: Request, run: str, kind: str, name: str) -> dict[str, Any]:
        path, expires = f"tinker://{run}/{kind}/{name}", int(time.time()) + LIFETIME
        base = str(request.base_url)
        urls = {file: downloads.address(base, path, file, expires) for file in downloads.files(path)}
        return {"urls": urls, "expires": datetime.fromtimestamp(expires, UTC).isoformat()}

    @router.get(f"{CHECKPOINT}/archive", status_code=302, response_class=Response)
    async def archive(request: Request, run: str, kind: str, name: str) -> Response:
        path, expires = f"tinker://{run}/{kind}/{name}", int(time.time()) + LIFETIME
        downloads.files(path)
        location = downloads.address(str(request.base_url), path, ARCHIVE, expires)
        return Response(status_code=302, headers={"Location": location, "Expires": formatdate(expires, usegmt=True)})

    signed = SIGNED.removeprefix(router.prefix)

    @router.get(signed + "{run}/{kind}/{name}/{file}", responses=CONTENT, openapi_extra={"security": []})
    async def download(run: str, kind: str, name: str, file: str, expires: int, signature: str) -> Response:
        return downloads.response(f"tinker://{run}/{kind}/{name}", file, expires, signature)


def _archive(files: Sequence[Path]) -> Response:
    """The files as they lie side by side, in a tar of which one part at a time is in memory."""
    sizes = [file.stat().st_size for file in files]
    blocks = sum(1 + -(-size // tarfile.BLOCKSIZE) for size in sizes) + 2  # a header each, and two at the end
    headers = {"Content-Length": str(blocks * tarfile.BLOCKSIZE)}
    return StreamingResponse(_tar(files, sizes), headers=headers, media_type="application/x-tar")


def _tar(files: Sequence[Path], sizes: Sequence[int]) -> Iterator[bytes]:
    for path, size in zip(files, sizes, strict=True):
        info = tarfile.TarInfo(path.name)
        info.size, info.mtime = size, int(path.stat().st_mtime)
        yield info.tobuf(tarfile.GNU_FORMAT)
        with path.open("rb") as file:
            while part := file.read(PART):
                yield part
        yield bytes(-size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)
