"""What leaves through the API: the files of a checkpoint, each at an address of its own, or all in one archive.

An address is signed and good for an hour: the SDK's command line and urllib, which fetch it, send no key. Files are
read as they are sent. The optimizer's state stays here.
"""

import tarfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, StreamingResponse

from kshot.checks import folder_of
from kshot.errors import MissingError
from vlm.local.registry import ENCRYPTED, OPTIMIZER
from vlm.server.guard import Signer
from vlm.server.owners import Owned, Owner
from vlm.server.state import ServerState

LIFETIME = 3600  # seconds
ARCHIVE = "archive.tar"
PART = 1 << 20  # bytes that are read at a time
BINARY = "application/octet-stream"
CONTENT: dict[int | str, dict[str, Any]] = {200: {"content": {BINARY: {}}}}
CHECKPOINT = "/training_runs/{run}/checkpoints/{kind}/{name}"


def add(router: APIRouter, state: ServerState, signer: Signer) -> None:
    """The endpoints."""

    def files(owner: Owner, run: str, kind: str, name: str) -> dict[str, Path]:
        return _files(state, f"tinker://{run}/{kind}/{name}", owner)

    def address(request: Request, *parts: str, expires: int) -> str:
        path = "/".join((f"{router.prefix}/download", *parts))
        return f"{str(request.base_url).rstrip('/')}{quote(path)}?{signer.query(path, expires)}"

    @router.get(f"{CHECKPOINT}/external_weights_urls")
    async def external_weights_urls(request: Request, owner: Owned, run: str, kind: str, name: str) -> dict[str, Any]:
        expires, known = int(time.time()) + LIFETIME, files(owner, run, kind, name)
        urls = {file: address(request, run, kind, name, file, expires=expires) for file in known}
        return {"urls": urls, "expires": datetime.fromtimestamp(expires, UTC).isoformat()}

    @router.get(f"{CHECKPOINT}/archive", status_code=302, response_class=Response)
    async def archive(request: Request, owner: Owned, run: str, kind: str, name: str) -> Response:
        files(owner, run, kind, name)
        expires = int(time.time()) + LIFETIME
        location = address(request, run, kind, name, ARCHIVE, expires=expires)
        return Response(status_code=302, headers={"Location": location, "Expires": formatdate(expires, usegmt=True)})

    @router.get("/download/{run}/{kind}/{name}/{path}", response_class=Response, responses=CONTENT)
    async def download(owner: Owned, run: str, kind: str, name: str, path: str) -> Response:
        known = files(owner, run, kind, name)
        if path == ARCHIVE:
            return _archive(list(known.values()))
        if path not in known:
            raise MissingError(f"this checkpoint has no file {path!r:.80}; it has {', '.join(known)} and {ARCHIVE}")
        return FileResponse(known[path], media_type=BINARY)


def _files(state: ServerState, path: str, owner: Owner) -> dict[str, Path]:
    """Name → file of a checkpoint: PEFT's and kshot's record; of an encrypted checkpoint the encrypted ones. Raises as
    `Checkpoints.existing`."""
    folder = folder_of(state.checkpoints.root, state.checkpoints.existing(path, owner).path)
    if not folder.is_dir():
        raise MissingError(f"the files of checkpoint {path} are gone from this server's state folder")
    files = {file.name: file for file in sorted(folder.iterdir()) if file.name != OPTIMIZER}
    return {name: file for name, file in files.items() if name.endswith(ENCRYPTED)} or files


def _archive(files: Sequence[Path]) -> Response:
    """The files as they lie side by side, in a tar of which one part at a time is in memory."""
    sizes = [file.stat().st_size for file in files]
    blocks = sum(1 + -(-size // tarfile.BLOCKSIZE) for size in sizes) + 2  # a header each, and two at the end
    headers = {"Content-Length": str(blocks * tarfile.BLOCKSIZE)}
    return StreamingResponse(_tar(files, sizes), headers=headers, media_type=BINARY)


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
