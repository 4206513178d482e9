"""The server's store: each table's rows, threads, a killed process, and folders that cannot be used."""

import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from kshot.errors import InputError, KshotError, RequestError
from vlm.server.store import FILE, Store
from vlm.server.tables import SCHEMA, VERSION, Checkpoint, Future, Loss, Run, Sampler, Session

ROOT = Path(__file__).parents[2]
LORA = {"rank": 32, "train_mlp": True, "train_attn": True, "train_unembed": False, "train_vision": False}
HARD = [
    "it's",
    '"; DROP TABLE sessions; --',
    "café ☕ \U0001f600 \u202e",
    "line\nline\ttab\0nul",
    "x" * 1_000_000,
    "",
    "%_?:a@b$1",
]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store(tmp_path)) as opened:
        yield opened


@pytest.fixture
def filled(store: Store) -> Store:
    """With a session `s` and a run `s:train:0` of it."""
    store.add(Session("s", 10.0, 10.0))
    store.add(Run("s:train:0", "s", "Qwen/Qwen3-VL-2B-Instruct", LORA, None, 11.0, 11.0))
    return store


def checkpoint(name: str, created: float, run: str = "s:train:0", kind: str = "weights", **other: Any) -> Checkpoint:
    path, end, metadata = f"tinker://{run}/{kind}/{name}", other.get("expires"), {"a": "b"}
    model, optimizer = "Qwen/Qwen3-VL-2B-Instruct", kind == "weights"
    return Checkpoint(path, run, kind, name, created, 2**40, metadata, end, False, model, LORA, optimizer)


def outside(folder: Path, query: str) -> list[tuple[Any, ...]]:
    """What SQLite itself says of the file."""
    connection = sqlite3.connect(folder / FILE)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def test_sessions(store: Store) -> None:
    now = 1_700_000_000.25
    first = Session("a", now, now, user_metadata={"x": 1.5}, tags=["t", "u"], display_name="A", sdk_version="0.38.0")
    for row in (first, Session("b", 1_700_000_001.0), Session("c", 1_700_000_001.0)):
        store.add(row)
    assert store.get(Session, "a") == first
    assert store.get(Session, "nobody") is None
    assert [each.id for each in store.newest(Session, 10)] == ["c", "b", "a"]
    assert [each.id for each in store.newest(Session, 1, 1)] == ["b"]
    assert (store.newest(Session, 0), store.count(Session)) == ([], 3)
    changes: dict[str, Any] = {"heartbeat": now + 9, "finished": {"reason": "done", "detail": None}}
    store.update(Session, "a", **changes)
    store.update(Session, "nobody", **changes)
    assert store.get(Session, "a") == replace(first, **changes)
    assert store.newest(Session, 1)[0].tags == []


def test_runs(filled: Store) -> None:
    row = Run("s:train:1", "s", "m", LORA, {"k": "v"}, 12.0, 12.0)
    filled.add(row)
    assert filled.get(Run, row.id) == row
    filled.update(Run, row.id, next_seq=7, last_request=13.5)
    filled.update(Run, row.id, last_request=14.5)
    assert filled.get(Run, row.id) == replace(row, next_seq=7, last_request=14.5)
    assert [each.id for each in filled.newest(Run, 5)] == ["s:train:1", "s:train:0"]
    assert [each.id for each in filled.of_session(Run, "s")] == ["s:train:0", "s:train:1"]
    assert (filled.of_session(Run, "other"), filled.count(Run)) == ([], 2)


def test_samplers_and_their_clones(filled: Store) -> None:
    one = Sampler("s:sample:0", "s", "m", created=12.0)
    other = Sampler("s:sample:1", "s", "m", "tinker://s:train:0/sampler_weights/a", ephemeral=True, created=13.0)
    for row in (other, one):
        filled.add(row)
    assert filled.get(Sampler, "s:sample:0") == one
    assert filled.get(Sampler, "nobody") is None
    assert filled.of_session(Sampler, "s") == [one, other]
    assert [filled.next_clone(name) for name in ("s:sample:0", "s:sample:0", "s:sample:1")] == [1, 2, 1]
    assert filled.next_clone("nobody") is None


def test_checkpoints(filled: Store) -> None:
    rows = [
        checkpoint("a", 20.0, expires=99.0),
        checkpoint("b", 21.0),
        checkpoint("a", 22.0, kind="sampler_weights", expires=98.0),
        checkpoint("z", 23.0, run="a run of another process"),
    ]
    for row in rows:
        filled.put_checkpoint(row)
    a, b, sampler, foreign = rows
    assert filled.get(Checkpoint, a.path) == a
    assert filled.get(Checkpoint, "tinker://nobody/weights/a") is None
    assert filled.checkpoints() == [foreign, sampler, b, a]
    assert filled.checkpoints("s:train:0", limit=2) == [sampler, b]
    assert filled.checkpoints("s:train:0", 5, 1, "weights") == [a]
    assert filled.checkpoints(kind="weights") == [foreign, b, a]
    assert filled.count(Checkpoint) == 4
    assert filled.last_checkpoint("s:train:0", "weights") == b
    assert filled.last_checkpoint("nobody", "weights") is None
    assert filled.expired(98.5) == [sampler.path]
    assert filled.expired(99.0) == [sampler.path, a.path]
    filled.update(Checkpoint, a.path, expires=None, public=True)
    assert filled.get(Checkpoint, a.path) == replace(a, expires=None, public=True)
    assert filled.expired(1e12) == [sampler.path]
    filled.put_checkpoint(replace(a, created=30.0, size_bytes=7))
    assert filled.last_checkpoint("s:train:0", "weights") == replace(a, created=30.0, size_bytes=7)
    for _ in range(2):
        filled.remove(Checkpoint, a.path)
    assert filled.count(Checkpoint) == 3


def test_a_request_sent_twice_has_one_answer(store: Store) -> None:
    store.finish_future("r1", "run/1", "application/x-protobuf", b"\0\xff", "finished")
    row = store.get(Future, "r1")
    assert row == Future("r1", "run/1", row.created, row.created, "finished", "application/x-protobuf", b"\0\xff")
    store.finish_future("r2", "run/1", "application/json", b"{}", "failed")
    store.finish_future("r1", "run/1", "application/json", b"{}", "finished")
    assert store.get(Future, "r1") == store.future_of("run/1") == row
    assert store.get(Future, "r2") is None
    assert store.future_of("run/2") is None
    for name in ("r1", "r2"):
        assert store.retrieved(name) is None
        store.mark_retrieved(name)
    first = store.retrieved("r1")
    assert first >= row.finished
    store.mark_retrieved("r1")
    assert (store.retrieved("r1"), store.retrieved("r2"), store.get(Future, "r1")) == (first, None, row)
    store.finish_future("r3", "run/3", "application/json", b"{}", "failed")
    assert store.get(Future, "r3").status == "failed"


def test_that_an_answer_was_sent_does_not_write_it_again(store: Store) -> None:
    store.finish_future("r1", "run/1", "application/x-protobuf", bytes(8 << 20), "finished")
    store._run("PRAGMA wal_checkpoint(TRUNCATE)")
    log = store.path.with_name(store.path.name + "-wal")
    assert log.stat().st_size == 0
    store.mark_retrieved("r1")
    assert 0 < log.stat().st_size < 1 << 16
    assert len(store.get(Future, "r1").payload) == 8 << 20


def test_a_store_of_the_version_before_is_read(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / FILE)) as old, old:
        old.executescript(SCHEMA)
        for row in (("a", "x", 7), ("b", "y", None)):
            old.execute("INSERT INTO futures VALUES (?, ?, 1, 2, 'finished', 'text', x'00', ?)", row)
        old.execute("PRAGMA user_version = 1")
    store = Store(tmp_path)
    assert (store.retrieved("a"), store.retrieved("b")) == (7.0, None)
    assert store.get(Future, "b") == Future("b", "y", 1.0, 2.0, "finished", "text", b"\0")
    store.close()


def test_old_answers_go(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(10):
        store.add(Future(f"r{n}", f"k{n}", float(n), float(n), "finished", "text", bytes(100)))
    for n in (3, 5, 8):
        monkeypatch.setattr(time, "time", lambda now=20.0 + n: now)
        store.mark_retrieved(f"r{n}")

    def kept() -> str:
        return "".join(str(n) for n in range(10) if store.get(Future, f"r{n}") is not None)

    for retrieved, finished, most, left in (
        (100.0, 100.0, 1000, "0123456789"),
        (6.0, 28.5, 1000, "2456789"),  # r0 and r1 by age, r3 as sent
        (100.0, 100.0, 450, "4679"),  # the sent ones, then the oldest
        (100.0, 100.0, 0, ""),
    ):
        store.prune(30.0, retrieved, finished, most)
        assert kept() == left


def test_curves(filled: Store) -> None:
    filled.add(Run("s:train:1", "s", "m", LORA))
    assert filled.losses("s:train:0") == []
    start = time.time()
    for step in range(1, 2001):
        filled.add_loss("s:train:0", step, 1 / step, 32)
    filled.add_loss("s:train:1", 1, math.nan, 1)
    filled.add_loss("s:train:1", 1, math.inf, 1)
    whole = filled.losses("s:train:0", at_most=5000)
    assert whole == [Loss(step, point.time, 1 / step, 32) for step, point in enumerate(whole, 1)]
    assert len(whole) == 2000
    times = [start, *(point.time for point in whole), time.time()]
    assert times == sorted(times)
    thin = filled.losses("s:train:0")
    assert (len(thin), thin[0], thin[-1]) == (500, whole[0], whole[-1])
    gaps = {b.step - a.step for a, b in pairwise(thin)}
    assert gaps == {4, 5}  # 1999 steps in 499 gaps
    assert filled.losses("s:train:0", 2) == [whole[0], whole[-1]]
    nan, inf = filled.losses("s:train:1")
    assert (math.isnan(nan.loss), inf.loss) == (True, math.inf)


@pytest.mark.parametrize("text", HARD, ids=range(len(HARD)))
def test_any_text_is_plain_data(store: Store, tmp_path: Path, text: str) -> None:
    store.add(Session(text, user_metadata={text: text}, tags=[text], display_name=text, sdk_version=text))
    store.add(Run(text, text, text, LORA, {text: text}))
    store.add(Sampler(text, text, text, text))
    store.put_checkpoint(replace(checkpoint("a", 1.0), path=text, name=text, user_metadata={text: text}))
    store.finish_future(text, text, text, text.encode(), text)
    store.add_loss(text, 1, 0.5, 1)
    session, run, sampler = store.get(Session, text), store.get(Run, text), store.get(Sampler, text)
    saved, future = store.get(Checkpoint, text), store.future_of(text)
    assert (session.id, session.user_metadata, session.tags, session.display_name) == (text, {text: text}, [text], text)
    assert (run.base_model, run.user_metadata) == (text, {text: text})
    assert sampler.model_path == text
    assert (saved.path, saved.name, saved.user_metadata) == (text, text, {text: text})
    assert future.payload == text.encode()
    assert len(store.losses(text)) == 1
    counts = "SELECT (SELECT count(*) FROM sessions), (SELECT count(*) FROM runs), (SELECT count(*) FROM checkpoints)"
    assert outside(tmp_path, counts) == [(1, 1, 1)]


def test_what_cannot_be_stored_is_named(filled: Store) -> None:
    with pytest.raises(RequestError, match=r"cannot be stored.*surrogates"):
        filled.add(Session("\ud800"))
    with pytest.raises(RequestError, match=r"cannot be stored.*too large"):
        filled.update(Run, "s:train:0", next_seq=2**63)
    with pytest.raises(KshotError, match=r"server\.sqlite3 did not take INSERT INTO runs: FOREIGN KEY"):
        filled.add(Run("n:train:0", "nobody", "m", LORA))
    with pytest.raises(KshotError, match=r"UNIQUE constraint failed: sessions\.id"):
        filled.add(Session("s"))
    with pytest.raises(KshotError, match="FOREIGN KEY"):
        filled.add_loss("nobody", 1, 0.5, 1)
    assert (filled.count(Session), filled.count(Run)) == (1, 1)


def test_threads_lose_nothing(filled: Store) -> None:
    filled.add(Sampler("s:sample:0", "s", "m"))

    def hammer(thread: int) -> list[int | None]:
        clones = []
        for n in range(300):
            filled.finish_future(f"{thread}-{n}", f"key {n}", "text", f"{thread}-{n}".encode(), "finished")
            filled.add_loss("s:train:0", n, float(thread), 1)
            filled.update(Session, "s", heartbeat=float(n))
            clones.append(filled.next_clone("s:sample:0"))
        return clones

    with ThreadPoolExecutor(4) as pool:
        clones = [clone for each in pool.map(hammer, range(4)) for clone in each]
    assert sorted(clone for clone in clones if clone) == list(range(1, 1201))
    points = filled.losses("s:train:0", at_most=5000)
    assert sorted((point.loss, point.step) for point in points) == [(float(t), n) for t in range(4) for n in range(300)]
    for n in range(300):  # one of the four, whole
        row = filled.future_of(f"key {n}")
        assert row.payload == row.request_id.encode()


WRITER = """
import sys
from pathlib import Path
from vlm.server.store import Store
from vlm.server.tables import Session

store = Store(Path(sys.argv[1]))
store.add(Session("s"))
for n in range(1_000_000):
    store.finish_future(f"r{n}", f"k{n}", "text", f"r{n}".encode() * 500, "finished")
    store.add(Session(f"s{n}"))
    print(n, flush=True)
"""


def test_a_killed_server_loses_no_row_whose_call_had_returned(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        for _ in range(150):
            assert process.stdout.readline(), "the writer ended by itself"
        with pytest.raises(InputError, match="another server uses the folder"):
            Store(tmp_path)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        count = 150 + len([line for line in process.communicate()[0].split(b"\n") if line])
    assert process.returncode == -signal.SIGKILL
    with closing(Store(tmp_path)) as store:
        for n in range(count - 1):  # the last line may be torn
            row = store.future_of(f"k{n}")
            assert row.payload == f"r{n}".encode() * 500
            assert store.get(Session, f"s{n}") is not None
        store.add(Session("after"))
        assert outside(tmp_path, "PRAGMA integrity_check") == [("ok",)]


def test_what_was_written_is_there_for_the_next_server(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with closing(Store(folder)) as store:
        with pytest.raises(InputError, match=f"another server uses the folder {folder}; stop it, or choose another"):
            Store(folder)
        store.add(Session("s", 1.0, tags=["t"]))
        written = store.get(Session, "s")
        assert outside(folder, "PRAGMA journal_mode") == [("wal",)]
        assert outside(folder, "PRAGMA user_version") == [(VERSION,)]
    with closing(Store(folder)) as store:
        assert store.get(Session, "s") == written
    stored = outside(folder, "SELECT id, created, tags, finished FROM sessions")
    assert [(a, b, json.loads(c), d) for a, b, c, d in stored] == [("s", 1.0, ["t"], None)]


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot write to /dev/null/x: Not a directory; choose another --state"):
        Store(Path("/dev/null/x"))
    later, text, foreign = tmp_path / "later", tmp_path / "text", tmp_path / "foreign"
    Store(later).close()
    outside(later, "PRAGMA user_version = 7")
    words = f"has schema version 7 and this kshot reads {VERSION}; use the kshot that wrote it"
    with pytest.raises(KshotError, match=words):
        Store(later)
    with pytest.raises(KshotError, match="has schema version 7"):  # and not that the folder is in use
        Store(later)
    for folder in (text, foreign):
        folder.mkdir()
    (text / FILE).write_bytes(b"no database at all, but longer than a header" * 100)
    with pytest.raises(KshotError, match=r"cannot be used: file is not a database; move it away"):
        Store(text)
    outside(foreign, "CREATE TABLE mine (a)")
    with pytest.raises(KshotError, match="has schema version 0"):
        Store(foreign)
    assert outside(foreign, "SELECT name FROM sqlite_schema") == [("mine",)]
