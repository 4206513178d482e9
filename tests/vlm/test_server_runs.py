"""Runs on a server: their requests in whatever order, twice, in parts, packed, too many, given up, refused."""

import re
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import tinker
import torch
import zstandard
from safetensors.torch import load_file
from tinker import types
from tinker.proto import tinker_public_pb2 as pb

from tests.vlm.checkpoints import copied, with_weights
from tests.vlm.raw import PROMPT, SESSION_BODY, Raw, accepted, body_of, refused, run_of, sample_of, talking, until
from tests.vlm.services import PATIENCE, close, connected, log_probs, step
from tests.vlm.serving import MODEL_PATHS, Server, served
from vlm import nano
from vlm.inputs import datum, model_input
from vlm.local.registry import EngineRegistry
from vlm.server import runs
from vlm.server.limits import memory as server_memory
from vlm.server.owners import EVERYBODY, Owner
from vlm.server.tinker import routes, sampling

ADAM = types.AdamParams(learning_rate=1e-2)
OTHER = "other/nano"
Alone = dict[str, tuple[list[float], Any]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two models: the nano one, and one whose last norm is another."""
    folder = copied(nano.folder(), tmp_path_factory.mktemp("other"))
    norm = "model.language_model.norm.weight"
    with_weights(folder, {norm: 1.5 * load_file(folder / "model.safetensors")[norm]})
    state = tmp_path_factory.mktemp("state")
    with served(state, EngineRegistry(state, model_paths={**MODEL_PATHS, OTHER: str(folder)})) as server:
        yield server


@pytest.fixture(scope="module")
def data() -> list[tinker.Datum]:
    """Texts of several lengths."""
    rng = np.random.default_rng(0)
    lengths = [(5, 2), (9, 4), (3, 3), (12, 1), (6, 6), (4, 2), (7, 5)]
    return [
        datum(model_input(rng.integers(300, 4000, prompt).tolist()), rng.integers(300, 4000, answer).tolist())
        for prompt, answer in lengths
    ]


def in_order(server: Server, data: list[tinker.Datum], base_model: str = nano.NAME) -> tuple[list[float], Any]:
    """The losses and the log-probabilities afterwards of a run of the SDK's alone, three steps on seed 7."""
    with connected(server.address) as client:
        run = client.create_lora_training_client(base_model, rank=4, seed=7).result(PATIENCE)
        losses = [step(run, data, ADAM) for _ in range(3)]
        return losses, log_probs(run, data)


@pytest.fixture(scope="module")
def alone(server: Server, data: list[tinker.Datum]) -> Alone:
    """`in_order` of each model."""
    return {name: in_order(server, data, name) for name in (nano.NAME, OTHER)}


def test_requests_are_made_in_the_order_of_their_numbers(
    alone: Alone, raw: Raw, data: list[tinker.Datum], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "PATIENCE", 0.1)
    session = raw.session()
    creating, run = raw.create(session), run_of(session)
    ids: dict[int, str] = {}
    for seq in (6, 4, 2):
        ids[seq] = accepted(raw.step(run, seq))
    for seq in (7, 5, 3):
        ids[seq] = accepted(raw.pass_of(run, seq, data, forward_only=seq == 7))
    raw.answer(creating)
    assert [raw.retrieve(each).json()["type"] for each in ids.values()] == ["try_again"] * 6
    ids[1] = accepted(raw.pass_of(run, 1, data))
    losses, after = alone[nano.NAME]
    assert [raw.loss(ids[seq]) for seq in (1, 3, 5)] == losses
    assert close([each["logprobs"].to_numpy() for each in raw.output(ids[7]).loss_fn_outputs], after, 0)


def test_a_request_that_is_sent_again_is_made_once(server: Server, raw: Raw, data: list[tinker.Datum]) -> None:
    """Also with another body, before it is made, while it is, and when it is finished."""
    session = raw.session()
    creating = raw.create(session)
    assert raw.create(session) == creating
    run = raw.answer(creating)["model_id"]
    assert raw.create(session, seed=8) == creating
    late = accepted(raw.pass_of(run, 2, data[1:]))
    assert accepted(raw.pass_of(run, 2, data[1:])) == late
    first = accepted(raw.pass_of(run, 1, data[:1]))
    assert accepted(raw.pass_of(run, 1, data[:1])) == first
    assert accepted(raw.step(run, 1)) == first
    raw.answer(late)
    assert accepted(raw.pass_of(run, 1, data)) == first
    norm = raw.answer(accepted(raw.step(run, 3)))["metrics"]["grad_norm:mean"]
    plain = raw.run(session, 1)
    accepted(raw.pass_of(plain, 1, data[:1]))
    accepted(raw.pass_of(plain, 2, data[1:]))
    assert raw.answer(accepted(raw.step(plain, 3)))["metrics"]["grad_norm:mean"] == norm


def test_numbers_begin_at_one(raw: Raw, data: list[tinker.Datum]) -> None:
    run = raw.run(raw.session())
    assert re.search("at least 1, got 0|from 1 to", refused(raw.pass_of(run, 0, data), 400))
    refused(raw.step(run, 0), 400, "it must be from 1 to")
    raw.answer(accepted(raw.pass_of(run, 1, data)))


def test_a_batch_that_the_sdk_splits_is_one(
    server: Server, alone: Alone, data: list[tinker.Datum], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sends the first part last."""
    losses, after = alone[nano.NAME]
    monkeypatch.setitem(routes.FEATURES, "fwdbwd_max_chunk_len", 2)
    with connected(server.address) as client:
        run = client.create_lora_training_client(nano.NAME, rank=4, seed=7).result(PATIENCE)
        assert [step(run, data, ADAM) for _ in range(3)] == pytest.approx(losses, rel=1e-4)
        assert close(log_probs(run, data), after, 1e-2)
        assert server.state.runs[run.model_id].next_seq == 1 + 3 * (4 + 1) + 4
        custom = run.forward_backward_custom(data, lambda _, given: (torch.cat(given).square().sum(), {}))
        everywhere = np.concatenate(log_probs(run, data))
        assert custom.result(PATIENCE).metrics["loss:sum"] == pytest.approx((everywhere**2).sum(), rel=1e-4)


def test_bodies_may_be_compressed(
    server: Server, alone: Alone, raw: Raw, data: list[tinker.Datum], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, _ = alone[nano.NAME]
    monkeypatch.setitem(routes.FEATURES, "proto_compress_fwdbwd", True)
    assert in_order(server, data)[0] == losses
    run = raw.run(raw.session())
    packed = zstandard.compress(body_of(run, 1, data))
    assert raw.loss(accepted(raw.forward(packed, **{"content-encoding": "zstd"}))) == losses[0]


def test_runs_on_two_models_side_by_side_are_each_as_alone(
    server: Server, alone: Alone, data: list[tinker.Datum]
) -> None:
    assert alone[nano.NAME][0] != pytest.approx(alone[OTHER][0], rel=0.05)
    with connected(server.address) as one, connected(server.address) as other:
        made = [
            client.create_lora_training_client(name, rank=4, seed=7)
            for client in (one, other)
            for name in (nano.NAME, OTHER)
        ]
        started = [each.result(PATIENCE) for each in made]
        futures: dict[str, list[Any]] = {run.model_id: [] for run in started}
        for _ in range(3):
            for run in started:
                futures[run.model_id].append(run.forward_backward(data, "cross_entropy"))
                run.optim_step(ADAM)
        for run in started:
            losses, after = alone[run.get_info().model_data.model_name]
            assert [each.result(PATIENCE).metrics["loss:sum"] for each in futures[run.model_id]] == losses
            assert close(log_probs(run, data), after, 0)


def test_an_answer_may_be_fetched_again_and_by_another_connection(
    server: Server, alone: Alone, raw: Raw, data: list[tinker.Datum]
) -> None:
    free = threading.Event()
    with talking(server.address) as gone:
        run = gone.run(gone.session())
        blocked = server.state.registry.submit(free.wait, 30)
        request_id = accepted(gone.pass_of(run, 1, data))
        with pytest.raises(httpx.ReadTimeout):  # it hangs up while the server holds its question
            gone.http.post("/api/v1/retrieve_future", json={"request_id": request_id}, timeout=0.2)
    free.set()
    assert blocked.result(PATIENCE)
    first = raw.answer(request_id)
    assert raw.answer(request_id) == first
    assert raw.loss(request_id) == alone[nano.NAME][0][0]
    refused(raw.retrieve("0" * 32), 410, "is unknown")
    answer = raw.retrieve("0" * 32, **{"X-Tinker-Request-Type": "ForwardBackward"})
    refused(answer, 200, "is unknown")  # the SDK shows its user no other status's text


def test_too_many_requests_wait_outside_but_the_next_of_a_run_that_stands_still(
    raw: Raw, data: list[tinker.Datum], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "WAITING", 2)
    run = raw.run(raw.session())
    ids = {seq: accepted(raw.pass_of(run, seq, data[:1])) for seq in (3, 4)}
    response = raw.pass_of(run, 5, data[:1])
    refused(response, 429, "2 requests of run")
    assert int(response.headers["retry-after"]) >= 1
    assert accepted(raw.pass_of(run, 4, data[:1])) == ids[4]  # it waits already
    losses = [raw.loss(accepted(raw.pass_of(run, seq, data[:1]))) for seq in (1, 2)]
    losses += [raw.loss(ids[seq]) for seq in (3, 4)]
    assert losses == [losses[0]] * 4
    assert raw.loss(accepted(raw.pass_of(run, 5, data[:1]))) == losses[0]


def test_a_client_that_sends_in_order_waits_too(
    server: Server, raw: Raw, data: list[tinker.Datum], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is not finished counts, in number and in bytes, and its bytes are given back with the answers."""
    monkeypatch.setattr(runs, "WAITING", 3)
    run, going, memory = raw.run(raw.session()), threading.Event(), server.state.memory
    until(lambda: not memory.taken["answers"])
    before = memory.taken
    server.state.registry.submit(going.wait, PATIENCE)
    ids = [accepted(raw.pass_of(run, seq, data[:1])) for seq in (1, 2, 3)]
    one = (memory.taken["queues"] - before["queues"]) // 3
    assert one > len(body_of(run, 1, data[:1]))
    refused(raw.pass_of(run, 4, data[:1]), 429, "3 requests of run")
    monkeypatch.setattr(runs, "WAITING", 512)
    with monkeypatch.context() as patch:
        patch.setattr(memory, "limit", int((sum(before.values()) + 3.5 * one) * 8 / 7))
        patch.setattr(server_memory, "SMALL", 0)
        refused(raw.pass_of(run, 4, data[:1]), 429, "no memory for")
    going.set()
    for request_id in ids:
        raw.output(request_id)
    until(lambda: memory.taken == before)


def test_the_sdk_waits_where_too_many_samples_do(server: Server, raw: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
    with connected(server.address) as client, monkeypatch.context() as patch:
        sampler = client.create_sampling_client(base_model=nano.NAME).result(PATIENCE)
        patch.setattr(sampling, "WAITING", 0)
        refused(raw.post("asample", **sample_of(PROMPT, max_tokens=2)), 429, "0 sampling requests are waiting")
        future = sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=2))
        with pytest.raises(TimeoutError):
            future.result(0.3)
        patch.undo()
        assert len(future.result(PATIENCE).sequences[0].tokens) == 2


def fetches(raw: Raw) -> int:
    """How many requests for answers have been answered."""
    found = re.search(r'path="/api/v1/retrieve_future",status="200"} (\d+)', raw.http.get("/metrics").text)
    return int(found[1]) if found else 0


def test_sampling_that_nobody_waits_for_is_given_up(server: Server, raw: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = server.state.registry.scheduler
    long: dict[str, Any] = {"max_tokens": 4000, "temperature": 1.0, "seed": 1, "stop": []}
    request_id = raw.submit("asample", **sample_of(PROMPT, **long))
    until(lambda: worker.active_sequences == 1)
    assert raw.post("cancel_future", request_id=request_id).status_code == 204
    assert raw.answer(request_id) == {"error": "the request was cancelled", "category": "user"}
    until(lambda: worker.active_sequences == 0)
    assert raw.post("cancel_future", request_id=request_id).status_code == 204  # too late, and no harm
    assert raw.post("cancel_future", request_id="nobody's").status_code == 204
    waits, wait = list[float](), server.state.futures.wait

    def noted(request_id: str, seconds: float, owner: Owner) -> Any:
        waits.append(seconds)
        return wait(request_id, seconds, owner)

    monkeypatch.setattr(server.state.futures, "wait", noted)
    with connected(server.address) as client:
        sampler = client.create_sampling_client(base_model=nano.NAME).result(PATIENCE)
        with monkeypatch.context() as patch:
            patch.setattr(routes, "PATIENCE", 0.1)
            before, future = fetches(raw), sampler.sample(PROMPT, 1, types.SamplingParams(**long))
            until(lambda: fetches(raw) > before)  # told to try again, so the SDK knows what it waits for
        # Python 3.11's asyncio may lose a cancellation that comes as an answer does: now the next one is far off.
        until(lambda: waits[-1] == routes.PATIENCE)
        assert worker.active_sequences == 1
        future.future().cancel()
        until(lambda: worker.active_sequences == 0)
    assert not server.state.samplings


# Refusals


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
    refused(raw.post("optim_step", model_id="x", seq_id=1, no_such_field=1), 422, "optim_params")


def test_a_run_is_made_once(server: Server, raw: Raw) -> None:
    session = raw.session()
    raw.run(session)
    futures = server.state.futures
    until(lambda: futures.id_of(f"{session}:train:0/0", EVERYBODY) not in futures._kept)  # until it is written
    server.state.store.prune(0, -1e12, -1e12, 0)  # as after a day: the answer is not known any more
    refused(raw.creating(session), 400, "was made before")


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
