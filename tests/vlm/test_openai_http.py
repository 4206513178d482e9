"""What goes over HTTP beside answers: models, errors before and in a stream, and clients that go away."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from typing import Any
from unittest.mock import AsyncMock

import httpx
import openai
import pytest
from fastapi.testclient import TestClient
from starlette.requests import ClientDisconnect, Request
from tinker import types

from kshot.errors import MissingError, ModelError, RequestError
from tests.vlm.openai_served import HELLO, PREFIXES, Models, application, checked, connected, refusal
from tests.vlm.raw import JSON, refused, until
from tests.vlm.serving import listening
from vlm import nano
from vlm.local.registry import LocalServiceClient
from vlm.local.sampling.decoder import TokenSequence
from vlm.local.sampling.sampler import SamplingRequest
from vlm.server.futures import INTERNAL
from vlm.server.openai.routes import stream

BODY = {"model": nano.NAME, "messages": HELLO}


def test_models_are_listed_under_both_prefixes(address: str) -> None:
    for prefix in PREFIXES:
        with connected(address, prefix) as api:
            (only,) = [checked(model) for model in api.models.list()]
            assert (only.id, only.object, only.owned_by, only.created) == (nano.NAME, "model", "kshot", 1_700_000_000)
            assert checked(api.models.retrieve(nano.NAME)) == only
            assert checked(api.completions.create(model=nano.NAME, prompt="a", max_tokens=1))
            assert checked(api.chat.completions.create(model=nano.NAME, messages=HELLO, max_tokens=1))


def test_unknown_models_are_not_found(address: str) -> None:
    path = "tinker://00000000-0000-0000-0000-000000000000:train:0/sampler_weights/000080"
    with connected(address) as api:
        for name in ("gpt-4", path):
            for call in (
                lambda name=name: api.models.retrieve(name),
                lambda name=name: api.completions.create(model=name, prompt="a"),
                lambda name=name: api.chat.completions.create(model=name, messages=HELLO),
            ):
                with pytest.raises(openai.NotFoundError) as caught:
                    call()
                assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.BadRequestError, match="no checkpoint path"):
            api.models.retrieve("tinker://nothing")


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "no JSON"), ("[]", "the body"), ("{}", "model is missing"), ('"a"', "the body"), ("[" * 200_000, "")],
)
def test_bodies_that_are_no_request(address: str, content: str, words: str) -> None:
    for path in ("completions", "chat/completions"):
        response = httpx.post(f"{address}/v1/{path}", content=content, headers=JSON)
        refused(response, 400, words)
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


class Scripted(Models):
    """Models whose sampler writes a few tokens and then does as told."""

    def __init__(self, service: LocalServiceClient, ending: Any, tokens: int = 2) -> None:
        super().__init__(service)
        self.ending, self.tokens = ending, tokens

    async def client(self, model_path: str | None, base_model: str | None, owner: Any) -> Any:
        inner = await super().client(model_path, base_model, owner)
        inner.start = lambda ask, on_token=None: self._start(inner.get_tokenizer(), ask, on_token)
        return inner

    def _start(self, tokenizer: Any, ask: SamplingRequest, on_token: Any) -> Any:
        future: Future[types.SampleResponse] = Future()
        sequence = TokenSequence(tokenizer, ask.params, 0)
        for token in tokenizer.encode("a b c d")[: self.tokens]:
            sequence.append(token, -1.0)
            if on_token:
                on_token(sequence)
        future.set_exception(self.ending)
        return future


def events(response: httpx.Response) -> list[str]:
    return [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]


def post(models: Models, body: dict[str, Any]) -> httpx.Response:
    client = TestClient(application(models), raise_server_exceptions=False)
    return client.post("/v1/chat/completions", json=body)


@pytest.mark.parametrize(
    ("ending", "status", "kind", "message"),
    [
        (RequestError("not like this"), 400, "invalid_request_error", "not like this"),
        (ValueError("secret"), 500, "server_error", INTERNAL),
    ],
)
def test_an_error_before_the_first_event_has_a_status_and_a_later_one_is_an_event(
    service: LocalServiceClient,
    ending: Exception,
    status: int,
    kind: str,
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    error = {"message": message, "type": kind, "param": None, "code": None}
    with caplog.at_level(logging.CRITICAL):
        for tokens, stream in ((0, False), (2, False), (0, True)):
            response = post(Scripted(service, ending, tokens), {**BODY, "stream": stream})
            assert response.status_code == status
            assert response.json() == {"error": error, "category": "user" if status < 500 else "server"}
        response = post(Scripted(service, ending), {**BODY, "stream": True})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    *pieces, last = events(response)
    assert [json.loads(each)["choices"][0]["delta"].get("content") for each in pieces] == ["", "a", " b"]
    assert json.loads(last)["error"] == error  # and no [DONE] after it


def test_the_official_client_raises_what_a_stream_breaks_with(service: LocalServiceClient) -> None:
    with listening(application(Scripted(service, RequestError("not like this")))) as address, connected(address) as api:
        stream, texts = api.chat.completions.create(model=nano.NAME, messages=HELLO, stream=True), list[Any]()
        with pytest.raises(openai.APIError, match="not like this"):
            texts.extend(piece.choices[0].delta.content for piece in stream)


def test_a_stream_ends_with_done(models: Models) -> None:
    pieces = events(post(models, {**BODY, "stream": True, "max_tokens": 2}))
    assert pieces[-1] == "[DONE]"
    assert all(json.loads(each)["object"] == "chat.completion.chunk" for each in pieces[:-1])


def test_models_that_cannot_be_loaded_are_not_found(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (ModelError("damaged"), MissingError("gone")):
        monkeypatch.setattr(models, "client", AsyncMock(side_effect=error))
        assert post(models, BODY).status_code == 404


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_cancels_its_sampling(address: str, models: Models, stream: bool) -> None:
    """So that nobody writes 4,000 tokens that nobody reads."""
    before = len(models.samplings)
    body: dict[str, Any] = {"model": nano.NAME, "prompt": ["a", "b"], "max_tokens": 4000, "n": 2, "stream": stream}
    with connected(address) as api:
        if stream:
            answer = api.completions.create(**body)
            next(iter(answer))
            answer.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                api.completions.create(**body, timeout=0.3)
    until(lambda: len(models.samplings) == before + 2 and all(each.done() for each in models.samplings))
    assert all(each.cancelled() for each in models.samplings[before:])


def test_what_is_streamed_is_closed_when_sending_fails() -> None:
    """As under servers that say so by an error (ASGI 2.4 and later)."""
    closed = list[str]()

    async def pieces() -> AsyncGenerator[dict[str, Any]]:
        try:
            while True:
                yield {}
        finally:
            closed.append("pieces")

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            raise OSError

    async def run() -> None:
        scope: Any = {"type": "http", "asgi": {"spec_version": "2.4"}, "method": "POST", "headers": []}
        response = await stream(Request(scope, asyncio.Event().wait), pieces())  # type: ignore[arg-type]
        with pytest.raises(ClientDisconnect):
            await response(scope, asyncio.Event().wait, send)  # type: ignore[arg-type]
        assert closed == ["pieces"]

    asyncio.run(run())


def test_others_are_answered_while_one_streams(address: str) -> None:
    with connected(address) as api:
        stream = api.completions.create(model=nano.NAME, prompt="a", max_tokens=2000, stream=True)
        next(iter(stream))
        assert api.completions.create(model=nano.NAME, prompt="b", max_tokens=3).choices[0].finish_reason == "length"
        stream.close()


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("n", 17, "less than or equal to 16"),
        ("presence_penalty", 0.5, "not supported"),
        ("logit_bias", {"5": 1}, "not supported"),
        ("min_p", 0.1, "not known"),
    ],
)
def test_what_is_wrong_is_named_by_both(api: openai.OpenAI, path: str, field: str, value: Any, words: str) -> None:
    refusal(api, path, words, field, **{field: value})


@pytest.mark.parametrize(
    "wrong",
    [
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x\ny"}}]}]},
        {"top_p": float("nan")},
        {"temperature": float("inf")},
        {"seed": 2**63},
        {"stop_token_ids": [-1]},
        {"unknown\n": 1},
        {"prompt": "\ud800"},
        {"prompt": "a", "\ud800": 1},
    ],
)
def test_odd_values_are_the_clients_fault(address: str, wrong: dict[str, Any]) -> None:
    path = "completions" if "prompt" in wrong else "chat/completions"
    content = json.dumps({**({} if "prompt" in wrong else {"messages": HELLO}), "model": nano.NAME, **wrong})
    refused(httpx.post(f"{address}/v1/{path}", content=content, headers=JSON), 400)
