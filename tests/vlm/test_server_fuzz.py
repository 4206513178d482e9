"""Generated requests, a thousand or more: from the server's own description, and broken protobuf. None is its failure.

Conformance is schemathesis' (https://schemathesis.readthedocs.io): statuses, content types and bodies of answers are
those that the description declares, and what contradicts it is refused. Ids that exist are written into the description
that is generated from, so that requests get past the look-up.
"""

import json
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks
from tinker.proto import tinker_public_pb2 as pb

from tests.vlm.raw import FORWARD, Raw, body_of, files, refused, talking, until
from tests.vlm.serving import HEADERS, Server, served
from vlm import nano
from vlm.inputs import ImageRule, datum, image_chunk, model_input
from vlm.server.openai.requests import ChatRequest, CompletionRequest
from vlm.server.tinker import routes

SOON = 10_000  # numbers of requests that are not that far ahead of their turn
LEAST = 400  # requests of the small run
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]


def repeatable(examples: int) -> Any:
    """Of any length, the same every time, and as they are generated: nothing is shrunk or kept."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@dataclass
class Fuzzed:
    """A server, what is there, and what was asked of it. run: for protobuf."""

    server: Server
    raw: Raw
    known: dict[str, list[Any]]
    run: str
    statuses: Counter[int] = field(default_factory=Counter)
    accepted: list[str] = field(default_factory=list)

    def note(self, status: int, body: dict[str, Any]) -> None:
        self.statuses[status] += 1
        if status == 200 and "request_id" in body and body.get("type") != "try_again":
            self.accepted.append(body["request_id"])


@contextmanager
def fuzzed(home: Path, examples: int) -> Iterator[Fuzzed]:
    """A server with sessions, runs, checkpoints and samplers. It ends with all its threads, and nothing is outside."""
    (home / "others").mkdir(parents=True)
    (home / "others" / "kshot.json").write_text("{}")
    outside, threads = files(home, but=home / "state"), set(threading.enumerate())
    with served(home / "state") as server, talking(server.address) as raw:
        server.app.rate_limit.rate = math.inf  # most of what is generated is refused
        made = Fuzzed(server, raw, *_known(raw, examples))
        yield made
        for request_id in made.accepted:
            assert raw.post("cancel_future", request_id=request_id).status_code == 204
    assert files(home, but=home / "state") == outside
    assert set(threading.enumerate()) == threads


def _known(raw: Raw, examples: int) -> tuple[dict[str, list[Any]], str]:
    session, finished = raw.session(), raw.session()
    run, other = raw.run(session), raw.run(session, 1)
    saved = raw.result("save_weights", model_id=run, path="a", seq_id=1)["path"]
    sampled = raw.result("save_weights_for_sampler", model_id=run, path="b", seq_id=2)["path"]
    body = {"session_id": session, "sampling_session_seq_id": 1, "base_model": nano.NAME}
    sampler = raw.post("create_sampling_session", **body).json()["sampling_session_id"]
    done = raw.create(finished, 1)
    raw.post(f"sessions/{finished}/finish", reason={})
    places = [saved, sampled, "tinker://../weights/a", f"tinker://{run}/weights/.."]
    known = {
        "session_id": [session],
        "finished": [finished],
        "session": [session, finished],
        "model_id": [run],
        "run": [run, f"{finished}:train:1", "../x"],
        "sampling_session_id": [sampler],
        "sampler": [sampler, "x"],
        "request_id": [done, "x"],
        "kind": ["weights", "sampler_weights", "external_weights", ".."],
        "name": ["a", "b", ".."],
        "model": [nano.NAME, sampled, "../x"],
        "path": ["c", "d", "e", "../x"],
        "model_path": [None, *places],
        "tinker_path": places,
        "Load.path": places,
        "Save.kind": ["snapshot"],
        "seq_id": [*range(3, 3 + 2 * examples), 0],  # so that most of a run's requests have one that is free
        **OFFERED,
    }
    return known, other


TEXT = {"type": "encoded_text", "tokens": [5, 6]}
ONE = {"role": "user", "content": "a"}
BY_SCHEMA = {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
OFFERED: dict[str, list[Any]] = {
    "base_model": [nano.NAME],
    "lora_config": [{"rank": 1}, {"rank": 2, "seed": 1}, {"rank": 3}, {"rank": 0}],
    "model_seq_id": [2, 3, 4, -1, 10**9],
    "sampling_session_seq_id": [1, 2, 3, -1],
    "optim_params": [{"learning_rate": 1e-4}, {}, {"learning_rate": -1}, {"beta1": 1}, {"eps": 0}],
    "num_samples": [1, 2, 3],
    "n": [1, 2, 3],
    "max_tokens": [1, 2, 3],
    "chunks": [[TEXT], [TEXT, TEXT], [], [{**TEXT, "tokens": [-1]}], [{**TEXT, "tokens": [2**31]}]],
    "temperature": [1, 0.5, 0],
    "top_p": [1, 0.5, 0.9],
    "top_k": [-1, 1, 2],
    "topk_prompt_logprobs": [0, 1, 2, 3, 10**9],
    "topk_sample_logprobs": [0, 1, 2],
    "target_prompt_logprobs": [None],
    "prompt_alt_tokens_k": [0, 1, 2],
    "prompt_logprobs_last_n": [None, 1, 2],
    "record_stability_info": [None],
    "seed": [None, 1, 2],
    "stop": [["a"], ["b"]],
    "stop_token_ids": [[], [7]],
    "ttl_seconds": [None, 9, 2**62],
    "weights_access_token": [None],
    "age_encryption_recipients": [None, ["age1"], []],
    "user_metadata": [None, {"a": "\0"}],
    "messages": [[ONE], [ONE, ONE], [ONE, {**ONE, "role": "system"}]],
    "input": ["a", [ONE], [ONE, {**ONE, "role": "developer"}], [{"type": "x"}]],
    "tools": [[], [TOOL], [TOOL, TOOL], [{"type": "function", "name": "f"}], [{"type": "x"}]],
    "tool_choice": ["auto", "none", "required"],
    "response_format": [None, {"type": "json_object"}, BY_SCHEMA],
    "max_output_tokens": [1, 2, 0],
    "prompt": ["a", [5, 6], ["a", "b"], ""],
    "structured_outputs": [None],
    "guided_choice": [None],
    "stream_options": [None],
    "top_logprobs": [None],
    "echo": [False, True],
}


def with_known(description: dict[str, Any], known: dict[str, list[Any]]) -> dict[str, Any]:
    """A description that asks for what there is, or nearly: what nobody could mean is soon refused, and how many
    thousand tokens the nano model writes is not what is tested. "Load.path" is the path in schemas named Load..."""
    copy = json.loads(json.dumps(description))
    for title, schema in copy["components"]["schemas"].items():
        schema.get("properties", {}).pop("optimizer_config", None)
        special = {
            k.partition(".")[2]: v for k, v in known.items() if "." in k and title.startswith(k.partition(".")[0])
        }
        offered = known | special
        for name in offered.keys() & schema.get("properties", {}).keys():
            if "$ref" not in schema["properties"][name] or name in ("optim_params", "lora_config"):
                schema["properties"][name] = {"enum": offered[name]}
                schema["required"] = sorted({*schema.get("required", []), name})
    for path, operations in copy["paths"].items():
        for operation in operations.values():
            for parameter in operation.get("parameters", []):
                if parameter["in"] == "path":
                    name = "finished" if path.endswith("/finish") else parameter["name"]
                    parameter["schema"] = {"anyOf": [{"enum": known[name]}, parameter["schema"]]}
    return copy


def ask_by_description(fuzzed: Fuzzed, examples: int) -> Counter[str]:
    """So many requests to each endpoint that fit its description and so many that do not; how many each had."""
    counts = Counter[str]()
    described = fuzzed.raw.http.get("/openapi.json").json()
    with requests.Session() as session:
        session.headers.update(HEADERS)

        def ask(case: schemathesis.Case) -> None:
            response = case.call(base_url=fuzzed.server.address, session=session, timeout=60)
            is_json = response.content and response.headers["content-type"] == ["application/json"]
            answer = response.json() if is_json else {}
            # the protocol's refusals of a request id that nobody knows: 410, or an error with the status 200
            unknown = response.status_code in (200, 410) and "error" in answer
            lost = unknown and case.operation.path.endswith("/retrieve_future")
            checked = [each for each in CHECKS if not (lost and each is checks.negative_data_rejection)]
            case.validate_response(response, checks=checked)
            assert response.status_code < 400 or answer.keys() == {"error", "category"}
            fuzzed.note(response.status_code, answer)
            counts[case.operation.label] += 1

        for description, mode in (
            (described, GenerationMode.NEGATIVE),
            (with_known(described, fuzzed.known), GenerationMode.POSITIVE),
        ):
            operations = [each.ok() for each in schemathesis.openapi.from_dict(description).get_all_operations()]
            for operation in sorted(operations, key=lambda op: op.method.upper() == "DELETE" or "/finish" in op.path):
                takes = operation.body or operation.path_parameters or operation.query
                if operation.path != FORWARD and (takes or mode is GenerationMode.POSITIVE):
                    case = operation.as_strategy(generation_mode=mode)
                    repeatable(examples if takes else 2)(given(case)(ask))()
    return counts


# Protobuf


def valid(run: str, picture: bytes) -> pb.ForwardBackwardRequest:
    """Text, and text before an image, as the SDK writes them."""
    image = image_chunk(picture, ImageRule.from_pretrained(nano.NAME))
    data = [datum(model_input([5, 6], *more), [7, 8]) for more in ((), (image,))]
    return pb.ForwardBackwardRequest.FromString(body_of(run, 1, data))


huge = st.sampled_from([0, 1, 2, 3, 2**31 - 1, 2**53, 2**62, 2**63 - 1, -1, -(2**63)])
edges = st.sampled_from([0.0, 1.0, -1.0, float("nan"), float("inf"), 1e-45, 3e38])
blobs = st.binary(max_size=40) | st.lists(huge, max_size=4).map(lambda each: np.array(each, "<i8").tobytes())
floats = st.lists(edges, min_size=3, max_size=3).map(lambda each: np.array(each, "<f4").tobytes())
tokens = st.lists(st.integers(-1, 300) | st.sampled_from([2**31 - 1, -(2**31)]), max_size=5).map(
    lambda each: np.array(each, "<i4").tobytes()
)
names = st.sampled_from(["target_tokens", "weights", "logprobs", "advantages", "sparse", "", "\0", "../x", "é" * 9])
losses = st.sampled_from(["cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo", "", "\0", "none"])


@st.composite
def wild(draw: st.DrawFn, fresh: Callable[[], pb.ForwardBackwardRequest], run: str) -> bytes:
    """A message with values that no client would send, in up to three places."""
    message = pb.ForwardBackwardRequest()
    message.CopyFrom(fresh())
    for change in draw(st.lists(st.sampled_from(CHANGES), max_size=2)):
        change(draw, message)
    strangers = ["", "\0", "../x", "x" * 999, run + "9", run.upper()]
    message.model_id = draw(st.sampled_from([run] * 3 * len(strangers) + strangers))
    return message.SerializeToString()


def _tensor(draw: st.DrawFn, message: pb.ForwardBackwardRequest) -> None:
    tensor = draw(st.sampled_from(list(message.data))).loss_fn_inputs[draw(names)]
    tensor.dtype = draw(st.integers(-1, 6))
    tensor.ClearField("shape")
    tensor.shape.extend(draw(st.lists(huge, max_size=3)))
    if draw(st.booleans()):
        tensor.dense = draw(blobs | floats)
    else:
        tensor.sparse_csr.values, tensor.sparse_csr.crow_indices = draw(blobs), draw(blobs)
        tensor.sparse_csr.col_indices = draw(blobs)


def _values(draw: st.DrawFn, message: pb.ForwardBackwardRequest) -> None:
    inputs = draw(st.sampled_from(list(message.data))).loss_fn_inputs
    inputs["weights"].dense = draw(floats)
    inputs["target_tokens"].dense = draw(blobs)


def _text(draw: st.DrawFn, message: pb.ForwardBackwardRequest) -> None:
    draw(st.sampled_from(list(message.data))).model_input.add().encoded_text.tokens = draw(tokens | blobs)


def _image(draw: st.DrawFn, message: pb.ForwardBackwardRequest) -> None:
    image = draw(st.sampled_from(list(message.data))).model_input.add().image
    image.data = draw(st.just(message.data[1].model_input[1].image.data) | st.binary(max_size=60))
    image.format = draw(st.sampled_from(["png", "jpeg", "gif", ""]))
    if draw(st.booleans()):
        image.expected_tokens = draw(st.sampled_from([-1, 0, 1, 4, 2**31 - 1]))


def _loss(draw: st.DrawFn, message: pb.ForwardBackwardRequest) -> None:
    message.loss_fn = draw(losses)
    message.forward_only = draw(st.booleans())
    for _ in range(draw(st.integers(0, 2))):
        message.loss_fn_config[draw(st.sampled_from(["beta", "clip_low_threshold", "epsilon", ""]))] = draw(edges)


def _seq(draw: st.DrawFn, message: pb.ForwardBackwardRequest) -> None:
    message.seq_id = draw(st.sampled_from([-(2**31), -1, 0, 1, 10**6, 2**31 - 1]))


CHANGES = (_tensor, _values, _text, _image, _loss, _seq)


@st.composite
def broken(draw: st.DrawFn, fresh: Callable[[], pb.ForwardBackwardRequest]) -> bytes:
    """Bytes with pieces taken out, put in, doubled or changed."""
    body = bytearray(fresh().SerializeToString())
    for _ in range(draw(st.integers(1, 6))):
        at, size = draw(st.integers(0, len(body))), draw(st.integers(0, 12))
        body[at : at + size] = draw(st.binary(max_size=12) | st.just(bytes(body[at : at + size] * 2)))
    return bytes(body)


def ask_in_protobuf(fuzzed: Fuzzed, examples: int, picture: bytes) -> int:
    """Three kinds of bodies, so many of each; how many were sent. What is wrong only once it is computed is computed:
    requests have the run's next number, unless that is what is wrong with them."""
    start = valid(fuzzed.run, picture)

    def send(body: bytes) -> None:
        response = fuzzed.raw.forward(body)
        fuzzed.note(response.status_code, response.json())
        if response.status_code != 200:
            refused(response)

    def fresh() -> pb.ForwardBackwardRequest:
        start.seq_id = next_number(fuzzed)
        return start

    for bodies in (st.binary(max_size=300), broken(fresh), wild(fresh, fuzzed.run)):
        repeatable(examples)(given(bodies)(send))()
    send(fresh().SerializeToString())
    step(fuzzed, fuzzed.run, next_number(fuzzed))
    return 3 * examples + 2


def step(fuzzed: Fuzzed, run: str, number: int) -> None:
    response = fuzzed.raw.step(run, number)
    fuzzed.note(response.status_code, response.json())


def next_number(fuzzed: Fuzzed) -> int:
    live = fuzzed.server.state.runs[fuzzed.run]
    return next(n for n in range(live.next_seq, 10**9) if n not in live.held)


# Both


def come_to_an_end(fuzzed: Fuzzed) -> int:
    """Steps for numbers that are missing, so that what was accepted is made, and the session's end for what is still
    ahead of its turn; how many requests that took."""
    sent, runs = 1, fuzzed.server.state.runs
    for run in list(runs.values()):
        soon = [number for number in run.held if number < SOON]
        for number in set(range(run.next_seq, max(soon, default=0))) - run.held.keys():
            step(fuzzed, run.id, number)
            sent += 1
    futures = fuzzed.server.state.futures
    until(lambda: len(futures.sizes) == sum(n >= SOON for run in runs.values() for n in run.held))
    response = fuzzed.raw.post(f"sessions/{fuzzed.known['session_id'][0]}/finish", reason={})
    fuzzed.note(response.status_code, {})
    until(lambda: not futures.sizes)
    return sent


def check_answers(fuzzed: Fuzzed) -> Counter[str]:
    """That no accepted request came to a failure of the server's; what they came to."""
    ends = Counter[str]()
    for request_id in fuzzed.accepted:
        response = fuzzed.raw.retrieve(request_id)
        if response.headers["content-type"] != "application/json":
            ends["protobuf"] += 1
            continue
        body = response.json()
        assert body.get("category") != "server", body
        ends["wrong" if "error" in body else body["type"]] += 1
    return ends


def fuzz(home: Path, picture: bytes, examples: int, caplog: pytest.LogCaptureFixture) -> Counter[str]:
    """All of it, and how many requests were sent."""
    with fuzzed(home, examples) as made:
        counts = Counter(protobuf=ask_in_protobuf(made, 8 * examples, picture))
        counts += ask_by_description(made, examples)
        counts["end"] = come_to_an_end(made)
        ends = check_answers(made)
    assert sum(made.statuses.values()) == counts.total()
    assert {200, 204, 400, 404, 410, 422} <= made.statuses.keys(), made.statuses
    assert max(made.statuses) < 500
    saved = sum(ends[kind] for kind in ("save_weights", "save_weights_for_sampler", "load_weights"))
    assert min(ends["wrong"], ends["protobuf"], ends["create_model"], ends["optim_step"], saved) > 0, ends
    assert ends["try_again"] == 0, ends
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []
    return counts


# other tests' clients, whose threads are still there, draw from it
IDLE_CLIENTS = pytest.mark.filterwarnings("ignore:Do not use the .random. module inside strategies")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for what never ends, or reads a thousand tokens."""
    monkeypatch.setattr(routes, "PATIENCE", 0.02)
    monkeypatch.setattr(ChatRequest, "default_limit", 2)
    monkeypatch.setattr(CompletionRequest, "default_limit", 2)


@IDLE_CLIENTS
def test_no_request_is_the_servers_failure(tmp_path: Path, make_image: Any, caplog: pytest.LogCaptureFixture) -> None:
    counts = fuzz(tmp_path, make_image(3, 32, 32), 6, caplog)
    assert len(counts) == 49  # every endpoint, one of them in protobuf, and the end
    assert counts.total() >= LEAST, counts


@pytest.mark.slow
def test_nor_of_fifty_times_as_many(tmp_path: Path, make_image: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert fuzz(tmp_path, make_image(3, 32, 32), 260, caplog).total() >= 50 * LEAST
