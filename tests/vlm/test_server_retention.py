"""What a server keeps: how much of a session, how many of an owner, for how long, and on a full disk."""

import asyncio
import logging
import os
import sqlite3
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kshot.errors import BusyError, InputError, KshotError
from tests.vlm.raw import SESSION_BODY, Raw, refused
from tests.vlm.test_server_store import LORA, checkpoint, outside
from vlm.local.registry import EngineRegistry
from vlm.server import retention, store
from vlm.server.futures import Answer
from vlm.server.limits.memory import QUEUES
from vlm.server.owners import EVERYBODY, Owner
from vlm.server.retention import Retention, seconds_of
from vlm.server.state import METADATA, ServerState
from vlm.server.store import FILE, Store
from vlm.server.tables import VERSION, Future, Run, Sampler, Session

MIB, NOW, HOUR = 1 << 20, 1_800_000_000.0, 3600.0
OLD = NOW - 31 * 86400


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Store]:
    with closing(Store(tmp_path)) as opened:
        yield opened


def used(store: Store, name: str, at: float, owner: str | None = None, **more: Any) -> str:
    """A session that was last used then, with a run, a point of its curve and a sampler."""
    store.add(Session(name, at, at, owner=owner, **more))
    store.add(Run(f"{name}:train:0", name, "m", LORA, None, at, at, owner=owner))
    store.add(Sampler(f"{name}:sample:0", name, "m", created=at, owner=owner))
    store.add_loss(f"{name}:train:0", 1, 0.5, 1)
    return name


def of(store: Store, name: str) -> int:
    """How much is left of such a session."""
    rows = [store.get(Session, name), store.get(Run, f"{name}:train:0"), store.get(Sampler, f"{name}:sample:0")]
    return sum(row is not None for row in (*rows, *store.losses(f"{name}:train:0")))


# How much


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"tags": ["t"] * 65}, "tags are 65; at most 64 are kept"),
        ({"tags": ["x" * 1025]}, "a tag has 1,025 characters; at most 1,024"),
        ({"display_name": "x" * MIB}, "display_name has 1,048,576 characters"),
        ({"sdk_version": "x" * 1025}, "sdk_version has 1,025 characters"),
        ({"user_metadata": {"x": "y" * METADATA}}, "user_metadata has more than 65,536 characters"),
    ],
)
def test_texts_of_a_session_are_bounded(raw: Raw, wrong: dict[str, Any], words: str) -> None:
    refused(raw.post("create_session", **SESSION_BODY | wrong), 400, words)


def test_why_a_session_was_finished_is_bounded(raw: Raw) -> None:
    session = raw.session()
    for fields in ({"reason": {"a": "x" * MIB}}, {"reason": {}, "detail": "x" * MIB}):
        answer = raw.http.post(f"/api/v1/sessions/{session}/finish", json=fields)
        refused(answer, 400, "reason and detail have 1,048,6")
    assert raw.http.post(f"/api/v1/sessions/{session}/finish", json={"reason": {"a": "b"}}).status_code == 204


def test_an_owner_has_so_many_rows_and_old_ones_go_first(kept: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "MOST", {Session: 20, Run: 20, Sampler: 20})
    limited = Retention(kept)
    for n in range(20):
        limited.add(Session(f"s{n}", NOW + n, NOW + n, owner="one"))
    with pytest.raises(BusyError, match="20 sessions of this key are kept; finish sessions"):
        limited.add(Session("s20", owner="one"))
    limited.add(Session("theirs", NOW, NOW, owner="other"))
    limited.prune(NOW, HOUR, [])
    assert kept.count(Session) == 21  # nothing is over
    for n in (3, 5, 7, 9, 11):
        kept.update(Session, f"s{n}", finished={"reason": "done"})
    limited.prune(NOW, HOUR, [])
    assert [n for n in range(20) if kept.get(Session, f"s{n}") is None] == [3, 5, 7, 9]  # 16 are left
    limited.add(Session("s20", NOW, NOW, owner="one"))
    limited.prune(NOW + 2 * HOUR, HOUR, [])  # 17 are not many; none is a month old
    assert kept.owners(Session) == {"one": 17, "other": 1}


def test_room_is_made_behind_many_sessions_that_make_none(kept: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(retention.MOST, Run, 20)
    for n in range(1100):
        kept.add(Session(f"s{n:04}", NOW + n, NOW + n, finished={"reason": "done"}))
    for n in range(20):
        kept.add(Run(f"r{n}", f"s{1060 + n}", "m", {}))
    Retention(kept).prune(NOW + HOUR, HOUR, [])
    assert kept.count(Run) == 16
    assert kept.count(Session) == 1100 - 4


def test_unsaved_samplers_that_are_gone_make_room(kept: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that samples at each step makes one a step; its session is not over."""
    monkeypatch.setitem(retention.MOST, Sampler, 20)
    limited = Retention(kept)
    limited.add(Session("s", NOW, NOW))
    for n in range(20):
        limited.add(Sampler(f"s:sample:{n}", "s", "m", ephemeral=n > 0, created=NOW + n))
    with pytest.raises(BusyError, match="20 samplers of this key"):
        limited.add(Sampler("s:sample:20", "s", "m"))
    limited.prune(NOW, HOUR, ["s:sample:2"])
    assert [n for n in range(20) if kept.get(Sampler, f"s:sample:{n}") is None] == [1, 3, 4]
    limited.add(Sampler("s:sample:20", "s", "m"))


# For how long


def test_what_is_over_goes_after_a_time_and_checkpoints_stay(kept: Store) -> None:
    for name, at in (("old", OLD), ("saved", OLD), ("in use", OLD), ("new", NOW - 86400)):
        used(kept, name, at)
    used(kept, "finished", OLD, finished={"reason": "done"})
    kept.put_checkpoint(checkpoint("a", OLD, "saved:train:0"))
    kept.update(Run, "in use:train:0", last_request=NOW)
    Retention(kept, 30 * 86400).prune(NOW, HOUR, [])
    left = {name: of(kept, name) for name in ("old", "finished", "saved", "in use", "new")}
    assert left == {"old": 0, "finished": 0, "saved": 4, "in use": 4, "new": 4}
    assert len(kept.checkpoints()) == 1


def test_the_file_becomes_smaller(kept: Store, tmp_path: Path) -> None:
    used(kept, "s", OLD)
    for n in range(10):
        kept.finish_future(f"r{n}", f"k{n}", "text", os.urandom(MIB), "finished")
    for _ in range(5_100):  # more than are deleted at once
        kept.add_loss("s:train:0", 2, 0.5, 1)
    before = (tmp_path / FILE).stat().st_size
    kept.prune(NOW * 2, 0, 0, 0)
    Retention(kept, 86400).prune(NOW, HOUR, [])
    after = (tmp_path / FILE).stat().st_size
    assert before > 8 * MIB
    assert after < 5 * MIB, (before, after)
    assert (kept.count(Future), kept.count(Run)) == (0, 0)
    assert outside(tmp_path, "SELECT count(*) FROM losses") == [(0,)]
    assert outside(tmp_path, "PRAGMA integrity_check") == [("ok",)]


def test_a_file_of_the_first_version_is_read_and_can_become_smaller(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / FILE)) as first:
        first.executescript(f"{store.SCHEMA}; PRAGMA user_version = 1")
        first.execute("INSERT INTO sessions (id, created, heartbeat, tags) VALUES ('s', 1.0, 1.0, '[]')")
        first.commit()
    with closing(Store(tmp_path)) as opened:
        assert opened.get(Session, "s", Owner("anyone", everything=False)) == Session("s", 1.0, 1.0)
        assert outside(tmp_path, "PRAGMA user_version") == [(VERSION,)]
        assert outside(tmp_path, "PRAGMA auto_vacuum") == [(2,)]
    Store(tmp_path).close()


def test_times() -> None:
    assert [seconds_of(text) for text in ("1h", "30d", "8w")] == [3600, 30 * 86400, 56 * 86400]
    for wrong in ("", "30", "d", "0d", "-1d", "1.5d", "30 d", "30m", "999999d", "٣d"):
        with pytest.raises(InputError, match=r"give a number and a unit, h, d or w: 12h, 30d"):
            seconds_of(wrong)


# On a full disk


class Full(Store):
    """A store whose disk is full for a while. tried: how often it was written to meanwhile."""

    full, tried = False, 0

    def add(self, *args: Any, **options: Any) -> None:
        if self.full:
            self.tried += 1
            raise KshotError("database or disk is full")
        super().add(*args, **options)


def test_answers_leave_the_memory_when_the_disk_has_room_again(tmp_path: Path, caplog: Any) -> None:
    async def scenario() -> None:
        store = Full(tmp_path)
        state = ServerState(EngineRegistry(tmp_path), store)
        tidying = asyncio.create_task(state.keep_tidy(0.01))
        ids = [state.futures.open(f"k{n}", EVERYBODY, state.memory.take(QUEUES)) for n in range(16)]
        store.full = True
        tracemalloc.start()
        try:
            for n, each in enumerate(ids):
                state.futures.finish(each, Answer(bytes([n]) * MIB))
            while store.tried < 40:
                await asyncio.sleep(0.01)
            assert tracemalloc.get_traced_memory()[0] > 16 * MIB
            first = await state.futures.wait(ids[0], 0, EVERYBODY)
            assert first is not None
            del first
            store.full = False
            while store.count(Future) < 16 or tracemalloc.get_traced_memory()[0] > 4 * MIB:
                await asyncio.sleep(0.01)
        finally:
            tracemalloc.stop()
        for n, each in enumerate(ids):
            answer = await state.futures.wait(each, 0, EVERYBODY)
            assert answer is not None
            assert answer.content == bytes([n]) * MIB
        tidying.cancel()
        await state.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))
    assert "answers stay in memory, and are written later" in caplog.text


# For whose eyes


@pytest.mark.parametrize(("there", "mode"), [([], 0o700), (["server.sqlite3-wal", "a_train_0"], 0o700), (["x"], 0o755)])
def test_a_state_folder_is_for_its_user(tmp_path: Path, there: list[str], mode: int, caplog: Any) -> None:
    """One that was there and holds other things is left as it is."""
    new, old = tmp_path / "new", tmp_path / "old"
    Store(new).close()
    assert new.stat().st_mode & 0o777 == 0o700
    old.mkdir(mode=0o755)
    for name in there:
        (old / name).touch()
    with caplog.at_level(logging.WARNING):
        Store(old).close()
    assert old.stat().st_mode & 0o777 == mode
    assert ("it is now for its user alone" if mode == 0o700 else "is not kshot's alone") in caplog.text
