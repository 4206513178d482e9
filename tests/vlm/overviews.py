"""The server's page beside an overview that a test writes. Fixture: `page_server`."""

import json
from collections.abc import Iterator
from typing import Any

import fastapi
import pytest

from tests.vlm.serving import listening
from vlm.server import page

NOW = 1764096100.0
HOSTILE = "<script>hacked=1</script><img src=x onerror=hacked=1>'\"&amp;"


def a_run(number: int = 0, losses: list[list[Any]] | None = None, **changed: Any) -> dict[str, Any]:
    losses = [[1, NOW - 9, 2.5], [2, NOW - 8, 1.25], [3, NOW - 7, 0.7071]] if losses is None else losses
    run = {"id": f"{number:08x}-aaaa:train:0", "base_model": "kshot/nano-qwen3-vl", "rank": 32, "state": "live"}
    run |= {"steps": len(losses), "created": NOW - 60 - number, "last_request": NOW - 7}
    return run | {"user_metadata": {"name": f"run {number}"}, "losses": losses} | changed


def a_checkpoint(name: str, age: float, **changed: Any) -> dict[str, Any]:
    path = f"tinker://00000000-aaaa:train:0/weights/{name}"
    checkpoint = {"path": path, "kind": "weights", "created": NOW - age, "size_bytes": 1_234_567, "expires": None}
    return checkpoint | changed


def an_overview(**changed: Any) -> dict[str, Any]:
    queue = {"jobs": 3, "samples": 5, "sequences": 20, "tokens_sampled": 123456, "busy_share": 0.4}
    overview: dict[str, Any] = {"version": "0.1.0", "started": NOW - 3700, "now": NOW, "queue": queue}
    overview["memory"] = {"limit": 4 << 30, "taken": {"bodies": 0, "queues": 5 << 19, "answers": 999}}
    overview |= {"address": "http://127.0.0.1:8000", "models": [], "runs": [], "checkpoints": []}
    return overview | changed


class PageServer:
    """The page beside an overview: `overview` (None: no JSON) with `status`; wants `key` unless that is None."""

    def __init__(self) -> None:
        self.app = fastapi.FastAPI(docs_url=None)
        self.app.include_router(page.routes())
        self.app.add_api_route("/api/v1/overview", self.answer)
        self.url = ""
        self.reset()

    def reset(self) -> None:
        self.overview: Any = an_overview()
        self.status, self.key, self.keys_seen = 200, None, list[str]()

    def answer(self, request: fastapi.Request) -> fastapi.Response:
        self.keys_seen.append(request.headers.get("x-api-key", ""))
        if self.key is not None and self.keys_seen[-1] != self.key:
            return fastapi.Response(status_code=401)
        content = "<html>" if self.overview is None else json.dumps(self.overview)
        return fastapi.Response(content, self.status, media_type="application/json")


@pytest.fixture(scope="module")
def running_page() -> Iterator[PageServer]:
    fake = PageServer()
    with listening(fake.app, ws="none") as fake.url:
        yield fake


@pytest.fixture
def page_server(running_page: PageServer) -> PageServer:
    running_page.reset()
    return running_page
