"""A stand-in for the Hugging Face hub on the loopback: the requests of `huggingface_hub` for data sets, counted.

with serve({"owner/name": HubRepo({"README.md": b"..."})}) as hub:
    ... HF_ENDPOINT=hub.url ...
    hub.requests        # [("GET", "/datasets/owner/name/resolve/<commit>/README.md", "bytes=100-")]
"""

import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

API = re.compile(r"/api/datasets/(?P<id>[\w.-]+/[\w.-]+)(?:/(?P<kind>revision|tree)/(?P<revision>[^/]+))?")
FILE = re.compile(r"/datasets/(?P<id>[\w.-]+/[\w.-]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
CUT, RESET = "cut", "reset"  # the connection ends early, or is reset


@dataclass
class HubRepo:
    """files: name → content. gated: its files are refused. drops: file → how each next answer breaks off half-way."""

    files: Mapping[str, bytes]
    gated: bool = False
    drops: dict[str, list[str]] = field(default_factory=dict)

    @cached_property
    def commit(self) -> str:
        parts = (f"{name} {etag(content)}" for name, content in sorted(self.files.items()))
        return hashlib.sha1("\n".join(parts).encode(), usedforsecurity=False).hexdigest()


def etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Hub(ThreadingHTTPServer):
    """requests: (method, path, the Range header or ""), in the order they came."""

    daemon_threads = True

    def __init__(self, repos: Mapping[str, HubRepo]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos, self.requests = dict(repos), list[tuple[str, str, str]]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def downloads(self) -> list[str]:
        """The names of the files whose content was asked for."""
        matches = (FILE.fullmatch(path) for method, path, _ in self.requests if method == "GET")
        return [match["file"] for match in matches if match]


@contextmanager
def serve(repos: Mapping[str, HubRepo]) -> Iterator[Hub]:
    hub = Hub(repos)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Range", "")))
        match = API.fullmatch(path) or FILE.fullmatch(path)
        repo = self.server.repos.get(match["id"]) if match else None
        if match is None or repo is None:
            self._refuse(404, "RepoNotFound")
        elif match["revision"] not in (None, "main", repo.commit):
            self._refuse(404, "RevisionNotFound")
        elif match.re is FILE:
            self._file(repo, match["file"])
        else:
            self._json(_tree(repo) if match["kind"] == "tree" else _info(match["id"], repo))

    def _file(self, repo: HubRepo, name: str) -> None:
        if repo.gated:
            return self._refuse(403, "GatedRepo")
        if name not in repo.files:
            return self._refuse(404, "EntryNotFound", {"X-Repo-Commit": repo.commit})
        content = repo.files[name]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        headers = {"ETag": f'"{etag(content)}"', "X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        drop = repo.drops[name].pop(0) if self.command == "GET" and repo.drops.get(name) else ""
        return self._answer(206 if start else 200, content[start:], headers, drop)

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, headers: Mapping[str, str] | None = None) -> None:
        self._answer(status, b"", {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str], drop: str = "") -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if drop else body)
        if drop:
            self._hang_up(drop)

    def _hang_up(self, drop: str) -> None:
        self.wfile.flush()
        self.close_connection = True
        if drop == RESET:  # closing with a linger of 0 seconds sends a reset instead of an end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: `requests` has it."""


def _info(hub_id: str, repo: HubRepo) -> dict[str, object]:
    return {"id": hub_id, "sha": repo.commit, "private": False, "gated": repo.gated and "auto", "tags": []}


def _tree(repo: HubRepo) -> list[dict[str, object]]:
    return [
        {"type": "file", "path": name, "size": len(content), "oid": etag(content)[:40]}
        for name, content in repo.files.items()
    ]
