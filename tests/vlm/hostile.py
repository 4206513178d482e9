"""What the tests of a server's bad days share: how an error must look, and what becomes of accepted requests."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

KEY = "tml-a-key-of-a-test"
JSON = {"Content-Type": "application/json"}
PROTOBUF = {"Content-Type": "application/x-protobuf"}
SESSION, FORWARD = "/api/v1/create_session", "/api/v1/forward_backward"
SESSION_BODY = {"tags": [], "sdk_version": "0", "user_metadata": None, "type": "create_session"}
LORA = {"rank": 2, "train_mlp": False, "train_unembed": False}


def answer(client: httpx.Client, response: httpx.Response) -> Any:
    """What became of a request that is answered later."""
    assert response.status_code == 200, response.text
    body = {"request_id": response.json()["request_id"]}
    while True:
        told = client.post("/api/v1/retrieve_future", json=body)
        assert told.status_code == 200, told.text
        if told.headers["content-type"] != "application/json":
            return told.content
        if told.json().get("type") != "try_again":
            return told.json()


def asked(client: httpx.Client, name: str, body: dict[str, Any]) -> Any:
    return answer(client, client.post(f"/api/v1/{name}", json=body))


def a_session(client: httpx.Client) -> str:
    return client.post(SESSION, json=SESSION_BODY).json()["session_id"]


def a_run(client: httpx.Client, session: str, base_model: str, number: int = 0) -> str:
    body = {"session_id": session, "model_seq_id": number, "base_model": base_model, "lora_config": LORA}
    return asked(client, "create_model", body)["model_id"]


def refused(response: httpx.Response, status: int | None = None, words: str = "", category: str = "user") -> None:
    """In the form of all errors: of the Tinker protocol, or of OpenAI."""
    assert status is None or response.status_code == status, response.text
    assert 400 <= response.status_code < 500, response.text
    told = response.json()
    assert set(told) == {"error", "category"}
    message = told["error"]["message"] if isinstance(told["error"], dict) else told["error"]
    assert told["category"] == category
    assert words in message, message
    assert "Traceback" not in response.text
    assert "\n" not in message


def files(folder: Path, but: Path) -> dict[Path, bytes | None]:
    """All that is below a folder, save below `but`."""
    found = [path for path in folder.rglob("*") if path != but and but not in path.parents]
    return {path: path.read_bytes() if path.is_file() else None for path in found}


def until(true: Callable[[], bool]) -> None:
    waiting = threading.Event()
    for _ in range(3000):
        if true():
            return
        waiting.wait(0.01)
    raise AssertionError("it never came to that")
