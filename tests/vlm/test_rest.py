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

ABSENT = "tinker://00000000-0000-0000-0000-000000000000:train:0/weights/none"
HOSTED = {  # what needs accounts, or a server that others reach
    *("assign_session_project", "copy_weights", "export_session_trace", "get_audit_log", "get_billing_usage"),
    *("get_current_checkpoint_storage_usage", "get_external_weights_urls", "get_sampler", "get_session"),
    *("list_sessions", "publish_checkpoint_from_tinker_path", "unpublish_checkpoint_from_tinker_path"),
    *("get_server_capabilities", "search_sessions", "whoami", "get_checkpoint_archive_url"),
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
    rest: Any = both.client.create_rest_client() if both.kind == "local" else rest_of(both.client.holder._base_url)
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
