"""Bodies, names and images that mean harm: each is refused by name, and nothing outside the state folder is touched."""

import base64
import json
import logging
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import tinker
from tinker import types

from tests.traced import traced
from tests.vlm.raw import JSON, SESSION, SESSION_BODY, Raw, accepted, files, refused, until
from tests.vlm.serving import Server, served
from vlm import nano

API = "/api/v1"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the state folder is in, with a checkpoint of others."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "others" / "weights" / "a").mkdir(parents=True)
    (folder / "others" / "weights" / "a" / "kshot.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[Server]:
    with served(home / "state") as running:
        yield running


@pytest.fixture(scope="module")
def session(raw: Raw) -> str:
    return raw.session()


@pytest.fixture(scope="module")
def run(raw: Raw, session: str) -> str:
    return raw.run(session)


def number(server: Server, run: str) -> int:
    """Of the run's next request."""
    return server.state.runs[run].next_seq


# Bodies

TWICE = b'{"type":1,"type":[]}'
NO_REQUEST = {
    "nothing": b"",
    "cut off": b'{"a": [1, 2',
    "two": b"{}{}",
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "half a pair": b'{"a": "\\ud800"}',
    "NaN": b'{"a": NaN}',
    "infinity": b'{"a": -Infinity}',
    "huge integer": b'{"a": ' + b"9" * 100_000 + b"}",
    "deep list": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep object": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "deep and open": b"[" * 1_000_000,
    "null": b"null",
    "list": b"[]",
    "text": b'"a"',
    "number": b"1e999",
    "twice": TWICE,
}


@pytest.fixture(scope="module")
def posts(server: Server) -> list[str]:
    """The paths that take JSON."""
    paths = server.app.app.openapi()["paths"].items()
    bodies = {path: methods.get("post", {}).get("requestBody", {"content": {}})["content"] for path, methods in paths}
    return [path.replace("{session_id}", "x") for path, content in bodies.items() if "application/json" in content]


@pytest.mark.parametrize("body", NO_REQUEST.values(), ids=NO_REQUEST)
def test_what_is_no_json_or_no_object_is_refused_everywhere(raw: Raw, posts: list[str], body: bytes) -> None:
    assert len(posts) > 18
    for path in posts:
        if path != f"{API}/telemetry" or body != TWICE:  # which takes any object
            refused(raw.http.post(path, content=body, headers=JSON))


def test_values_at_every_depth_are_kept_or_refused(raw: Raw) -> None:
    """Whatever Python's stack has left when it looks at them."""
    for depth in (*range(150, 240), *range(900, 1000, 3)):
        value = b"[" * depth + b"]" * depth
        body = b'{"tags": [], "sdk_version": "0", "user_metadata": {"a": %b}}' % value
        response = raw.http.post(SESSION, content=body, headers=JSON)
        if response.status_code == 200:
            kept = raw.get(f"sessions/{response.json()['session_id']}").json()
            assert kept["user_metadata"] == {"a": value.decode()}
        else:
            refused(response, 422, "recursion limit")


def test_odd_texts_come_back_as_they_were(raw: Raw) -> None:
    metadata = {"nul": "\0", "pair": "\U0001f600", "mark": "\ufeff", "line": "a\r\nb", "": "'\"\\;--"}
    body = SESSION_BODY | {"user_metadata": metadata}
    session = raw.http.post(SESSION, json=body).json()["session_id"]
    assert raw.get(f"sessions/{session}").json()["user_metadata"] == metadata
    body["user_metadata"] = {"a": "x" * (1 << 16)}
    refused(raw.http.post(SESSION, json=body), 400, "user_metadata")


# Names

RUN = "00000000-0000-4000-8000-000000000000:train:0"
NAMES = {
    "up": "../x",
    "further up": "../../others/weights/a",
    "in between": "a/../../b",
    "here": ".",
    "parent": "..",
    "hidden": ".x.tmp",
    "absolute": "/etc/passwd",
    "backslash": "..\\x",
    "NUL": "a\0b",
    "line": "a\nb",
    "long": "x" * 5000,
    "almost too long": "x" * 129,
    "unicode": "é",
    "look-alike dots": "\u2024\u2024\uff0fx",
    "nothing": "",
    "space": " ",
    "encoded": "%2e%2e%2fx",
    "home": "~/x",
    "device": "con:",
    "path": "tinker://../..",
}


@pytest.fixture
def untouched(home: Path) -> Iterator[None]:
    """Nothing changes beside the state folder, nor in it but for what the server keeps itself."""
    state = home / "state"
    outside, inside = files(home, but=state), sorted(path.name for path in state.iterdir())
    yield
    assert files(home, but=state) == outside
    assert sorted(path.name for path in state.iterdir()) == inside
    assert [path for path in state.rglob("*") if path.name.startswith(".") and path.name != ".server.lock"] == []


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_names_that_lead_elsewhere(raw: Raw, server: Server, session: str, run: str, name: str) -> None:
    client = raw.http
    for endpoint in ("save_weights", "save_weights_for_sampler"):
        turned_down(raw.result(endpoint, model_id=run, seq_id=number(server, run), path=name), "name")
    paths = [name, f"tinker://{name}", f"tinker://{run}/weights/{name}", f"tinker://{name}/weights/a"]
    for path in [*paths, f"tinker://{run}/{name}/a", f"tinker://{run}/weights/a/{name}"]:
        bodies = {
            "load_weights": {"session_id": session, "model_seq_id": 8, "path": path, "optimizer": False},
            "weights_info": {"tinker_path": path},
            "create_sampling_session": {"session_id": session, "sampling_session_seq_id": 9, "model_path": path},
            "asample": {"model_path": path, **SAMPLE},
        }
        for endpoint, body in bodies.items():
            refused(raw.post(endpoint, **body))
        turned_down(raw.result("load_weights", model_id=run, seq_id=number(server, run), path=path, optimizer=False))
        refused(client.post("/v1/completions", json={"model": path, "prompt": "a"}))
        refused(client.post("/oai/api/v1/chat/completions", json={"model": path, "messages": HELLO}))
    refused(raw.creating(name), 404)
    refused(raw.creating(session, 77, name), 400, "unknown model")
    for written in (name, quote(name, safe="")):
        in_path(client, run, written)


SAMPLE = {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [5]}]}, "sampling_params": {"max_tokens": 1}}
HELLO = [{"role": "user", "content": "hello"}]


def turned_down(answer: Any, words: str = "") -> None:
    """A request that has a number is answered in its turn, also where nothing is done."""
    assert answer["category"] == "user", answer
    assert words in answer["error"]


def in_path(client: httpx.Client, run: str, name: str) -> None:
    """The same where it is part of the address, as it is and percent-encoded."""
    base = f"{API}/training_runs"
    places = [f"{base}/{run}/checkpoints/weights/{name}", f"{base}/{name}/checkpoints/weights/a"]
    for place in [*places, f"{base}/{run}/checkpoints/{name}/a"]:
        for method, end in (("DELETE", ""), ("PUT", "/ttl"), ("POST", "/publish"), ("DELETE", "/publish")):
            with suppress(httpx.InvalidURL):  # what httpx does not send
                body = {"ttl_seconds": 1} if end == "/ttl" else None
                response = client.request(method, place + end, json=body, headers=JSON)
                assert 300 <= response.status_code < 500, response.text
    for place in (f"{API}/sessions/{name}", f"{API}/samplers/{name}", f"/v1/models/{name}", f"{base}/{name}"):
        with suppress(httpx.InvalidURL):
            response = client.get(place)
            assert response.status_code < 500, response.text
            assert "root:" not in response.text


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("number", [-1, 10**9, 10**30, 2**63])
def test_numbers_that_make_no_run(raw: Raw, session: str, number: int) -> None:
    refused(raw.creating(session, number), 400, "model_seq_id")


@pytest.mark.parametrize("rank", [0, -1, 1025, 10**9, 10**30])
def test_ranks_that_nobody_has_memory_for(raw: Raw, session: str, rank: int) -> None:
    response = raw.creating(session, 100 + abs(rank) % 97, rank=rank)
    turned_down(raw.answer(accepted(response)) if response.status_code == 200 else response.json(), "rank")


# Images


def picture(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that says it has so many pixels, of one colour and one bit each."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes(min(1 + (width + 7) // 8, 9000) * min(height, 64)), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (picture(60_000, 60_000), "pixels"),
        (picture(2**31 - 1, 2**31 - 1), ""),
        (picture(89_478_486, 1), ""),
        (picture(1, 89_478_486), ""),
        (picture(0, 0), ""),
        (picture(64, 64)[:45], ""),
        (b"\x89PNG\r\n\x1a\n", ""),
        (b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(20), ""),
        (b"\xff\xd8\xff\xe0" + bytes(100), ""),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9999999 9999999\n", ""),
        (b"no image at all", ""),
    ],
    ids=range(11),
)
def test_images_that_would_fill_the_memory(raw: Raw, server: Server, run: str, data: bytes, words: str) -> None:
    sample = {**SAMPLE, "base_model": nano.NAME}
    sample["prompt"] = {"chunks": [{"type": "image", "data": base64.b64encode(data).decode(), "format": "png"}]}
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]
    chat = {"model": nano.NAME, "max_tokens": 1, "messages": [{"role": "user", "content": parts}]}
    with traced(64 << 20):
        refused(raw.http.post("/v1/chat/completions", json=chat), 400, words)
        passed = raw.pass_of(run, number(server, run), [picture_datum(data)])
        for answer in (raw.answer(accepted(passed)), raw.result("asample", **sample)):
            turned_down(answer, words)
            assert "\n" not in answer["error"]


def picture_datum(data: bytes) -> tinker.Datum:
    image = types.ImageChunk(data=data, format="png", expected_tokens=None)
    prompt = tinker.ModelInput(chunks=[types.EncodedTextChunk(tokens=[5]), image])
    return tinker.Datum(model_input=prompt, loss_fn_inputs={"target_tokens": [0, 0], "weights": [0.0, 0.0]})


# What the server does not tell


def test_a_failure_of_the_servers_own_is_told_without_details(
    raw: Raw, server: Server, run: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At once, later, and to OpenAI's clients: the log has them."""

    def fail(*_: Any, **__: Any) -> Any:
        raise ValueError("a secret of /home/somebody")

    monkeypatch.setattr(type(server.state.store), "newest", fail)
    monkeypatch.setattr(type(server.state.samplers), "client", fail)
    monkeypatch.setattr(type(server.state.runs[run].client), "optim_step", fail)
    monkeypatch.setattr(logging.getLogger("uvicorn"), "handlers", [caplog.handler])  # in place of the console
    raw.http.headers["connection"] = "close"  # after such a failure the server closes it
    now = raw.get("training_runs")
    later = raw.answer(accepted(raw.step(run, number(server, run))))
    chat = raw.http.post("/v1/chat/completions", json={"model": nano.NAME, "messages": HELLO})
    assert now.status_code == chat.status_code == 500
    errors = [now.json()["error"], later["error"], chat.json()["error"]["message"]]
    assert {now.json()["category"], later["category"], chat.json()["category"]} == {"server"}
    assert len(set(errors)) == 1
    assert "secret" not in json.dumps(errors) + now.text + chat.text
    until(lambda: sum("secret" in str(record.exc_info) for record in caplog.records) == 3)  # logged after the answer
