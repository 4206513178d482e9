"""A stand-in for the Hugging Face hub on the loopback: the requests of `huggingface_hub` for reading sets and models,
and for making a repository and committing to it (small files in the commit, weights by LFS), counted.

with serve({"owner/name": HubRepo({"README.md": b"..."})}) as hub:
    ... HF_ENDPOINT=hub.url, and to write HF_TOKEN=TOKEN ...
    hub.requests        # [("GET", "/datasets/owner/name/resolve/<commit>/README.md", "bytes=100-")]

`parquet` makes a set's file as the hub has it; `ask` has a process of its own read from the stand-in.
"""

import base64
import hashlib
import io
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

TOKEN = "hf_of_nobody"  # noqa: S105 - the stand-in's own
NAME = r"(?P<id>[\w.-]+/[\w.-]+)"
API = re.compile(rf"/api/(?:dataset|model)s/{NAME}(?:/(?P<what>revision|tree|preupload|commit)/(?P<revision>[^/]+))?")
FILE = re.compile(rf"/(?:datasets/)?{NAME}/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
BATCH = re.compile(rf"/(?:datasets/)?{NAME}\.git/info/lfs/objects/batch")
ROOT = Path(__file__).parents[2]
BARE_CARD = b"---\nlicense: mit\n---\n"
CUT, RESET = "cut", "reset"  # the connection ends early, or is reset


@dataclass
class HubRepo:
    """files: name → content. gated: its files are refused. drops: file → how each next answer breaks off half-way.

    kind, private: as it was made. commits: the message and the names of each that was sent.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    gated: bool = False
    drops: dict[str, list[str]] = field(default_factory=dict)
    kind: str = "model"
    private: bool = False
    commits: list[tuple[str, list[str]]] = field(default_factory=list)

    @cached_property
    def commit(self) -> str:
        parts = (f"{name} {etag(content)}" for name, content in sorted(self.files.items()))
        return hashlib.sha1("\n".join(parts).encode(), usedforsecurity=False).hexdigest()


def etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Hub(ThreadingHTTPServer):
    """requests: (method, path, the Range header or ""), in the order they came. objects: sent by LFS, by SHA-256."""

    daemon_threads = True

    def __init__(self, repos: Mapping[str, HubRepo]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos, self.requests, self.objects = dict(repos), list[tuple[str, str, str]](), dict[str, bytes]()

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
        path = self._path()
        match = API.fullmatch(path) or FILE.fullmatch(path)
        repo = self.server.repos.get(match["id"]) if match else None
        if match is None or repo is None:
            self._refuse(404, "RepoNotFound")
        elif match["revision"] not in (None, "main", repo.commit):
            self._refuse(404, "RevisionNotFound")
        elif match.re is FILE:
            self._file(repo, match["file"])
        else:
            self._json(_tree(repo) if match["what"] == "tree" else _info(match["id"], repo))

    def do_PUT(self) -> None:
        self.server.objects[self._path().rpartition("/")[2]] = self._body()
        self._json({})

    def do_POST(self) -> None:
        path, body = self._path(), self._body()
        api = API.fullmatch(path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._json({"error": "Invalid user token."}, 401)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._json({"warnings": [], "errors": []})
        elif BATCH.fullmatch(path):
            objects = [{**o, "actions": self._upload_of(o["oid"])} for o in json.loads(body)["objects"]]
            self._json({"transfer": "basic", "objects": objects})
        elif api and api["what"] == "preupload":
            self._json({"files": [_mode(file["path"]) for file in json.loads(body)["files"]]})
        elif api and api["what"] == "commit":
            self._commit(api["id"], *map(json.loads, body.splitlines()))
        else:
            self._json({"error": f"the stand-in has no {path}"}, 500)

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

    def _create(self, wanted: dict[str, str]) -> None:
        name, kind = f"{wanted['organization']}/{wanted['name']}", wanted.get("type", "model")
        url = f"{self.server.url}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if wanted["organization"] == "forbidden":
            return self._json({"error": "You don't have the rights to create it"}, 403)
        if name in self.server.repos:
            return self._json({"error": "You already created this repo", "url": url}, 409)
        self.server.repos[name] = HubRepo(kind=kind, private=wanted.get("visibility") == "private")
        return self._json({"url": url})

    def _upload_of(self, oid: str) -> dict[str, Any]:
        return {"upload": {"href": f"{self.server.url}/lfs/{oid}", "header": {}}}

    def _commit(self, name: str, header: dict[str, Any], *lines: dict[str, Any]) -> None:
        repo, sent = self.server.repos[name], dict[str, bytes]()
        for line in lines:
            value, by_lfs = line["value"], line["key"] == "lfsFile"
            content = self.server.objects[value["oid"]] if by_lfs else base64.b64decode(value["content"])
            assert not by_lfs or etag(content) == value["oid"]
            sent[value["path"]] = content
        repo.files |= sent
        repo.commits.append((header["value"]["summary"], list(sent)))
        self._json({"commitUrl": f"{self.server.url}/{name}/commit/{'a' * 40}", "commitOid": "a" * 40})

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Range", "")))
        return path

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, value: object, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, headers: Mapping[str, str] | None = None) -> None:
        self._answer(status, b"", {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str], drop: str = "") -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
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
    gated = repo.gated and "auto"
    return {"id": hub_id, "sha": repo.commit, "private": repo.private, "gated": gated, "tags": [], "siblings": []}


def _tree(repo: HubRepo) -> list[dict[str, object]]:
    return [
        {"type": "file", "path": name, "size": len(content), "oid": etag(content)[:40]}
        for name, content in repo.files.items()
    ]


def _mode(path: str) -> dict[str, object]:
    mode = "lfs" if path.endswith(".safetensors") else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False}


def class_label(*names: str) -> dict[str, Any]:
    return {"names": list(names), "_type": "ClassLabel"}


def value(dtype: str) -> dict[str, Any]:
    return {"dtype": dtype, "_type": "Value"}


def parquet(images: Sequence[Any], **columns: tuple[dict[str, Any], Sequence[Any]]) -> bytes:
    """Columns image, those given (a feature and its values) and note, with the features in the schema as the hub writes
    them; two rows a group. An image that is bytes has the name of a file that is not there beside it, as on the hub."""
    columns |= {"note": (value("string"), ["a note"] * len(images))}
    features = {"image": {"_type": "Image"}, **{name: feature for name, (feature, _) in columns.items()}}
    types = {name: feature.get("dtype", "int64") for name, (feature, _) in columns.items()}
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema({"image": image, **{n: pa.type_for_alias(t) for n, t in types.items()}}, metadata)
    stored = [{"bytes": x, "path": f"{n}.png"} if isinstance(x, bytes) else x for n, x in enumerate(images)]
    table = pa.table({"image": stored, **{name: values for name, (_, values) in columns.items()}}, schema)
    stream = io.BytesIO()
    pq.write_table(table, stream, row_group_size=2)
    return stream.getvalue()


def one_file(content: bytes) -> HubRepo:
    return HubRepo({"README.md": BARE_CARD, "data/train-00000-of-00001.parquet": content})


def ask(
    url: str, home: Path, driver: str, requests: object, offline: str = "0", *, silent: bool = False
) -> list[dict[str, Any]]:
    """What a program prints as JSON and nothing else, run with the requests as JSON and the stand-in as its hub. home:
    of its caches. silent: it must print nothing on stderr. The hub's libraries read their settings when they are
    imported: so it is a process of its own."""
    ours = {key: text for key, text in os.environ.items() if not key.startswith("HF_")}
    hub = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": offline, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", driver, json.dumps(requests)]
    env = {**ours, **hub, "NO_PROXY": "127.0.0.1", "KSHOT_CACHE": str(home / "kshot")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not silent or done.stderr == ""
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers
