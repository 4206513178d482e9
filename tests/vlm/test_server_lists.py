"""What a server shows and keeps, asked with the SDK's RestClient: models, runs, checkpoints, sessions, samplers."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import tinker
from tinker import types

from kshot.checks import folder_of
from tests.vlm.raw import DATA, PROMPT, Raw, refused
from tests.vlm.services import PATIENCE, connected, rest_of, step
from tests.vlm.serving import MODEL_PATHS, Server, served
from vlm import nano
from vlm.local.registry import EngineRegistry
from vlm.server.tables import Checkpoint, Run, Session

NOBODY = "00000000-0000-4000-8000-000000000000"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    state = tmp_path_factory.mktemp("state")
    with served(state, EngineRegistry(state, model_paths={**MODEL_PATHS, "other/nano": nano.NAME})) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    with connected(server.address) as client:
        yield client


@pytest.fixture(scope="module")
def rest(server: Server) -> Any:
    return rest_of(server.address)


@pytest.fixture
def run(client: Any) -> Any:
    made = client.create_lora_training_client(nano.NAME, rank=3, seed=0, train_unembed=False, user_metadata={"a": "b"})
    return made.result(PATIENCE)


def paths(checkpoints: types.CheckpointsListResponse) -> list[str]:
    return [each.tinker_path for each in checkpoints.checkpoints]


def near(moment: datetime, seconds_from_now: float = 0.0) -> bool:
    """Whether a time is that one, give or take 10 seconds."""
    return abs((moment - datetime.now(UTC)).total_seconds() - seconds_from_now) < 10


def test_models_and_health(rest: Any, raw: Raw, run: Any) -> None:
    models = rest.get_server_capabilities().result(PATIENCE).supported_models
    assert [each.model_name for each in models] == [nano.NAME, "other/nano"]
    assert models[0].max_context_length == 4096  # of one that is loaded
    assert raw.get("healthz").json() == {"status": "ok"}


def test_a_run_and_what_was_saved_of_it(server: Server, rest: Any, run: Any) -> None:
    fresh = rest.get_training_run(run.model_id).result(PATIENCE)
    assert (fresh.training_run_id, fresh.base_model, fresh.is_lora) == (run.model_id, nano.NAME, True)
    assert (fresh.lora_rank, fresh.user_metadata, fresh.corrupted) == (3, {"a": "b"}, False)
    assert fresh.last_checkpoint is None
    assert fresh.last_sampler_checkpoint is None
    assert near(fresh.last_request_time)
    assert rest.list_checkpoints(run.model_id).result(PATIENCE).checkpoints == []

    step(run, DATA, types.AdamParams(learning_rate=1e-3))
    saved = [run.save_state(name, user_metadata={"step": name}).result(PATIENCE).path for name in ("1", "2")]
    sampled = run.save_weights_for_sampler("1").result(PATIENCE).path
    for path in (*saved, sampled):
        assert rest.get_training_run_by_tinker_path(path).result(PATIENCE).training_run_id == run.model_id
    after = rest.get_training_run(run.model_id).result(PATIENCE)
    assert after.last_checkpoint.tinker_path == saved[1]
    assert after.last_sampler_checkpoint.tinker_path == sampled

    rows = rest.list_checkpoints(run.model_id).result(PATIENCE).checkpoints
    assert [each.tinker_path for each in rows] == [sampled, saved[1], saved[0]]
    assert [each.checkpoint_type for each in rows] == ["sampler", "training", "training"]
    assert [each.checkpoint_id for each in rows] == ["sampler_weights/1", "weights/2", "weights/1"]
    assert [each.user_metadata for each in rows] == [{"a": "b"}, {"step": "2"}, {"step": "1"}]
    assert all(near(each.time) and not each.public for each in rows)
    folders = [folder_of(server.state.registry.state, each.tinker_path) for each in rows]
    assert [each.size_bytes for each in rows] == [sum(f.stat().st_size for f in folder.iterdir()) for folder in folders]
    info = rest.get_weights_info_by_tinker_path(sampled).result(PATIENCE)
    assert (info.base_model, info.is_lora, info.lora_rank) == (nano.NAME, True, 3)
    assert (info.train_unembed, info.train_mlp, info.train_attn) == (False, True, True)


def test_lists_come_in_pages_newest_first(rest: Any, client: Any, server: Server) -> None:
    made = [client.create_lora_training_client(nano.NAME, rank=1, seed=0).result(PATIENCE) for _ in range(3)]
    saved = [run.save_state("paged").result(PATIENCE).path for run in made]
    whole = rest.list_training_runs(limit=1000).result(PATIENCE)
    ids = [run.training_run_id for run in whole.training_runs]
    assert ids[:3] == [run.model_id for run in reversed(made)]
    assert whole.cursor.total_count == len(ids) == server.state.store.count(Run)
    parts = [rest.list_training_runs(limit=2, offset=n).result(PATIENCE) for n in range(0, len(ids), 2)]
    assert [run.training_run_id for part in parts for run in part.training_runs] == ids
    assert [part.cursor.offset for part in parts] == list(range(0, len(ids), 2))
    assert rest.list_training_runs(offset=len(ids)).result(PATIENCE).training_runs == []

    everything = rest.list_user_checkpoints(1000).result(PATIENCE)
    assert paths(everything)[:3] == saved[::-1]
    assert everything.cursor.total_count == len(everything.checkpoints)
    pages = [rest.list_user_checkpoints(2, n).result(PATIENCE) for n in range(0, len(everything.checkpoints), 2)]
    assert [path for page in pages for path in paths(page)] == paths(everything)


def test_lists_of_large_rows_have_small_pages_that_lose_nothing(raw: Raw, server: Server, run: Any, rest: Any) -> None:
    run.save_state("row").result(PATIENCE)
    (row,) = server.state.store.checkpoints(run.model_id)
    many = [f"{row.path}-{n:03d}" for n in range(180)]
    for n, path in enumerate(many):
        large = {"a": "x" * 65_000}
        more = replace(row, path=path, name=path.rpartition("/")[2], created=row.created + n, user_metadata=large)
        server.state.store.put_checkpoint(more)
    wanted = [*reversed(many), row.path]
    for name in (f"training_runs/{run.model_id}/checkpoints", "checkpoints"):
        found, total = list[str](), 1
        while len(found) < total:
            response = raw.get(f"{name}?limit=1000&offset={len(found)}")
            assert len(response.content) < 8 << 20  # of 12 MB
            page, cursor = response.json()["checkpoints"], response.json()["cursor"]
            assert cursor["offset"] == len(found)
            assert cursor["limit"] == len(page) or len(found) + len(page) == cursor["total_count"]
            found, total = [*found, *(each["tinker_path"] for each in page)], cursor["total_count"]
        assert [path for path in found if path.startswith(row.path)] == wanted
        assert len(set(found)) == total
    assert rest.list_checkpoints(run.model_id).result(PATIENCE).cursor.total_count == 181
    for path in many:
        server.state.store.remove(Checkpoint, path)


def test_what_is_deleted_is_gone(server: Server, rest: Any, client: Any, run: Any) -> None:
    kept, by_path, by_id = (run.save_state(name).result(PATIENCE).path for name in ("kept", "by-path", "by-id"))
    rest.delete_checkpoint_from_tinker_path(by_path).result(PATIENCE)
    rest.delete_checkpoint(run.model_id, "weights/by-id").result(PATIENCE)
    assert paths(rest.list_checkpoints(run.model_id).result(PATIENCE)) == [kept]
    for gone in (by_path, by_id):
        assert not folder_of(server.state.registry.state, gone).exists()
        with pytest.raises(tinker.NotFoundError, match="does not exist"):
            client.create_training_client_from_state(gone).result(PATIENCE)
        with pytest.raises(tinker.NotFoundError, match="does not exist"):
            rest.delete_checkpoint_from_tinker_path(gone).result(PATIENCE)
    assert run.save_state("by-path").result(PATIENCE).path == by_path  # the name is free again


def test_a_sampler_ends_with_its_checkpoint(rest: Any, client: Any, run: Any) -> None:
    path = run.save_weights_for_sampler("used").result(PATIENCE).path
    sampler = client.create_sampling_client(model_path=path).result(PATIENCE)
    params = types.SamplingParams(max_tokens=3, temperature=0.0, stop=[])
    sampler.sample(PROMPT, 1, params).result(PATIENCE)
    rest.delete_checkpoint_from_tinker_path(path).result(PATIENCE)
    with pytest.raises((tinker.APIStatusError, tinker.RequestFailedError), match="does not exist"):
        sampler.sample(PROMPT, 1, params).result(PATIENCE)


def test_time_to_live(server: Server, rest: Any, client: Any, run: Any) -> None:
    state, session = server.state, client.holder.get_session_id()
    state.store.update(Session, session, heartbeat=time.time() + 10**7)  # lest the run is put away meanwhile
    hour = run.save_state("hour", ttl_seconds=3600).result(PATIENCE).path
    for_ever, later = (run.save_state(name).result(PATIENCE).path for name in ("ever", "later"))
    rest.set_checkpoint_ttl_from_tinker_path(later, 7200).result(PATIENCE)

    def ends() -> dict[str, Any]:
        rows = rest.list_checkpoints(run.model_id).result(PATIENCE).checkpoints
        return {each.tinker_path: each.expires_at for each in rows}

    assert near(ends()[hour], 3600)
    assert near(ends()[later], 7200)
    assert ends()[for_ever] is None
    state.tidy(time.time() + 3500)
    assert set(ends()) == {hour, for_ever, later}
    state.tidy(time.time() + 3700)
    assert set(ends()) == {for_ever, later}
    assert not folder_of(state.registry.state, hour).exists()
    rest.set_checkpoint_ttl_from_tinker_path(later, None).result(PATIENCE)
    state.tidy(time.time() + 10**6)
    assert set(ends()) == {for_ever, later}
    state.store.update(Checkpoint, later, expires=time.time() - 1)  # over, and not taken off the disk yet
    with pytest.raises(tinker.NotFoundError, match="or not any more"):
        client.create_training_client_from_state(later).result(PATIENCE)
    assert run.save_state("later").result(PATIENCE).path == later
    assert set(ends()) == {for_ever, later}
    for wrong in (0, -5, 10**10):
        with pytest.raises(tinker.APIStatusError, match=f"ttl_seconds = {wrong} is out of range"):
            rest.set_checkpoint_ttl_from_tinker_path(later, wrong).result(PATIENCE)


def test_publishing_is_noted(rest: Any, run: Any) -> None:
    path = run.save_weights_for_sampler("shown").result(PATIENCE).path
    for change, public in (
        (rest.publish_checkpoint_from_tinker_path, True),
        (rest.unpublish_checkpoint_from_tinker_path, False),
    ):
        change(path).result(PATIENCE)
        (row,) = rest.list_checkpoints(run.model_id).result(PATIENCE).checkpoints
        assert row.public is public


def test_sessions_and_samplers(server: Server, rest: Any, client: Any, run: Any) -> None:
    session = client.holder.get_session_id()
    path = run.save_weights_for_sampler("sampled").result(PATIENCE).path
    samplers = [client.create_sampling_client(base_model=nano.NAME), client.create_sampling_client(model_path=path)]
    ids = [each.result(PATIENCE)._sampling_session_id for each in samplers]
    unsaved = run.save_weights_and_get_sampling_client().result(PATIENCE)._sampling_session_id
    rows = [rest.get_sampler(each).result(PATIENCE) for each in (*ids, unsaved)]
    assert [each.sampler_id for each in rows] == [*ids, unsaved]
    assert [each.base_model for each in rows] == [nano.NAME] * 3
    assert [each.model_path for each in rows] == [None, path, None]
    answer = rest.get_session(session).result(PATIENCE)
    assert run.model_id in answer.training_run_ids
    assert {*ids, unsaved} <= set(answer.sampler_ids)
    with connected(server.address) as newer:
        newest = newer.holder.get_session_id()
        assert rest.list_sessions(limit=2).result(PATIENCE).sessions[0] == newest
        assert rest.get_session(newest).result(PATIENCE).training_run_ids == []
    assert rest.list_sessions(limit=1, offset=1).result(PATIENCE).sessions != [newest]


RUN, PATH = f"{NOBODY}:train:0", f"tinker://{NOBODY}:train:0/weights/x"
MISSING: dict[str, Callable[[Any], Any]] = {
    "a run": lambda rest: rest.get_training_run(RUN),
    "a run that is none": lambda rest: rest.get_training_run("nobody's"),
    "a run by path": lambda rest: rest.get_training_run_by_tinker_path(PATH),
    "a run's checkpoints": lambda rest: rest.list_checkpoints(RUN),
    "a checkpoint to delete": lambda rest: rest.delete_checkpoint(RUN, "weights/x"),
    "a checkpoint to publish": lambda rest: rest.publish_checkpoint_from_tinker_path(PATH),
    "a checkpoint to unpublish": lambda rest: rest.unpublish_checkpoint_from_tinker_path(PATH),
    "a checkpoint to keep": lambda rest: rest.set_checkpoint_ttl_from_tinker_path(PATH, 60),
    "a checkpoint's weights": lambda rest: rest.get_weights_info_by_tinker_path(PATH),
    "a session": lambda rest: rest.get_session(NOBODY),
    "a sampler": lambda rest: rest.get_sampler(f"{NOBODY}:sample:0"),
}


@pytest.mark.parametrize("what", MISSING)
def test_what_is_not_there_is_not_found(what: str, rest: Any) -> None:
    with pytest.raises(tinker.NotFoundError, match=r"there is no|does not exist"):
        MISSING[what](rest).result(PATIENCE)


def test_what_cannot_be_asked_is_named(rest: Any, raw: Raw) -> None:
    for name in ("training_runs", "sessions"):
        refused(raw.get(f"{name}?project_id=p"), 400, "project_id 'p': this server has no projects")
    for wrong in ("limit=0", "limit=1001", "offset=-1", "limit=x"):
        for name in ("training_runs", "checkpoints"):
            refused(raw.get(f"{name}?{wrong}"), 422, wrong.partition("=")[0])
    for path in ("other/x", "weights/.x"):
        gone = raw.http.delete(f"/api/v1/training_runs/{RUN}/checkpoints/{path}")
        refused(gone, 400, "is no checkpoint path")
    refused(raw.get("billing/usage"), 404, "Not Found")


def test_the_state_of_another_process_is_found(tmp_path: Path) -> None:
    """A folder that was put there is a checkpoint, without a run of its own; a damaged one is left out."""
    with served(tmp_path / "one") as one, connected(one.address) as client:
        run = client.create_lora_training_client(nano.NAME, rank=2, seed=0).result(PATIENCE)
        path = run.save_state("moved", user_metadata={"from": "afar"}).result(PATIENCE).path
        bad = run.save_state("bad").result(PATIENCE).path
        target = folder_of(tmp_path / "other", path).parent
        target.parent.mkdir(parents=True)
        folder_of(tmp_path / "one", path).parent.rename(target)
        (folder_of(tmp_path / "other", bad) / "kshot.json").write_text("")
    with served(tmp_path / "other") as other:
        rest = rest_of(other.address)
        (rows,) = rest.list_user_checkpoints().result(PATIENCE).checkpoints
        assert (rows.tinker_path, rows.user_metadata) == (path, {"from": "afar"})
        assert rest.get_weights_info_by_tinker_path(path).result(PATIENCE).lora_rank == 2
        with connected(other.address) as client:
            client.create_training_client_from_state_with_optimizer(path).result(PATIENCE)
    with served(tmp_path / "one") as one:
        rest = rest_of(one.address)
        assert rest.list_user_checkpoints().result(PATIENCE).checkpoints == []
        assert rest.get_training_run(run.model_id).result(PATIENCE).last_checkpoint is None
