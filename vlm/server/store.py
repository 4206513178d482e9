"""What a server remembers from one start to the next: sessions, runs, samplers, checkpoints, answers, losses.

One SQLite file in the state folder, for one server at a time. Every call is safe from any thread, and all there or not
at all when it is cut off (but for `prune`).
Knows no weights, no HTTP, and no rules about who may do what. Rows are those of `vlm.server.tables`.

TODO One SQLite file in a folder that one process holds. Knows no tables: a schema is given to it.

Rows whose call has returned outlive the process, however it ends; a machine that loses power may lose the last ones
(WAL, synchronous=NORMAL), never the file.
"""

import json
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock, Timeout

from kshot.errors import InputError, KshotError, RequestError
from vlm.server import tables as sql
from vlm.server.tables import Checkpoint, Future, Loss, Run, Sampler, Session, columns, row_of

# ---- One SQLite file in a folder that one process holds. Knows no tables: a schema is given to it.

FILE = "server.sqlite3"
OLDEST = (3, 37, 0)  # of SQLite: strict tables and RETURNING
SETTINGS = (
    "journal_mode = WAL",
    "synchronous = NORMAL",
    "foreign_keys = ON",
    "wal_autocheckpoint = 4000",  # pages: 16 MB are written to disk at once, in some 40 ms
    "busy_timeout = 5000",
)


class Database:
    """The file in `folder`, made with `schema` where it is not there. From any thread; one statement at a time.

    Raises InputError where another process holds the folder or it cannot be written to, KshotError where the file is
    of another schema version or no database.
    """

    def __init__(self, folder: Path, schema: str, version: int) -> None:
        if sqlite3.sqlite_version_info < OLDEST:
            needed = ".".join(map(str, OLDEST))
            raise KshotError(f"this Python has SQLite {sqlite3.sqlite_version}; the server needs {needed} or later")
        self.path, self._mutex, self._lock = folder / FILE, Lock(), _held(folder)
        try:
            self._connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            self._connection.row_factory = sqlite3.Row
            try:
                self._prepare(schema, version)
            except BaseException:
                self._connection.close()
                raise
        except sqlite3.Error as error:
            self._lock.release()
            raise KshotError(f"{self.path} cannot be used: {error}; move it away, or choose another --state") from error
        except BaseException:
            self._lock.release()
            raise

    def run(self, statement: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[sqlite3.Row]:
        """The rows of one statement, which is a transaction of its own.

        Raises RequestError for a text or a number that SQLite cannot hold, KshotError where it fails: a full disk, a
        key that is there already, one that is missing.
        """
        try:
            with self._mutex:
                return self._connection.execute(statement, values).fetchall()
        except (UnicodeEncodeError, OverflowError) as error:
            raise RequestError(f"a value cannot be stored: {error}") from error
        except sqlite3.Error as error:
            raise KshotError(f"{self.path} did not take {' '.join(statement.split()[:3])}: {error}") from error

    def close(self) -> None:
        """Let go of the file and the folder."""
        with self._mutex:
            self._connection.close()
        self._lock.release()

    def _prepare(self, schema: str, version: int) -> None:
        for setting in SETTINGS:
            self._connection.execute(f"PRAGMA {setting}")
        found = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if found == 0 and not self._connection.execute("SELECT 1 FROM sqlite_schema").fetchone():
            self._connection.executescript(f"BEGIN; {schema}; PRAGMA user_version = {version}; COMMIT;")
        elif found != version:
            raise KshotError(
                f"{self.path} has schema version {found} and this kshot reads {version}; use the kshot that wrote it, "
                "or choose another --state"
            )


def _held(folder: Path) -> FileLock:
    """The lock of a folder, which ends with its process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".server.lock", blocking=False, thread_local=False)
        lock.acquire()
    except Timeout as error:
        raise InputError(f"another server uses the folder {folder}; stop it, or choose another --state") from error
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}; choose another --state") from error
    return lock


# ---- What a server remembers from one start to the next: sessions, runs, samplers, checkpoints, answers, losses.

Row = TypeVar("Row")


class Store:
    """The store in `folder`; raises as `Database`, when it is opened and in every call.

    Methods that change a row say whether there was one; those that look for one give None where there is none. `now`
    is the current time unless it is given.
    """

    def __init__(self, folder: Path) -> None:
        self._database = Database(folder, sql.SCHEMA, sql.VERSION)

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the next server have the folder."""
        self._database.close()

    def add_session(
        self,
        session: str,
        *,
        user_metadata: Mapping[str, Any] | None = None,
        tags: Sequence[str] = (),
        display_name: str | None = None,
        sdk_version: str | None = None,
        now: float | None = None,
    ) -> None:
        """A new session."""
        now = _time(now)
        self._put(Session(session, now, now, None, user_metadata, list(tags), display_name, sdk_version))

    def heartbeat(self, session: str, now: float | None = None) -> bool:
        """A sign of life of a session."""
        return self._changed("UPDATE sessions SET heartbeat = ? WHERE id = ? RETURNING 1", _time(now), session)

    def finish_session(self, session: str, reason: Mapping[str, Any]) -> bool:
        """The end of a session."""
        return self._changed("UPDATE sessions SET finished = ? WHERE id = ? RETURNING 1", json.dumps(reason), session)

    def session(self, session: str) -> Session | None:
        """One session."""
        return self._one(Session, "SELECT * FROM sessions WHERE id = ?", session)

    def sessions(self, limit: int, offset: int = 0) -> list[Session]:
        """Newest first."""
        order = "SELECT * FROM sessions ORDER BY created DESC, rowid DESC LIMIT ? OFFSET ?"
        return self._all(Session, order, *_page(limit, offset))

    def session_count(self) -> int:
        """How many sessions there are."""
        return self._number("SELECT count(*) FROM sessions")

    def add_run(
        self,
        run: str,
        session: str,
        base_model: str,
        lora: Mapping[str, Any],
        user_metadata: Mapping[str, str] | None = None,
        now: float | None = None,
    ) -> None:
        """A new run of a session that there is; its first request is number 1."""
        now = _time(now)
        self._put(Run(run, session, base_model, lora, user_metadata, now, now, next_seq=1))

    def touch_run(self, run: str, next_seq: int | None = None, now: float | None = None) -> bool:
        """A request of a run came in; next_seq: which one is expected next."""
        change = "UPDATE runs SET last_request = ?, next_seq = ifnull(?, next_seq) WHERE id = ? RETURNING 1"
        return self._changed(change, _time(now), next_seq, run)

    def run(self, run: str) -> Run | None:
        """One run."""
        return self._one(Run, "SELECT * FROM runs WHERE id = ?", run)

    def runs(self, limit: int, offset: int = 0) -> list[Run]:
        """Newest first."""
        order = "SELECT * FROM runs ORDER BY created DESC, rowid DESC LIMIT ? OFFSET ?"
        return self._all(Run, order, *_page(limit, offset))

    def run_count(self) -> int:
        """How many runs there are."""
        return self._number("SELECT count(*) FROM runs")

    def runs_of(self, session: str) -> list[Run]:
        """A session's, oldest first."""
        return self._all(Run, "SELECT * FROM runs WHERE session = ? ORDER BY created, rowid", session)

    def add_sampler(
        self,
        sampler: str,
        session: str,
        base_model: str,
        model_path: str | None,
        *,
        ephemeral: bool = False,
        now: float | None = None,
    ) -> None:
        """A new sampler of a session that there is."""
        self._put(Sampler(sampler, session, base_model, model_path, ephemeral, _time(now), clones=0))

    def sampler(self, sampler: str) -> Sampler | None:
        """One sampler."""
        return self._one(Sampler, "SELECT * FROM samplers WHERE id = ?", sampler)

    def samplers_of(self, session: str) -> list[Sampler]:
        """A session's, oldest first."""
        return self._all(Sampler, "SELECT * FROM samplers WHERE session = ? ORDER BY created, rowid", session)

    def next_clone(self, sampler: str) -> int | None:
        """The number of one more client of a sampler, from 1 on; never the same twice."""
        change = "UPDATE samplers SET clones = clones + 1 WHERE id = ? RETURNING clones"
        rows = self._database.run(change, (sampler,))
        return rows[0][0] if rows else None

    def add_checkpoint(self, checkpoint: Checkpoint) -> None:
        """A checkpoint, in place of one with the same path."""
        self._put(checkpoint, "INSERT OR REPLACE")

    def checkpoint(self, path: str) -> Checkpoint | None:
        """One checkpoint."""
        return self._one(Checkpoint, "SELECT * FROM checkpoints WHERE path = ?", path)

    def checkpoints(
        self, run: str | None = None, limit: int = 100, offset: int = 0, kind: str | None = None
    ) -> list[Checkpoint]:
        """Newest first: all, or those of a run, of a kind, or both."""
        return self._all(Checkpoint, sql.CHECKPOINTS, run, run, kind, kind, *_page(limit, offset))

    def checkpoint_count(self, run: str | None = None, kind: str | None = None) -> int:
        """How many `checkpoints` goes through."""
        return self._number(sql.CHECKPOINT_COUNT, run, run, kind, kind)

    def checkpoint_paths(self) -> list[str]:
        """Of all of them."""
        return [path for (path,) in self._database.run("SELECT path FROM checkpoints ORDER BY path")]

    def last_checkpoint(self, run: str, kind: str) -> Checkpoint | None:
        """The newest of a run of one kind."""
        newest = "SELECT * FROM checkpoints WHERE run = ? AND kind = ? ORDER BY created DESC, rowid DESC LIMIT 1"
        return self._one(Checkpoint, newest, run, kind)

    def set_expiry(self, path: str, expires: float | None) -> bool:
        """When a checkpoint ends; None is never."""
        return self._changed("UPDATE checkpoints SET expires = ? WHERE path = ? RETURNING 1", expires, path)

    def set_public(self, path: str, public: bool) -> bool:
        """Whether a checkpoint is public."""
        return self._changed("UPDATE checkpoints SET public = ? WHERE path = ? RETURNING 1", int(public), path)

    def remove_checkpoint(self, path: str) -> bool:
        """Take a checkpoint off the list."""
        return self._changed("DELETE FROM checkpoints WHERE path = ? RETURNING 1", path)

    def expired(self, now: float) -> list[str]:
        """The paths of the checkpoints whose end has come."""
        rows = self._database.run("SELECT path FROM checkpoints WHERE expires <= ? ORDER BY expires", (now,))
        return [path for (path,) in rows]

    def finish_future(
        self,
        request_id: str,
        key: str,
        content_type: str,
        payload: bytes,
        *,
        status: str = "finished",
        created: float | None = None,
        now: float | None = None,
    ) -> str:
        """What a request came to; gives the request id under which it is found: that of the first with this key.

        created: when it was made, if not now. An answer is written once: a second one to the same key is dropped.
        """
        now = _time(now)
        row = Future(request_id, key, now if created is None else created, now, status, content_type, payload, None)
        self._put(row, end="ON CONFLICT DO NOTHING")
        first = self._database.run("SELECT request_id FROM futures WHERE key = ?", (key,))
        if not first:
            raise KshotError(f"request {request_id!r} has an answer under another key than {key!r}")
        return first[0][0]

    def future(self, request_id: str) -> Future | None:
        """One answer by its request."""
        return self._one(Future, "SELECT * FROM futures WHERE request_id = ?", request_id)

    def future_of(self, key: str) -> Future | None:
        """One answer by its key."""
        return self._one(Future, "SELECT * FROM futures WHERE key = ?", key)

    def mark_retrieved(self, request_id: str, now: float | None = None) -> bool:
        """Note that an answer has been sent; the first time counts."""
        change = "UPDATE futures SET retrieved = ifnull(retrieved, ?) WHERE request_id = ? RETURNING 1"
        return self._changed(change, _time(now), request_id)

    def prune(self, now: float, after_retrieved_s: float, after_s: float, max_bytes: int) -> int:
        """Delete answers that were sent or finished so many seconds ago, and then, until the rest has at most
        `max_bytes`, first those that were sent, oldest first. Gives how many went.

        Much of it takes a second: call it from a thread of its own, whose deletions let other calls in between.
        """
        ages = {"retrieved": now - after_retrieved_s, "finished": now - after_s}
        gone = self._delete_futures(sql.OLD_FUTURES, ages)
        if self._number("SELECT ifnull(sum(length(payload)), 0) FROM futures") > max_bytes:
            gone += self._delete_futures(sql.FUTURES_BEYOND, {"most": max_bytes})
        return gone

    def add_loss(self, run: str, step: int, loss: float, examples: int, now: float | None = None) -> None:
        """One more point of the curve of a run that there is."""
        self._database.run(
            sql.ADD_LOSS, {"run": run, "step": step, "time": _time(now), "loss": float(loss), "n": examples}
        )

    def losses(self, run: str, at_most: int = 500) -> list[Loss]:
        """A run's curve in order; of more points than that, some at even distances, with the first and the last."""
        if at_most < 2:
            raise RequestError(f"a curve has at least 2 points, got at_most = {at_most}")
        count = self._number("SELECT ifnull(max(number) + 1, 0) FROM losses WHERE run = ?", run)
        numbers = np.unique(np.linspace(0, count - 1, min(count, at_most)).round().astype(int)).tolist()
        wanted = "SELECT * FROM losses WHERE run = ? AND number IN (SELECT value FROM json_each(?)) ORDER BY number"
        return self._all(Loss, wanted, run, json.dumps(numbers))

    def _delete_futures(self, which: str, values: Mapping[str, Any]) -> int:
        rows = self._database.run(which, values)
        delete = "DELETE FROM futures WHERE request_id = ? RETURNING 1"
        return sum(self._changed(delete, request_id) for (request_id,) in rows)

    def _put(self, row: Any, verb: str = "INSERT", end: str = "") -> None:
        self._database.run(f"{verb} INTO {sql.INSERTIONS[type(row)]} {end}", columns(row))

    def _all(self, kind: type[Row], query: str, *values: Any) -> list[Row]:
        return [row_of(kind, stored) for stored in self._database.run(query, values)]

    def _one(self, kind: type[Row], query: str, *values: Any) -> Row | None:
        return next(iter(self._all(kind, query, *values)), None)

    def _number(self, query: str, *values: Any) -> int:
        return self._database.run(query, values)[0][0]

    def _changed(self, change: str, *values: Any) -> bool:
        return bool(self._database.run(change, values))


def _time(now: float | None) -> float:
    return time.time() if now is None else now


def _page(limit: int, offset: int) -> Iterable[int]:
    """Raise RequestError for a negative one, which SQLite would take for no limit."""
    if limit < 0 or offset < 0:
        raise RequestError(f"limit and offset must be at least 0, got {limit} and {offset}")
    return limit, offset
