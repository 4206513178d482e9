"""The SDK's lists of runs and checkpoints in process: the same as a server's, over the state folder."""

import asyncio
import inspect
import time
from pathlib import Path
from typing import Any

import pytest
import tinker

from kshot.checks import folder_of
from kshot.errors import ModelError, RequestError
from tests.vlm.services import PATIENCE, Service, rest_of
from vlm import nano
from vlm.local.registry import LocalServiceClient
from vlm.local.rest import LocalRestClient
from vlm.server.checkpoints import Checkpoints
from vlm.server.store import Store

ABSENT = "tinker://00000000-0000-0000-0000-000000000000:train:0/weights/none"
HOSTED = {  # what needs accounts, or a server that others reach
    *("assign_session_project", "copy_weights", "export_session_trace", "get_audit_log", "get_billing_usage"),
    *("get_current_checkpoint_storage_usage", "get_external_weights_urls", "get_sampler", "get_session"),
    *("list_sessions", "publish_checkpoint_from_tinker_path", "unpublish_checkpoint_from_tinker_path"),
    *("search_sessions", "whoami", "get_checkpoint_archive_url"),
    *("get_checkpoint_archive_url_from_tinker_path",),
}


def test_methods_are_the_sdks() -> None:
    theirs = {name for name in dir(tinker.RestClient) if not name.startswith("_")}
    mine = {name for name in dir(LocalRestClient) if not name.startswith("_")}
    assert mine <= theirs
    assert theirs - mine <= {*HOSTED, *(f"{name}_async" for name in HOSTED)}
    for name in mine:
        parameters, expected = (
            [(p.name, p.kind, p.default) for p in inspect.signature(getattr(each, name)).parameters.values()]
            for each in (LocalRestClient, tinker.RestClient)
        )
        assert parameters == expected, name


def test_lists_are_those_of_a_server(both: Service) -> None:
    rest: Any = both.client.create_rest_client() if both.kind != "http" else rest_of(both.client.holder._base_url)
    run = both.start(rank=2, user_metadata={"who": "me"})
    training = run.save_state("first").result(PATIENCE).path
    sampler = run.save_weights_for_sampler("second", ttl_seconds=1000).result(PATIENCE).path
    rows = rest.list_checkpoints(run.model_id).result(PATIENCE).checkpoints
    assert {(row.tinker_path, row.checkpoint_id, row.checkpoint_type) for row in rows} == {
        (training, "weights/first", "training"),
        (sampler, "sampler_weights/second", "sampler"),
    }
    ends = {row.tinker_path: row.expires_at for row in rows}
    assert ends[training] is None
    assert ends[sampler].timestamp() == pytest.approx(time.time() + 1000, abs=300)
    assert all(row.size_bytes > 1000 for row in rows)
    listed = rest.list_user_checkpoints(limit=1).result(PATIENCE)
    assert (len(listed.checkpoints), listed.cursor.total_count) == (1, 2)
    found = rest.get_training_run(run.model_id).result(PATIENCE)
    assert (found.base_model, found.is_lora, found.lora_rank) == (nano.NAME, True, 2)
    assert (found.last_checkpoint.tinker_path, found.last_sampler_checkpoint.tinker_path) == (training, sampler)
    assert rest.get_training_run_by_tinker_path(training).result(PATIENCE).training_run_id == run.model_id
    runs = rest.list_training_runs().result(PATIENCE)
    assert [each.training_run_id for each in runs.training_runs] == [run.model_id]
    info = rest.get_weights_info_by_tinker_path(sampler).result(PATIENCE)
    assert (info.base_model, info.lora_rank, info.train_attn) == (nano.NAME, 2, True)
    rest.set_checkpoint_ttl_from_tinker_path(training, 500).result(PATIENCE)
    (row,) = (r for r in rest.list_user_checkpoints().result(PATIENCE).checkpoints if r.tinker_path == training)
    assert row.expires_at.timestamp() == pytest.approx(time.time() + 500, abs=300)
    rest.delete_checkpoint(run.model_id, "weights/first").result(PATIENCE)
    rest.delete_checkpoint_from_tinker_path(sampler).result(PATIENCE)
    assert rest.list_user_checkpoints().result(PATIENCE).checkpoints == []


def test_what_has_expired_is_not_there(service: LocalServiceClient, monkeypatch: pytest.MonkeyPatch) -> None:
    run, rest = service.create_lora_training_client(nano.NAME, rank=2, seed=0).result(), service.create_rest_client()
    path = run.save_state("short", ttl_seconds=100).result().path
    run.load_state(path).result()
    now = time.time() + 101
    monkeypatch.setattr(time, "time", lambda: now)
    with pytest.raises(ModelError, match="does not exist"):
        run.load_state(path).result()
    assert run.save_state("short").result().path == path  # the name is free again
    run.load_state(path).result()
    rest.set_checkpoint_ttl_from_tinker_path(path, 1).result()
    monkeypatch.setattr(time, "time", lambda: now + 2)
    assert path not in [row.tinker_path for row in rest.list_user_checkpoints().result().checkpoints]
    assert not folder_of(service._registry.state, path).exists()


def test_a_time_to_live_leaves_the_order_as_it_was(both: Service) -> None:
    rest: Any = both.client.create_rest_client() if both.kind != "http" else rest_of(both.client.holder._base_url)
    run = both.start(rank=2)
    paths = [run.save_state(name).result(PATIENCE).path for name in ("a", "b")]
    rest.set_checkpoint_ttl_from_tinker_path(paths[0], 500).result(PATIENCE)
    assert rest.get_training_run(run.model_id).result(PATIENCE).last_checkpoint.tinker_path == paths[1]
    rows = rest.list_checkpoints(run.model_id).result(PATIENCE).checkpoints
    assert [row.tinker_path for row in rows] == paths[::-1]


def test_a_runs_metadata_is_not_that_of_a_checkpoint(both: Service) -> None:
    rest: Any = both.client.create_rest_client() if both.kind != "http" else rest_of(both.client.holder._base_url)
    run = both.start(rank=2, user_metadata={"who": "me"})
    run.save_state("a", user_metadata={"step": "1"}).result(PATIENCE)
    assert rest.get_training_run(run.model_id).result(PATIENCE).user_metadata == {"who": "me"}
    (row,) = rest.list_checkpoints(run.model_id).result(PATIENCE).checkpoints
    assert row.user_metadata == {"step": "1"}


def test_a_damaged_checkpoint_is_left_out_and_can_be_deleted(
    service: LocalServiceClient, caplog: pytest.LogCaptureFixture
) -> None:
    run, rest = service.create_lora_training_client(nano.NAME, rank=2, seed=0).result(), service.create_rest_client()
    paths = [run.save_state(name).result().path for name in ("a", "b", "c")]
    records = [folder_of(service._registry.state, path) / "kshot.json" for path in paths]
    records[0].write_text('{"base_model')
    records[1].write_text('{"base_model": "x"}')
    assert [row.tinker_path for row in rest.list_checkpoints(run.model_id).result().checkpoints] == paths[2:]
    assert caplog.text.count("is damaged") == 2
    rest.set_checkpoint_ttl_from_tinker_path(paths[2], 50).result()
    for path in paths[:2]:
        rest.delete_checkpoint_from_tinker_path(path).result()
    assert [each.parent.exists() for each in records] == [False, False, True]


def test_a_time_to_live_is_the_same_for_a_server_on_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process sets the server keeps to, and the other way round."""
    with LocalServiceClient(tmp_path) as service:
        run, rest = (
            service.create_lora_training_client(nano.NAME, rank=2, seed=0).result(),
            service.create_rest_client(),
        )
        _, more = (run.save_state(name, ttl_seconds=100).result().path for name in ("short", "more"))
        listed = Checkpoints(tmp_path, Store(tmp_path / "server"))
        listed.reconcile()
        ends = {row.path: row.expires for row in listed.store.checkpoints()}
        assert list(ends.values()) == pytest.approx([time.time() + 100] * 2, abs=60)
        rest.set_checkpoint_ttl_from_tinker_path(more, 1000).result()
        now = time.time() + 200
        monkeypatch.setattr(time, "time", lambda: now)
        listed.remove_expired(now)
        assert [row.path for row in listed.store.checkpoints()] == [more]
        listed.set_ttl(more, 50)
        monkeypatch.setattr(time, "time", lambda: now + 51)
        assert rest.list_user_checkpoints().result().checkpoints == []


def test_what_only_a_server_has_is_named(service: LocalServiceClient) -> None:
    rest = service.create_rest_client()
    assert not hasattr(rest, "list_sessions")
    with pytest.raises(RequestError, match=r"RestClient.list_sessions is not supported by the local service; .* serve"):
        rest.list_sessions()
    with pytest.raises(RequestError, match=r"ServiceClient.copy_weights is not supported"):
        service.copy_weights("a")
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        service.nonsense  # noqa: B018
    found = rest.get_server_capabilities().result().supported_models
    assert [model.model_name for model in found] == [
        model.model_name for model in service.get_server_capabilities().supported_models
    ]
    for page in ({"limit": 0}, {"offset": -1}):
        with pytest.raises(RequestError, match="must be 1 or more"):
            rest.list_user_checkpoints(**page)


def test_mistakes_are_named(service: LocalServiceClient, tmp_path: Path) -> None:
    rest = LocalServiceClient(tmp_path).create_rest_client()
    assert rest.list_training_runs().result().training_runs == []
    with pytest.raises(ModelError, match="does not exist"):
        rest.delete_checkpoint_from_tinker_path(ABSENT).result()
    with pytest.raises(ModelError, match="saved nothing"):
        rest.get_training_run("other").result()
    with pytest.raises(RequestError, match="is no checkpoint path"):
        asyncio.run(rest.set_checkpoint_ttl_from_tinker_path_async("tinker://../x", 5))
    run = service.create_lora_training_client(nano.NAME, rank=2, seed=0).result()
    for save in (run.save_state, run.save_weights_for_sampler, run.save_weights_external):
        with pytest.raises(RequestError, match=r"ttl_seconds = 0 is out of range"):
            save("x", ttl_seconds=0)
