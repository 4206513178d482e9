"""Requests that a server refuses: each keeps its number, and those behind it are made."""

import threading
import time
from typing import Any

import httpx
import pytest
import tinker
from tinker.proto import tinker_public_pb2 as pb

from tests.vlm.raw import PROTOBUF, Raw, accepted, body_of, refused, sample_of
from tests.vlm.serving import Server
from vlm import nano
from vlm.inputs import datum, model_input

PROMPT = model_input([300, 301, 302])


@pytest.fixture
def data() -> list[tinker.Datum]:
    return [datum(PROMPT, [400, 401])]


def save(raw: Raw, kind: str, **body: Any) -> httpx.Response:
    return raw.http.post(f"/api/v1/{kind}", json=body)


def test_a_request_that_is_refused_keeps_its_number(raw: Raw, data: list[tinker.Datum]) -> None:
    run = raw.run(raw.session())
    message = pb.ForwardBackwardRequest.FromString(body_of(run, 6, data))
    message.data[0].loss_fn_inputs["weights"].shape[:] = [99]
    refusals = [
        save(raw, "save_weights", model_id=run, seq_id=1, path="../x"),  # what the server refuses
        save(raw, "save_weights", model_id=run, seq_id=2, path="x", ttl_seconds=-1),
        save(raw, "load_weights", model_id=run, seq_id=3, path="tinker://x", optimizer=False),
        raw.post("optim_step", model_id=run, seq_id=4, optim_params={"learning_rate": None}),  # no request at all
        save(raw, "save_weights", model_id=run, seq_id=5, path="x", no_such_field=1),
        raw.http.post("/api/v1/forward_backward", content=message.SerializeToString(), headers=PROTOBUF),  # no tensor
    ]
    ids = [accepted(response) for response in refusals]
    loss = accepted(raw.pass_of(run, 7, data))
    assert raw.loss(loss) > 0
    said = [raw.answer(request_id) for request_id in ids]
    assert [each["category"] for each in said] == ["user"] * 6
    for each, part in zip(
        said, ("name", "ttl_seconds", "path", "learning_rate", "no_such_field", "datum"), strict=True
    ):
        assert part in each["error"]


def test_bodies_without_a_run_in_memory_are_refused_at_once(raw: Raw) -> None:
    assert "optim_params" in refused(raw.post("optim_step", model_id="x", seq_id=1, no_such_field=1), 422)
    assert "seq_id" in refused(save(raw, "save_weights", model_id=raw.run(raw.session()), seq_id=0, path="x"), 400)


def test_a_run_is_made_once(server: Server, raw: Raw) -> None:
    session = raw.session()
    raw.run(session)
    while server.state.futures.id_of(f"{session}:train:0/0") in server.state.futures._answers:
        time.sleep(0.01)  # until it is written
    server.state.store.prune(0, -1e12, -1e12, 0)  # as after a day: the answer is not known any more
    lora = {"session_id": session, "base_model": nano.NAME, "lora_config": {"rank": 4}}
    assert "was made before" in refused(raw.post("create_model", model_seq_id=0, **lora), 400)
    assert "model_seq_id = -1" in refused(raw.post("create_model", model_seq_id=-1, **lora), 400)


def test_a_sampling_session_has_one_number_and_one_set_of_weights(raw: Raw) -> None:
    session = raw.session()
    run = raw.run(session)
    snapshot: dict[str, Any] = {"model_id": run, "sampling_session_seq_id": 3}
    first = raw.answer(raw.asked("save_weights_for_sampler", seq_id=1, **snapshot))
    again = raw.answer(raw.asked("save_weights_for_sampler", seq_id=2, **snapshot))
    assert first["sampling_session_id"] in again["error"]
    base = {"session_id": session, "base_model": nano.NAME}
    assert "other weights" in refused(raw.post("create_sampling_session", sampling_session_seq_id=3, **base), 400)
    assert "-1" in refused(raw.post("create_sampling_session", sampling_session_seq_id=-1, **base), 400)
    ids = [raw.post("create_sampling_session", sampling_session_seq_id=4, **base).json() for _ in range(2)]
    assert ids[0] == ids[1]


def test_projects_and_samples_of_nothing_are_named(raw: Raw) -> None:
    given = {"tags": [], "user_metadata": {}, "sdk_version": "0", "project_id": "p"}
    assert "TINKER_PROJECT_ID" in refused(raw.post("create_session", **given), 400)
    asked = sample_of(PROMPT, max_tokens=1) | {"base_model": None}
    assert "names no weights" in refused(raw.post("asample", **asked), 400)


def test_a_sample_is_cancelled_before_its_weights_are_there(server: Server, raw: Raw) -> None:
    run = raw.run(raw.session())
    path = raw.answer(accepted(save(raw, "save_weights_for_sampler", model_id=run, seq_id=1, path="x")))["path"]
    hold = threading.Event()
    server.state.registry.scheduler.submit(hold.wait, 20)  # whatever loads weights waits behind it
    asked = sample_of(PROMPT, max_tokens=2000) | {"base_model": None, "model_path": path}
    request_id = accepted(raw.post("asample", **asked))
    written = server.state.registry.scheduler.tokens_sampled
    assert raw.post("cancel_future", request_id=request_id).status_code == 204
    hold.set()
    assert "cancelled" in raw.answer(request_id)["error"]
    assert server.state.registry.scheduler.tokens_sampled == written
