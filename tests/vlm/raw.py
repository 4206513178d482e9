"""The Tinker protocol request by request over httpx, for tests of what the SDK's own order and retries would hide.

Bodies of training are written by the SDK's converters, and its answers read by them.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import tinker
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.proto.response_conv import deserialize_forward_backward_output, deserialize_sample_response
from tinker.types.forward_backward_input import ForwardBackwardInput
from tinker.types.forward_backward_request import ForwardBackwardRequest

from tests.vlm.serving import HEADERS
from vlm import nano
from vlm.inputs import datum, model_input

JSON = {"Content-Type": "application/json"}
PROTOBUF = {"Content-Type": "application/x-protobuf"}
SESSION, FORWARD = "/api/v1/create_session", "/api/v1/forward_backward"
SESSION_BODY = {"tags": [], "sdk_version": "0", "user_metadata": None, "type": "create_session"}
PROMPT = model_input([300, 301, 302])
DATA = [datum(PROMPT, [400, 401])]


@dataclass(frozen=True)
class Raw:
    """A connection to a server."""

    http: httpx.Client

    def post(self, name: str, /, **body: Any) -> httpx.Response:
        return self.http.post(f"/api/v1/{name}", json=body)

    def get(self, name: str) -> httpx.Response:
        return self.http.get(f"/api/v1/{name}")

    def submit(self, name: str, /, **body: Any) -> str:
        """The id of a request that was accepted."""
        return accepted(self.post(name, **body))

    def result(self, name: str, /, **body: Any) -> Any:
        """What an accepted request came to."""
        return self.answer(self.submit(name, **body))

    def session(self) -> str:
        session: str = self.post("create_session", **SESSION_BODY).json()["session_id"]
        return session

    def creating(self, session: str, number: int = 0, base_model: str = nano.NAME, **lora: int) -> httpx.Response:
        """A request for a new run, which is called `run_of(session, number)`."""
        body = {"session_id": session, "model_seq_id": number, "base_model": base_model}
        return self.post("create_model", **body, lora_config={"rank": 4, "seed": 7} | lora)

    def create(self, *args: Any, **lora: int) -> str:
        """The id of such a request that was accepted."""
        return accepted(self.creating(*args, **lora))

    def run(self, session: str, number: int = 0) -> str:
        """A new run, once it is there."""
        model: str = self.answer(self.create(session, number))["model_id"]
        assert model == run_of(session, number)
        return model

    def pass_of(
        self, run: str, seq: int, data: list[tinker.Datum] = DATA, *, forward_only: bool = False
    ) -> httpx.Response:
        """A forward_backward, or with forward_only a forward."""
        return self.forward(body_of(run, seq, data, forward_only=forward_only))

    def forward(self, body: bytes, **headers: str) -> httpx.Response:
        return self.http.post(FORWARD, content=body, headers=PROTOBUF | headers)

    def step(self, run: str, seq: int, learning_rate: float = 1e-2) -> httpx.Response:
        return self.post("optim_step", model_id=run, seq_id=seq, optim_params={"learning_rate": learning_rate})

    def retrieve(self, request_id: str, **headers: str) -> httpx.Response:
        return self.http.post("/api/v1/retrieve_future", json={"request_id": request_id}, headers=headers)

    def answer(self, request_id: str) -> Any:
        """What a request came to, as soon as it is there."""
        for _ in range(2400):  # two minutes: a loaded machine is slow to load a model
            response = self.retrieve(request_id)
            assert response.status_code == 200, response.text
            if response.headers["content-type"] != "application/json":
                return response.content
            if response.json().get("type") != "try_again":
                return response.json()
            time.sleep(0.05)
        raise AssertionError(f"request {request_id} does not end")

    def output(self, request_id: str) -> Any:
        """What a pass came to, in the SDK's type."""
        return deserialize_forward_backward_output(self.answer(request_id))

    def loss(self, request_id: str) -> float:
        value: float = self.output(request_id).metrics["loss:sum"]
        return value

    def sampled(self, request_id: str) -> Any:
        """What a sampling request came to, in the SDK's type."""
        return deserialize_sample_response(self.answer(request_id))


@contextmanager
def talking(address: str) -> Iterator[Raw]:
    """A connection of its own."""
    with httpx.Client(base_url=address, headers=HEADERS, timeout=60) as http:
        yield Raw(http)


def accepted(response: httpx.Response) -> str:
    """The id of the request that this answers."""
    assert response.status_code == 200, response.text
    request_id: str = response.json()["request_id"]
    return request_id


def refused(response: httpx.Response, status: int | None = None, words: str = "") -> str:
    """What a refusal says, once it has this status and the form of all errors: of the Tinker protocol, or of OpenAI."""
    assert 400 <= response.status_code < 500 if status is None else response.status_code == status, response.text
    error = response.json()
    assert set(error) == {"error", "category"}
    assert error["category"] == ("server" if response.status_code == 429 else "user")
    message: str = error["error"]["message"] if isinstance(error["error"], dict) else error["error"]
    assert words in message, message
    assert "\n" not in message
    assert "Traceback" not in response.text
    return message


def run_of(session: str, number: int = 0) -> str:
    return f"{session}:train:{number}"


def body_of(
    run: str,
    seq: int,
    data: list[tinker.Datum] = DATA,
    config: dict[str, float | str] | None = None,
    *,
    forward_only: bool = False,
) -> bytes:
    """The body of a pass as the SDK writes it."""
    loss = ForwardBackwardInput(data=data, loss_fn="cross_entropy", loss_fn_config=config)
    message = forward_backward_request_to_proto(ForwardBackwardRequest(loss, run, seq))
    message.forward_only = forward_only
    body: bytes = message.SerializeToString()
    return body


def sample_of(prompt: tinker.ModelInput, **params: Any) -> dict[str, Any]:
    """The body of a sampling request on the base model."""
    chunks = [{"type": "encoded_text", "tokens": chunk.tokens} for chunk in prompt.chunks]  # type: ignore[union-attr]
    return {"base_model": nano.NAME, "prompt": {"chunks": chunks}, "sampling_params": params, "num_samples": 1}


def files(folder: Path, but: Path) -> dict[Path, bytes | None]:
    """All that is below a folder, save below `but`."""
    paths = [path for path in folder.rglob("*") if path != but and but not in path.parents]
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition."""
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came to that")
