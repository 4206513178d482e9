"""Sessions on a server: what goes when they end or fall silent, and runs whose model is still being loaded."""

import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from tinker import types

from tests.vlm.checkpoints import copied
from tests.vlm.raw import DATA, PROMPT, Raw, accepted, refused, run_of, sample_of, talking
from tests.vlm.services import PATIENCE, connected, step
from tests.vlm.serving import MODEL_PATHS, Server, served
from vlm import nano
from vlm.local.registry import EngineRegistry
from vlm.server.tables import Session

ADAM = types.AdamParams(learning_rate=1e-2)
OTHER = "other/nano"


def test_a_session_that_is_finished_gives_its_memory_back(server: Server, raw: Raw) -> None:
    with connected(server.address) as client:
        session, created = client.holder.get_session_id(), client.create_lora_training_client
        saved, unsaved = (created(nano.NAME, rank=2, seed=0).result(PATIENCE) for _ in range(2))
        path = saved.save_state("last").result(PATIENCE).path
        sampler = saved.save_weights_and_get_sampling_client().result(PATIENCE)
        assert raw.post("session_heartbeat", session_id=session).status_code == 200
        waiting = accepted(raw.step(unsaved.model_id, 9))
    assert not {saved.model_id, unsaved.model_id} & set(server.state.runs)
    assert not server.state.samplers.ephemeral
    way = f"go on from '{path}' with create_training_client_from_state_with_optimizer"
    refused(raw.pass_of(saved.model_id, 20), 404, way)
    refused(raw.pass_of(unsaved.model_id, 1), 404, "nothing of it was saved")
    assert "was finished" in raw.answer(waiting)["error"]
    refused(raw.post("session_heartbeat", session_id=session), 410, "was finished")
    refused(raw.creating(session, 7), 404, "was finished")
    gone = sample_of(PROMPT, max_tokens=1) | {"sampling_session_id": sampler._sampling_session_id}
    answer = raw.result("asample", **gone | {"base_model": None, "seq_id": 0})
    assert "in memory alone and are gone" in answer["error"]
    with connected(server.address) as client:
        resumed = client.create_training_client_from_state_with_optimizer(path).result(PATIENCE)
        step(resumed, DATA, ADAM)


def test_a_session_without_a_sign_of_life_is_put_away(server: Server, raw: Raw) -> None:
    quiet, lively = raw.session(), raw.session()
    runs_of = [raw.run(each) for each in (quiet, lively)]
    now = time.time()
    server.state.store.update(Session, quiet, heartbeat=now - 4000)
    server.state.runs[runs_of[0]].last_request = now - 4000
    server.state.tidy(now)
    assert [run in server.state.runs for run in runs_of] == [False, True]
    refused(raw.pass_of(runs_of[0], 1), 404, "not in memory any more")
    raw.answer(accepted(raw.pass_of(runs_of[1], 1)))
    server.state.store.update(Session, lively, heartbeat=now - 4000)
    assert raw.post("session_heartbeat", session_id=lively).status_code == 200
    server.state.tidy(now)
    assert runs_of[1] in server.state.runs
    refused(raw.post("session_heartbeat", session_id="nobody's"), 404, "there is no session")
    refused(raw.pass_of(run_of("0" * 36), 1), 404, "there is no run")


def test_a_run_can_be_asked_for_while_its_model_is_loaded(tmp_path: Path) -> None:
    """And what was asked of a run that cannot be is told why."""
    may_load, broken = threading.Event(), copied(nano.folder(), tmp_path)

    class Slow(EngineRegistry):
        def engine(self, base_model: str) -> Any:
            assert may_load.wait(30)
            return super().engine(base_model)

    with (
        served(tmp_path / "state", Slow(tmp_path / "state", model_paths={**MODEL_PATHS, OTHER: str(broken)})) as server,
        talking(server.address) as raw,
    ):
        (broken / "model.safetensors").unlink()
        session, info = raw.session(), dict[str, httpx.Response]()
        creating, passing = raw.create(session), accepted(raw.pass_of(run_of(session), 1))
        failing = raw.create(session, 1, OTHER)
        held = accepted(raw.step(run_of(session, 1), 1))

        def ask(run: str) -> None:
            with talking(server.address) as own:
                info[run] = own.post("get_info", model_id=run)

        asking = [threading.Thread(target=ask, args=(run_of(session, n),)) for n in (0, 1)]
        for thread in asking:
            thread.start()
        assert raw.get("healthz").json() == {"status": "ok"}  # others are answered meanwhile
        assert not info
        may_load.set()
        for thread in asking:
            thread.join(30)
        assert raw.answer(creating)["model_id"] == run_of(session)
        loaded = info[run_of(session)].json()
        assert (loaded["model_id"], loaded["model_data"]["model_name"]) == (run_of(session), nano.NAME)
        assert np.isfinite(raw.loss(passing))
        for error in (raw.answer(failing)["error"], raw.answer(held)["error"], refused(info[run_of(session, 1)], 400)):
            assert "cannot be loaded" in error
        refused(raw.post("get_info", model_id=run_of(session, 1)), 404, "there is no run")
