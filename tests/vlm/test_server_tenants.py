"""Two keys on one server: what was made with one is not there for the other, at every endpoint the server has."""

import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker
from fastapi.routing import iter_route_contexts

import vlm
from tests.vlm.raw import DATA, FORWARD, PROMPT, Raw, accepted, body_of, refused, run_of, sample_of
from tests.vlm.services import PATIENCE, rest_of
from tests.vlm.serving import KEY, Server, served
from vlm import nano
from vlm.server import page
from vlm.server.guard import Keys, Requests
from vlm.server.owners import owner_of
from vlm.server.tables import Checkpoint, Run, Sampler, Session

OTHER = "tml-a-key-of-another"
NOBODY = "00000000-0000-4000-8000-000000000000"
ADAM = {"learning_rate": 1e-3}


@dataclass(frozen=True)
class Ids:
    """What can be asked for. own: a session of the one who asks."""

    session: str
    request: str
    own: str

    @property
    def run(self) -> str:
        return run_of(self.session)

    @property
    def sampler(self) -> str:
        return f"{self.session}:sample:0"

    @property
    def path(self) -> str:
        return f"tinker://{self.run}/sampler_weights/x"


def keys_of(folder: Path, *, shared: bool = False) -> Keys:
    (folder / "keys").write_text(f"{KEY}\n{OTHER}\n")
    return Keys.read(folder / "keys", shared=shared)


CLIENTS: list[httpx.Client] = []


@pytest.fixture(scope="module", autouse=True)
def _closed() -> Iterator[None]:
    """Connections end with these tests."""
    yield
    while CLIENTS:
        CLIENTS.pop().close()


def asking(server: Server, key: str) -> Raw:
    CLIENTS.append(httpx.Client(base_url=server.address, headers={"X-API-Key": key}, timeout=60))
    return Raw(CLIENTS[-1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("tenants")
    with served(folder / "state", keys=keys_of(folder)) as running:
        yield running


@pytest.fixture(scope="module")
def mine(server: Server) -> Raw:
    return asking(server, KEY)


@pytest.fixture(scope="module")
def other(server: Server) -> Raw:
    return asking(server, OTHER)


@pytest.fixture(scope="module")
def ids(mine: Raw, other: Raw) -> Ids:
    """Of mine, as the other would like to use them."""
    session = mine.session()
    run, request = mine.run(session), accepted(mine.pass_of(run_of(session), 1))
    mine.answer(accepted(mine.step(run, 2)))
    mine.result("save_weights_for_sampler", model_id=run, seq_id=3, path="x")
    mine.post("create_sampling_session", session_id=session, sampling_session_seq_id=0, base_model=nano.NAME)
    return Ids(session, request, other.session())


V1 = "/api/v1/"
AT = f"{V1}training_runs/{{run}}/checkpoints/{{kind}}/{{name}}"
MODEL = {"base_model": nano.NAME, "lora_config": {"rank": 4}}
HELLO = [{"role": "user", "content": "hello"}]
SAMPLE = sample_of(PROMPT, max_tokens=1) | {"base_model": None}
Body = Callable[[Ids], dict[str, Any]]

# Of each endpoint that takes an id: bodies in which one is. A path that takes one needs no more.
POSTED: dict[str, list[Body]] = {
    f"{V1}session_heartbeat": [lambda i: {"session_id": i.session}],
    f"{V1}create_model": [lambda i, n=n: {"session_id": i.session, "model_seq_id": n, **MODEL} for n in (0, 7)],
    f"{V1}get_info": [lambda i: {"model_id": i.run}],
    f"{V1}optim_step": [lambda i, n=n: {"model_id": i.run, "seq_id": n, "optim_params": ADAM} for n in (1, 2, 4, 9)],
    f"{V1}save_weights": [lambda i: {"model_id": i.run, "seq_id": 4, "path": "y"}],
    f"{V1}save_weights_for_sampler": [
        lambda i: {"model_id": i.run, "seq_id": 4, "path": "x"},
        lambda i: {"model_id": i.run, "seq_id": 4, "sampling_session_seq_id": 4},
    ],
    f"{V1}save_weights_external": [lambda i: {"model_id": i.run, "seq_id": 4, "path": "z"}],
    f"{V1}load_weights": [
        lambda i: {"model_id": i.run, "seq_id": 4, "path": i.path, "optimizer": False},
        lambda i: {"session_id": i.own, "model_seq_id": 3, "path": i.path, "optimizer": False},
    ],
    f"{V1}create_sampling_session": [
        lambda i: {"session_id": i.session, "sampling_session_seq_id": 0, "base_model": nano.NAME},
        lambda i: {"session_id": i.own, "sampling_session_seq_id": 3, "model_path": i.path},
    ],
    f"{V1}join_sampling_session": [lambda i: {"sampling_session_id": i.sampler}],
    f"{V1}asample": [
        lambda i: {**SAMPLE, "sampling_session_id": i.sampler, "seq_id": 0},
        lambda i: {**SAMPLE, "model_path": i.path},
    ],
    f"{V1}retrieve_future": [lambda i: {"request_id": i.request}],
    f"{V1}weights_info": [lambda i: {"tinker_path": i.path}],
    f"{V1}sessions/{{session_id}}/finish": [lambda _: {"reason": {}}],
    **{
        f"{prefix}/{name}": [lambda i, more=more: {"model": i.path, **more}]
        for prefix in ("/v1", "/oai/api/v1")
        for name, more in (
            ("completions", {"prompt": "a"}),
            ("chat/completions", {"messages": HELLO}),
            ("responses", {"input": "a"}),
        )
    },
}
PUT = {f"{AT}/ttl": {"ttl_seconds": 60}}
LISTS = {f"{V1}sessions", f"{V1}training_runs", f"{V1}checkpoints", f"{V1}overview"}
ANYBODYS = {  # what is the same for all, and what is new
    *(f"{V1}{name}" for name in ("healthz", "get_server_capabilities", "client/config", "client/dynamic_config")),
    *(f"{V1}telemetry", f"{V1}create_session", "/v1/models", "/oai/api/v1/models", "/openapi.json", *page.FILES),
}
BY_THEMSELVES = {f"{V1}cancel_future", "/metrics"}  # see the tests below


def routes_of(server: Server) -> list[Any]:
    """All that the server answers, but what is the same for all."""
    return [route for route in iter_route_contexts(server.app.app.routes) if route.path not in ANYBODYS]


def probe(raw: Raw, method: str, path: str, ids: Ids) -> list[httpx.Response]:
    """What an endpoint answers to all that can be asked of it with these ids."""
    named = {"run": ids.run, "kind": "sampler_weights", "name": "x", "path": "adapter_config.json"}
    named |= {"session": ids.session, "session_id": ids.session, "sampler": ids.sampler, "model:path": ids.path}
    address = re.sub(r"\{(.*?)\}", lambda found: named[found[1]], path)
    if path == FORWARD:
        return [raw.forward(body_of(ids.run, seq)) for seq in (1, 4, 9)]
    if method == "POST" and path != f"{AT}/publish":
        return [raw.http.post(address, json=body(ids)) for body in POSTED[path]]
    return [raw.http.request(method, address, json=PUT.get(path))]


def test_all_that_takes_an_id_answers_as_if_there_were_none(server: Server, mine: Raw, other: Raw, ids: Ids) -> None:
    """With an id of another as with one that nobody has: there is nothing to be learnt from trying."""
    before = mine.get("overview").json()["runs"]
    unknown = Ids(NOBODY, "0" * 32, ids.own)
    routes = [route for route in routes_of(server) if route.path not in LISTS | BY_THEMSELVES]
    asked = [(method, route.path) for route in routes for method in sorted(route.methods - {"HEAD"})]
    assert len(asked) > 30
    for method, path in asked:
        for taken, none in zip(probe(other, method, path, ids), probe(other, method, path, unknown), strict=True):
            assert taken.status_code in (404, 410), (method, path, taken.text)
            theirs = taken.text.replace(ids.session, NOBODY).replace(ids.request, unknown.request)
            assert (taken.status_code, theirs) == (none.status_code, none.text), (method, path)
    assert mine.get("overview").json()["runs"] == before
    mine.answer(accepted(mine.step(ids.run, 4)))  # its numbers are where they were


def test_every_endpoint_knows_whose_a_request_is(server: Server) -> None:
    for route in routes_of(server):
        assert owner_of in [each.call for each in route.dependant.dependencies], route.path


def test_lists_hold_ones_own_alone(mine: Raw, other: Raw, ids: Ids) -> None:
    for path in LISTS:
        assert ids.session in mine.http.get(path).text
        theirs = other.http.get(path)
        assert theirs.status_code == 200
        assert ids.session not in theirs.text
        if "cursor" in theirs.json():
            assert theirs.json()["cursor"]["total_count"] == 0


def test_metrics_count_ones_own_alone(mine: Raw, other: Raw, ids: Ids) -> None:
    counted = {raw: dict(re.findall(r"^(\S+) (\S+)$", raw.http.get("/metrics").text, re.M)) for raw in (mine, other)}
    for name in ("live_runs", "examples_total", "optimizer_steps_total"):
        assert float(counted[mine][f"kshot_{name}"]) > 0
        assert counted[other][f"kshot_{name}"] == "0"
    made = f'kshot_requests_total{{path="{V1}create_model",status="200"}}'
    assert made in counted[mine]
    assert made not in counted[other]


def test_wrong_keys_leave_nothing_behind(server: Server) -> None:
    """At the paths that need no key; what is counted of them is nobody's."""
    (counts,) = (each.kwargs["counts"] for each in server.app.app.user_middleware if each.cls is Requests)
    for number in range(20):
        with httpx.Client(base_url=server.address, headers={"X-API-Key": f"tml-no-such-key-{number:04d}"}) as http:
            assert http.get("/api/v1/healthz").status_code == 200
            assert http.get("/api/v1/sessions").status_code == 401
    assert {owner for owner, _, _ in counts} <= {"", *(name for name in server.app.keys.owners if name)}


def test_a_number_of_a_sampler_of_everybody_is_used_once(server: Server, mine: Raw, other: Raw, ids: Ids) -> None:
    name = f"{ids.session}:sample:77"
    server.state.store.add(Sampler(name, ids.session, nano.NAME))
    ask = {**sample_of(PROMPT, max_tokens=1), "base_model": None, "sampling_session_id": name, "seq_id": 5}
    request_id = accepted(mine.post("asample", **ask))
    refused(other.post("asample", **ask), 400, "made with another API key; take the next number")
    assert accepted(mine.post("asample", **ask)) == request_id
    accepted(other.post("asample", **{**ask, "seq_id": 6}))


def test_what_another_sends_is_not_in_a_runs_order(mine: Raw, other: Raw, ids: Ids) -> None:
    """Nor a body that is no request, which takes its number in a run of one's own."""
    session = mine.session()
    run = mine.run(session)
    wrong = {"model_id": run, "seq_id": 1, "optim_params": "wrong"}
    answers = [other.post("optim_step", **wrong | {"model_id": each}) for each in (run, run_of(NOBODY))]
    assert [refused(each, 422) for each in answers] == [refused(answers[0], 422)] * 2
    mine.output(accepted(mine.pass_of(run, 1)))
    assert "error" in mine.answer(accepted(mine.post("optim_step", **wrong | {"seq_id": 2})))


def test_nobody_else_cancels(server: Server, mine: Raw, other: Raw, ids: Ids) -> None:
    go_on = threading.Event()
    server.state.registry.scheduler.submit(go_on.wait, PATIENCE)
    own, kept = (mine.submit("asample", **sample_of(PROMPT, max_tokens=1)) for _ in range(2))
    assert other.post("cancel_future", request_id=kept).status_code == 204
    assert mine.post("cancel_future", request_id=own).status_code == 204
    go_on.set()
    assert "was cancelled" in mine.answer(own)["error"]
    assert mine.sampled(kept).sequences


def test_the_sdk_with_two_keys(server: Server) -> None:
    """A whole life of a run, seen by another; and what is published is read by both and changed by one."""
    service, stranger = (vlm.connect(server.address, api_key=key) for key in (KEY, OTHER))
    run = service.create_lora_training_client(nano.NAME, rank=2, seed=0).result(PATIENCE)
    run.forward_backward(DATA, "cross_entropy").result(PATIENCE)
    path = run.save_state("a").result(PATIENCE).path
    weights = run.save_weights_for_sampler("a").result(PATIENCE).path
    outside = run.save_weights_external("a").result(PATIENCE).path
    rest, theirs = rest_of(server.address), tinker.RestClient(base_url=server.address, api_key=OTHER)

    def reads() -> list[Callable[[], Any]]:
        return [
            lambda: stranger.create_training_client_from_state(path),
            lambda: stranger.create_sampling_client(model_path=weights),
            lambda: theirs.get_weights_info_by_tinker_path(weights),
            lambda: theirs.get_external_weights_urls(outside),
        ]

    def changes() -> list[Callable[[], Any]]:
        return [
            lambda: theirs.delete_checkpoint_from_tinker_path(weights),
            lambda: theirs.set_checkpoint_ttl_from_tinker_path(weights, 60),
            lambda: theirs.unpublish_checkpoint_from_tinker_path(weights),
        ]

    for each in (*reads(), *changes(), lambda: theirs.get_training_run(run.model_id)):
        with pytest.raises(tinker.NotFoundError, match=r"does not exist|there is no"):
            each().result(PATIENCE)
    for each in (path, weights, outside):
        rest.publish_checkpoint_from_tinker_path(each).result(PATIENCE)
    trained, sampler, info, _ = (each().result(PATIENCE) for each in reads())
    assert info.lora_rank == 2
    trained.forward_backward(DATA, "cross_entropy").result(PATIENCE)
    assert sampler.sample(PROMPT, 1, tinker.SamplingParams(max_tokens=1)).result(PATIENCE).sequences
    for each in changes():
        with pytest.raises(tinker.PermissionDeniedError, match="only that changes it"):
            each().result(PATIENCE)
    with pytest.raises(tinker.NotFoundError):
        theirs.get_training_run(run.model_id).result(PATIENCE)
    rest.unpublish_checkpoint_from_tinker_path(weights).result(PATIENCE)
    with pytest.raises(tinker.NotFoundError):
        theirs.get_weights_info_by_tinker_path(weights).result(PATIENCE)
    assert theirs.list_user_checkpoints().result(PATIENCE).checkpoints == []
    for client in (service, stranger):
        client.close("success").result(PATIENCE)


def test_a_team_shares_and_later_does_not(tmp_path: Path) -> None:
    """What was made before there was a key file stays everybody's."""
    with served(tmp_path / "state") as server:
        asking(server, KEY).session()
    with served(tmp_path / "state", keys=keys_of(tmp_path, shared=True)) as server:
        mine, other = asking(server, KEY), asking(server, OTHER)
        session = mine.session()
        run = mine.run(session)
        assert other.get("training_runs").json()["training_runs"][0]["training_run_id"] == run
        path = other.result("save_weights", model_id=run, seq_id=1, path="ours")["path"]
        assert len(other.get("sessions").json()["sessions"]) == 2
    with served(tmp_path / "state", keys=keys_of(tmp_path)) as server:
        mine, other = asking(server, KEY), asking(server, OTHER)
        assert [len(each.get("sessions").json()["sessions"]) for each in (mine, other)] == [2, 1]
        refused(other.get(f"training_runs/{run}"), 404)
        assert [len(each.get("checkpoints").json()["checkpoints"]) for each in (mine, other)] == [0, 1]
        names = [server.state.store.get(*each).owner for each in ((Session, session), (Run, run), (Checkpoint, path))]
        assert len(set(names)) == 2
        assert None not in names
