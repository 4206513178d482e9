"""A stand-in for the Hugging Face hub on the loopback that takes uploads: the requests of `huggingface_hub` for making
a repository and committing to it, small files in the commit and weights by LFS, counted.

with accepting({"o/there": True}) as hub:      # repositories that are there: name → whether it is private
    ... HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN ...
    hub.repos["o/new"].files                   # {"README.md": b"..."}
"""

import base64
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_nobody"  # noqa: S105 - the stand-in's own
LFS = ".safetensors"
API = re.compile(r"/api/(?P<kind>model|dataset)s/(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<what>preupload|commit)/main)?")
BATCH = re.compile(r"/(?:datasets/)?(?P<repo>[\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch")


@dataclass
class Written:
    """A repository. commits: the message and the names of each."""

    kind: str
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[str, list[str]]] = field(default_factory=list)


class UploadHub(ThreadingHTTPServer):
    """requests: "METHOD /path", in the order they came. objects: what came by LFS, by SHA-256."""

    daemon_threads = True

    def __init__(self, there: Mapping[str, bool]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos = {name: Written("model", private) for name, private in there.items()}
        self.requests, self.objects = list[str](), dict[str, bytes]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def accepting(there: Mapping[str, bool]) -> Iterator[UploadHub]:
    hub = UploadHub(there)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: UploadHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self._path()
        match = API.fullmatch(path)
        repo = self.server.repos.get(match["repo"]) if match else None
        if match is None or repo is None:
            return self._answer({"error": "Repository not found"}, 404, code="RepoNotFound")
        return self._answer({"id": match["repo"], "private": repo.private, "tags": [], "siblings": []})

    def do_PUT(self) -> None:
        content = self._body()
        self.server.objects[self._path().rpartition("/")[2]] = content
        self._answer({})

    def do_POST(self) -> None:
        path, body = self._path(), self._body()
        api, batch = API.fullmatch(path), BATCH.fullmatch(path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid user token."}, 401)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._answer({"warnings": [], "errors": []})
        if batch:
            return self._answer({"transfer": "basic", "objects": [self._place(o) for o in json.loads(body)["objects"]]})
        if api and api["what"] == "preupload":
            return self._answer({"files": [_mode(file["path"]) for file in json.loads(body)["files"]]})
        if api and api["what"] == "commit":
            return self._commit(api["repo"], [json.loads(line) for line in body.splitlines()])
        return self._answer({"error": f"the stand-in has no {path}"}, 500)

    def _create(self, given: dict[str, str]) -> None:
        name = f"{given['organization']}/{given['name']}"
        kind = given.get("type", "model")
        url = f"{self.server.url}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if given["organization"] == "forbidden":
            return self._answer({"error": "You don't have the rights to create it"}, 403)
        if name in self.server.repos:
            return self._answer({"error": "You already created this repo", "url": url}, 409)
        self.server.repos[name] = Written(kind, given.get("visibility") == "private")
        return self._answer({"url": url})

    def _place(self, asked: dict[str, object]) -> dict[str, object]:
        return {**asked, "actions": {"upload": {"href": f"{self.server.url}/lfs/{asked['oid']}", "header": {}}}}

    def _commit(self, name: str, lines: list[dict[str, dict[str, str]]]) -> None:
        repo, names = self.server.repos[name], []
        for line in lines[1:]:
            value = line["value"]
            by_lfs = line["key"] == "lfsFile"
            content = self.server.objects[value["oid"]] if by_lfs else base64.b64decode(value["content"])
            assert not by_lfs or sha256(content).hexdigest() == value["oid"]
            repo.files[value["path"]] = content
            names.append(value["path"])
        repo.commits.append((lines[0]["value"]["summary"], names))
        self._answer({"commitUrl": f"{self.server.url}/{name}/commit/{'a' * 40}", "commitOid": "a" * 40})

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        return path

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, content: object, status: int = 200, code: str = "") -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "X-Error-Code": code}
        for key, value in headers.items():
            if value:
                self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: `requests` has it."""


def _mode(path: str) -> dict[str, object]:
    return {"path": path, "uploadMode": "lfs" if path.endswith(LFS) else "regular", "shouldIgnore": False}
