"""Requests that a server refuses: each keeps its number, and those behind it are made."""

import threading
from typing import Any

from tinker.proto import tinker_public_pb2 as pb

from tests.vlm.raw import PROMPT, SESSION_BODY, Raw, accepted, body_of, refused, sample_of, until
from tests.vlm.serving import Server
from vlm import nano


def test_a_request_that_is_refused_keeps_its_number(raw: Raw) -> None:
    run = raw.run(raw.session())
    message = pb.ForwardBackwardRequest.FromString(body_of(run, 6))
    message.data[0].loss_fn_inputs["weights"].shape[:] = [99]
    refusals = [
        raw.post("save_weights", model_id=run, seq_id=1, path="../x"),  # what the server refuses
        raw.post("save_weights", model_id=run, seq_id=2, path="x", ttl_seconds=-1),
        raw.post("load_weights", model_id=run, seq_id=3, path="tinker://x", optimizer=False),
        raw.post("optim_step", model_id=run, seq_id=4, optim_params={"learning_rate": None}),  # no request at all
        raw.post("save_weights", model_id=run, seq_id=5, path="x", no_such_field=1),
        raw.forward(message.SerializeToString()),  # no tensor
        raw.post("save_weights_external", model_id=run, seq_id=7, path="x/y"),
    ]
    ids = [accepted(response) for response in refusals]
    assert raw.loss(accepted(raw.pass_of(run, 8))) > 0
    named = "name", "ttl_seconds", "path", "learning_rate", "no_such_field", "datum", "checkpoint name"
    for request_id, words in zip(ids, named, strict=True):
        answer = raw.answer(request_id)
        assert answer["category"] == "user"
        assert words in answer["error"]


def test_bodies_without_a_run_in_memory_are_refused_at_once(raw: Raw) -> None:
    assert "optim_params" in refused(raw.post("optim_step", model_id="x", seq_id=1, no_such_field=1), 422)
    assert "seq_id" in refused(raw.post("save_weights", model_id=raw.run(raw.session()), seq_id=0, path="x"), 400)


def test_a_run_is_made_once(server: Server, raw: Raw) -> None:
    session = raw.session()
    raw.run(session)
    futures = server.state.futures
    until(lambda: futures.id_of(f"{session}:train:0/0") not in futures._answers)  # until it is written
    server.state.store.prune(0, -1e12, -1e12, 0)  # as after a day: the answer is not known any more
    lora = {"session_id": session, "base_model": nano.NAME, "lora_config": {"rank": 4}}
    assert "was made before" in refused(raw.post("create_model", model_seq_id=0, **lora), 400)
    assert "model_seq_id = -1" in refused(raw.post("create_model", model_seq_id=-1, **lora), 400)


def test_a_sampling_session_has_one_number_and_one_set_of_weights(raw: Raw) -> None:
    session = raw.session()
    run = raw.run(session)
    snapshot: dict[str, Any] = {"model_id": run, "sampling_session_seq_id": 3}
    first = raw.result("save_weights_for_sampler", seq_id=1, **snapshot)
    again = raw.result("save_weights_for_sampler", seq_id=2, **snapshot)
    assert first["sampling_session_id"] in again["error"]
    base = {"session_id": session, "base_model": nano.NAME}
    assert "other weights" in refused(raw.post("create_sampling_session", sampling_session_seq_id=3, **base), 400)
    assert "-1" in refused(raw.post("create_sampling_session", sampling_session_seq_id=-1, **base), 400)
    ids = [raw.post("create_sampling_session", sampling_session_seq_id=4, **base).json() for _ in range(2)]
    assert ids[0] == ids[1]


def test_projects_and_samples_of_nothing_are_named(raw: Raw) -> None:
    refused(raw.post("create_session", **SESSION_BODY, project_id="p"), 400, "TINKER_PROJECT_ID")
    weightless = sample_of(PROMPT, max_tokens=1) | {"base_model": None}
    refused(raw.post("asample", **weightless), 400, "names no weights")


def test_a_sample_is_cancelled_before_its_weights_are_there(server: Server, raw: Raw) -> None:
    run = raw.run(raw.session())
    path = raw.result("save_weights_for_sampler", model_id=run, seq_id=1, path="x")["path"]
    hold = threading.Event()
    server.state.registry.scheduler.submit(hold.wait, 20)  # whatever loads weights waits behind it
    request_id = raw.submit("asample", **sample_of(PROMPT, max_tokens=2000) | {"base_model": None, "model_path": path})
    written = server.state.registry.scheduler.tokens_sampled
    assert raw.post("cancel_future", request_id=request_id).status_code == 204
    hold.set()
    assert "cancelled" in raw.answer(request_id)["error"]
    assert server.state.registry.scheduler.tokens_sampled == written
