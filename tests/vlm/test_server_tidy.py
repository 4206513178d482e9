"""Numbers that no table holds are refused where they come in, and one part of the housekeeping that fails stops no
other."""

import time
from typing import Any

import pytest

from kshot.errors import KshotError
from tests.vlm.raw import PROMPT, Raw, accepted, refused, run_of, sample_of
from tests.vlm.serving import Server
from vlm.server.checkpoints import Checkpoints
from vlm.server.tables import Checkpoint, Run, Session

HUGE = 10**30


def test_huge_numbers_are_refused_by_name(raw: Raw) -> None:
    session = raw.session()
    run = raw.run(session)
    for seq in (HUGE, 2**63, 2**63 - 1, 10**9, -1, 0):
        refused(raw.step(run, seq), 400, f"seq_id = {seq} is out of range")
    for seq in (2**31 - 1, 10**9):
        refused(raw.pass_of(run, seq), 400, f"seq_id = {seq} is out of range")
    body = sample_of(PROMPT, max_tokens=1)
    sampler = {"session_id": session, "sampling_session_seq_id": 0, "base_model": body.pop("base_model")}
    name = raw.post("create_sampling_session", **sampler).json()["sampling_session_id"]
    refused(raw.post("asample", **body, sampling_session_id=name, seq_id=HUGE), 400, "seq_id = 1000")
    raw.sampled(raw.submit("asample", **body, sampling_session_id=name, seq_id=3 * 10**9))  # as of a third client
    refused(raw.post("create_sampling_session", **sampler | {"sampling_session_seq_id": HUGE}), 400, "is out of range")
    refused(raw.creating(session, HUGE), 400, "model_seq_id = 1000")
    unsaved = raw.result("save_weights_for_sampler", model_id=run, seq_id=1, sampling_session_seq_id=HUGE)
    assert "sampling_session_seq_id = 1000" in unsaved["error"]
    for seq, seconds in enumerate((HUGE, -HUGE), 2):
        unsaved = raw.result("save_weights", model_id=run, seq_id=seq, ttl_seconds=seconds)
        assert "ttl_seconds" in unsaved["error"]
    path = raw.result("save_weights", model_id=run, seq_id=4, path="a")["path"].removeprefix("tinker://")
    where = f"/api/v1/training_runs/{path.replace('/', '/checkpoints/', 1)}/ttl"
    refused(raw.http.put(where, json={"ttl_seconds": HUGE}), 400, "ttl_seconds")
    for name in ("training_runs", "checkpoints", "sessions"):
        for query in (f"limit={HUGE}", f"offset={HUGE}", "offset=-1"):
            refused(raw.get(f"{name}?{query}"), 422)


def test_a_bad_row_and_a_failing_step_stop_nothing_else(
    server: Server, raw: Raw, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As if each of them met a full disk, or a number got past the checks."""
    session = raw.session()
    runs = [raw.run(session, number) for number in range(3)]
    state = server.state
    state.runs[runs[0]].next_seq = HUGE
    monkeypatch.setattr(state.runs[runs[1]], "last_request", time.time() - 100)
    paths = [
        raw.result("save_weights", model_id=runs[2], seq_id=n, path=f"t{n}", ttl_seconds=3600)["path"] for n in (1, 2)
    ]
    remove = Checkpoints.remove

    def failing(self: Checkpoints, path: str) -> None:
        if path == paths[0]:
            raise OSError("the disk is full")
        remove(self, path)

    monkeypatch.setattr(Checkpoints, "remove", failing)
    monkeypatch.setattr(state, "release", _no_release)
    state.store.update(Session, session, heartbeat=0.0)
    state.tidy(time.time() + 4000)
    assert state.store.get(Run, runs[1]).last_request == state.runs[runs[1]].last_request  # type: ignore[union-attr]
    left = [state.store.get(Checkpoint, path) is not None for path in paths]
    assert left == [True, False]
    for words in (f"run {run_of(session)}", f"session {session}", f"checkpoint {paths[0]}"):
        assert f"housekeeping of {words}" in caplog.text
    raw.output(accepted(raw.pass_of(runs[2], 3)))


def _no_release(*_: Any) -> None:
    raise KshotError("not now")
