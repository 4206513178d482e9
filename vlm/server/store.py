# ruff: noqa: S608 - the names that are put into statements are those of the tables and fields below
"""What a server keeps from one start to the next: sessions, runs, samplers, checkpoints, answers, losses.

One SQLite file in the state folder, for one server at a time. Every call is safe from any thread, and all there or not
at all when it is cut off (but for `prune`). Rows whose call has returned outlive the process, however it ends; a
machine that loses power may lose the last ones (WAL, synchronous=NORMAL), never the file.
"""

import json
import logging
import math
import os
import sqlite3
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from kshot.errors import InputError, KshotError, RequestError
from vlm.server.owners import EVERYBODY, Owner
from vlm.server.tables import (
    KEYS,
    MIGRATIONS,
    READERS,
    SCHEMA,
    TABLES,
    VERSION,
    Checkpoint,
    Future,
    Loss,
    Row,
    Session,
    columns,
)

log = logging.getLogger("kshot.server")
FILE = "server.sqlite3"
OLDEST = (3, 37, 0)  # of SQLite: strict tables and RETURNING
SETTINGS = (
    "journal_mode = WAL",
    "synchronous = NORMAL",
    "foreign_keys = ON",
    "wal_autocheckpoint = 4000",  # pages: 16 MB are written to disk at once, in some 40 ms
    "busy_timeout = 5000",
)
INCREMENTAL = 2  # auto_vacuum: pages that are free can be taken out of the file
PIECE = 256  # free pages that are given back at once: 1 MB, in some 10 ms

REACHED = "(? OR owner IS NULL OR owner = ?)"  # by an owner: `Owner.reaches`, for lists
CHECKPOINTS = f"""
    SELECT * FROM checkpoints WHERE (? IS NULL OR run = ?) AND (? IS NULL OR kind = ?) AND {REACHED}
    ORDER BY created DESC, rowid DESC LIMIT ? OFFSET ?
"""
ADD_LOSS = """
    INSERT INTO losses (run, number, step, time, loss, examples)
    SELECT :run, ifnull(max(number) + 1, 0), :step, :time, :loss, :n FROM losses WHERE run = :run
"""
ADD_RETRIEVAL = """
    INSERT INTO retrievals SELECT request_id, ? FROM futures WHERE request_id = ? ON CONFLICT DO NOTHING
"""
OLD_FUTURES = """
    SELECT request_id FROM retrievals WHERE retrieved < :retrieved
    UNION SELECT request_id FROM futures WHERE finished < :finished
"""
FUTURES_BEYOND = """
    SELECT request_id FROM (
        SELECT request_id,
               sum(length(payload)) OVER (ORDER BY retrieved IS NOT NULL, finished DESC, futures.rowid DESC) AS total
        FROM futures LEFT JOIN retrievals USING (request_id))
    WHERE total > :most
"""
OVER = """
    SELECT id FROM sessions WHERE heartbeat < :until AND (heartbeat < :before OR finished IS NOT NULL)
        AND (:anyone OR owner IS :owner) AND NOT EXISTS (
            SELECT 1 FROM runs WHERE session = sessions.id AND (
                last_request >= :before AND finished IS NULL OR EXISTS (SELECT 1 FROM checkpoints WHERE run = runs.id)))
    ORDER BY heartbeat LIMIT :limit
"""
OF_SESSION = (  # what goes with it, a part at a time: nobody else is served meanwhile
    """
    DELETE FROM losses WHERE (run, number) IN (
        SELECT run, number FROM losses WHERE run IN (SELECT id FROM runs WHERE session = ?) LIMIT 5000)
    RETURNING 1
""",
    "DELETE FROM samplers WHERE id IN (SELECT id FROM samplers WHERE session = ? LIMIT 1000) RETURNING 1",
    "DELETE FROM runs WHERE id IN (SELECT id FROM runs WHERE session = ? LIMIT 1000) RETURNING 1",
)


class Store:
    """The store in `folder`, made where it is not there.

    Raises InputError where another process holds the folder or it cannot be written to; KshotError where the file is of
    another schema version or no database, and where a statement fails (a full disk, a key that is there already or is
    missing); RequestError for what SQLite cannot hold. Where there is no row that `owner` reaches, methods give None.

    The folder is for its user alone (0700): one that is made is, and one of the user's that others can enter becomes
    so, which is logged.
    """

    def __init__(self, folder: Path) -> None:
        if sqlite3.sqlite_version_info < OLDEST:
            needed = ".".join(map(str, OLDEST))
            raise KshotError(f"this Python has SQLite {sqlite3.sqlite_version}; the server needs {needed} or later")
        self.path, self._mutex = folder / FILE, Lock()
        with ExitStack() as opened:
            opened.callback(_locked(folder).release)
            try:
                self._connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
                opened.callback(self._connection.close)
                self._connection.row_factory = sqlite3.Row
                self._prepare()
            except sqlite3.Error as error:
                text = f"{self.path} cannot be used: {error}; move it away, or choose another --state"
                raise KshotError(text) from error
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Let go of the file and the folder."""
        with self._mutex:
            self._opened.close()

    def add(self, row: Any, verb: str = "INSERT", end: str = "") -> None:
        """A new row."""
        values = columns(type(row), vars(row))
        names, places = ", ".join(values), ", ".join(f":{name}" for name in values)
        self._run(f"{verb} INTO {TABLES[type(row)]} ({names}) VALUES ({places}) {end}", values)

    def update(self, kind: type, key: str, **values: Any) -> None:
        """Change some fields of a row, if it is there."""
        stored = columns(kind, values)
        assignments = ", ".join(f"{name} = :{name}" for name in stored)
        where = f"WHERE {KEYS[kind]} = :_key"
        self._run(f"UPDATE {TABLES[kind]} SET {assignments} {where}", {**stored, "_key": key})

    def get(self, kind: type[Row], key: str, owner: Owner = EVERYBODY) -> Row | None:
        """The row with this primary key, if this owner reaches it."""
        row: Any = self._one(kind, f"SELECT * FROM {TABLES[kind]} WHERE {KEYS[kind]} = ?", key)
        return row if row is not None and owner.reaches(row.owner) else None

    def newest(self, kind: type[Row], limit: int, offset: int = 0, owner: Owner = EVERYBODY) -> list[Row]:
        """Newest first: sessions or runs that this owner reaches."""
        order = f"SELECT * FROM {TABLES[kind]} WHERE {REACHED} ORDER BY created DESC, rowid DESC LIMIT ? OFFSET ?"
        return self._all(kind, order, owner.everything, owner.name, limit, offset)

    def count(self, kind: type, owner: Owner = EVERYBODY) -> int:
        """The number of rows of a table that this owner reaches."""
        return self._number(f"SELECT count(*) FROM {TABLES[kind]} WHERE {REACHED}", owner.everything, owner.name)

    def owners(self, kind: type) -> dict[str | None, int]:
        """How many rows of a table each owner has."""
        rows = self._run(f"SELECT owner, count(*) FROM {TABLES[kind]} GROUP BY owner")
        return {row[0]: row[1] for row in rows}

    def of_session(self, kind: type[Row], session: str) -> list[Row]:
        """The runs or samplers of a session, oldest first."""
        return self._all(kind, f"SELECT * FROM {TABLES[kind]} WHERE session = ? ORDER BY created, rowid", session)

    def next_clone(self, sampler: str) -> int | None:
        """The number of one more client of a sampler, from 1 on; never the same twice."""
        change = "UPDATE samplers SET clones = clones + 1 WHERE id = ? RETURNING clones"
        return next((number for (number,) in self._run(change, (sampler,))), None)

    def put_checkpoint(self, checkpoint: Checkpoint) -> None:
        """A checkpoint, in place of one with the same path."""
        self.add(checkpoint, "INSERT OR REPLACE")

    def checkpoints(
        self,
        run: str | None = None,
        limit: int = -1,
        offset: int = 0,
        kind: str | None = None,
        owner: Owner = EVERYBODY,
    ) -> list[Checkpoint]:
        """Newest first: all that this owner reaches, or those of a run, of a kind, or both. limit: -1 for no limit."""
        whose = owner.everything, owner.name
        return self._all(Checkpoint, CHECKPOINTS, run, run, kind, kind, *whose, limit, offset)

    def count_checkpoints(self, run: str) -> int:
        """The number of a run's checkpoints."""
        return self._number("SELECT count(*) FROM checkpoints WHERE run = ?", run)

    def last_checkpoint(self, run: str, kind: str) -> Checkpoint | None:
        """The newest of a run of one kind."""
        return next(iter(self.checkpoints(run, 1, kind=kind)), None)

    def remove(self, kind: type, key: str) -> None:
        """Delete the row with this primary key, if it is there."""
        self._run(f"DELETE FROM {TABLES[kind]} WHERE {KEYS[kind]} = ?", (key,))

    def expired(self, now: float) -> list[str]:
        """The paths of the checkpoints whose end has come."""
        rows = self._run("SELECT path FROM checkpoints WHERE expires <= ? ORDER BY expires", (now,))
        return [path for (path,) in rows]

    def finish_future(
        self,
        request_id: str,
        key: str,
        content_type: str,
        payload: bytes,
        status: str,
        owner: str | None = None,
    ) -> None:
        """The answer to a request. It is written once: a second one to the same key is dropped."""
        now = time.time()
        row = Future(request_id, key, now, now, status, content_type, payload, owner)
        self.add(row, end="ON CONFLICT DO NOTHING")

    def future_of(self, key: str) -> Future | None:
        """One answer by its key."""
        return self._one(Future, "SELECT * FROM futures WHERE key = ?", key)

    def mark_retrieved(self, request_id: str) -> None:
        """Note that an answer has been sent; the first time counts."""
        self._run(ADD_RETRIEVAL, (time.time(), request_id))

    def retrieved(self, request_id: str) -> float | None:
        """When an answer was first sent."""
        rows = self._run("SELECT retrieved FROM retrievals WHERE request_id = ?", (request_id,))
        return next((time for (time,) in rows), None)

    def prune(self, now: float, after_retrieved_s: float, after_s: float, max_bytes: int) -> None:
        """Delete answers that were sent or finished so many seconds ago, and then, until the rest has at most
        `max_bytes`, first those that were sent, oldest first. Much of it takes a second: call it from a thread."""
        self._delete_futures(OLD_FUTURES, {"retrieved": now - after_retrieved_s, "finished": now - after_s})
        if self._number("SELECT ifnull(sum(length(payload)), 0) FROM futures") > max_bytes:
            self._delete_futures(FUTURES_BEYOND, {"most": max_bytes})

    def over(self, before: float, owner: Owner = EVERYBODY, limit: int = 1000, *, finished: bool = False) -> list[str]:
        """Sessions without a sign of life since then or, with `finished`, that were finished, longest ago first. Not
        those with a checkpoint, nor with a run in use."""
        until = math.inf if finished else before
        whose = {"anyone": owner.everything, "owner": owner.name}
        rows = self._run(OVER, {"before": before, "until": until, "limit": limit, **whose})
        return [session for (session,) in rows]

    def remove_session(self, session: str) -> None:
        """Delete a session with its samplers, its runs and their losses. Call it from a thread."""
        for part in OF_SESSION:
            while self._run(part, (session,)):
                pass
        self.remove(Session, session)

    def unsaved_samplers(self, owner: str | None, limit: int) -> list[str]:
        """Samplers of an owner whose weights are or were in memory alone, oldest first."""
        query = "SELECT id FROM samplers WHERE owner IS ? AND ephemeral ORDER BY created, rowid LIMIT ?"
        return [sampler for (sampler,) in self._run(query, (owner, limit))]

    def shrink(self, spare: int = 4 * PIECE) -> None:
        """Give pages that are free back to the file system, but for so many. Call it from a thread."""
        if self._number("PRAGMA freelist_count") <= spare:
            return
        while (free := self._number("PRAGMA freelist_count")) > spare:
            with self._mutex:  # not `execute`, which frees one page
                self._connection.executescript(f"PRAGMA incremental_vacuum({min(PIECE, free - spare)})")
            if self._number("PRAGMA freelist_count") >= free:
                return  # a file from which SQLite can take none: see `_prepare`
        self._run("PRAGMA wal_checkpoint(PASSIVE)")  # or the file would be as long as before

    def add_loss(self, run: str, step: int, loss: float, examples: int) -> None:
        """One more point of the curve of a run that there is."""
        self._run(ADD_LOSS, {"run": run, "step": step, "time": time.time(), "loss": float(loss), "n": examples})

    def losses(self, run: str, at_most: int = 500) -> list[Loss]:
        """A run's curve in order; of more points than that, some at even distances, with the first and the last."""
        count = self._number("SELECT ifnull(max(number) + 1, 0) FROM losses WHERE run = ?", run)
        numbers = np.unique(np.linspace(0, count - 1, min(count, at_most)).round().astype(int)).tolist()
        wanted = "SELECT * FROM losses WHERE run = ? AND number IN (SELECT value FROM json_each(?)) ORDER BY number"
        return self._all(Loss, wanted, run, json.dumps(numbers))

    def _delete_futures(self, query: str, values: Mapping[str, Any]) -> None:
        for (request_id,) in self._run(query, values):
            self.remove(Future, request_id)

    def _all(self, kind: type[Row], query: str, *values: Any) -> list[Row]:
        readers = READERS[kind]
        rows = self._run(query, values)
        return [kind(*(read(row[name]) if read else row[name] for name, read in readers)) for row in rows]

    def _one(self, kind: type[Row], query: str, *values: Any) -> Row | None:
        return next(iter(self._all(kind, query, *values)), None)

    def _number(self, query: str, *values: Any) -> int:
        return self._run(query, values)[0][0]

    def _run(self, statement: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[sqlite3.Row]:
        """The rows of one statement, which is a transaction of its own."""
        try:
            with self._mutex:
                return self._connection.execute(statement, values).fetchall()
        except (UnicodeEncodeError, OverflowError) as error:
            raise RequestError(f"a value cannot be stored: {error}") from error
        except sqlite3.Error as error:
            raise KshotError(f"{self.path} did not take {' '.join(statement.split()[:3])}: {error}") from error

    def _prepare(self) -> None:
        for setting in SETTINGS:
            self._connection.execute(f"PRAGMA {setting}")
        version = self._connection.execute("PRAGMA user_version").fetchone()[0]
        new = version == 0 and not self._connection.execute("SELECT 1 FROM sqlite_schema").fetchone()
        if not (new or 0 < version <= VERSION):
            raise KshotError(
                f"{self.path} has schema version {version} and this kshot reads {VERSION}; use the kshot that "
                "wrote it, or choose another --state"
            )
        if self._connection.execute("PRAGMA auto_vacuum").fetchone()[0] != INCREMENTAL:
            self._let_it_shrink()
        steps = "; ".join([SCHEMA, *MIGRATIONS] if new else MIGRATIONS[version - 1 :])
        self._connection.executescript(f"BEGIN; {steps}; PRAGMA user_version = {VERSION}; COMMIT;")

    def _let_it_shrink(self) -> None:
        """What older versions wrote is written once more, in a form from which free pages can be taken."""
        try:
            self._connection.execute(f"PRAGMA auto_vacuum = {INCREMENTAL}")
            self._connection.execute("VACUUM")
        except sqlite3.OperationalError as error:  # a full disk: a second file of this size is needed for a moment
            log.warning("%s cannot become smaller yet (%s); the next start tries it again", self.path, error)


def _locked(folder: Path) -> FileLock:
    """The lock of a folder, which ends with its process."""
    try:
        folder.mkdir(0o700, parents=True, exist_ok=True)
        _close_to_others(folder)
        lock = FileLock(folder / ".server.lock", blocking=False, thread_local=False)
        lock.acquire()
    except Timeout as error:
        raise InputError(f"another server uses the folder {folder}; stop it, or choose another --state") from error
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}; choose another --state") from error
    return lock


def _close_to_others(folder: Path) -> None:
    """Let nobody but its user enter a folder, where the system knows users: answers and weights are in it. One that
    holds other things too, such as /tmp, is left as it is, which is said."""
    status = folder.stat()
    if os.name != "posix" or not status.st_mode & 0o077:
        return
    names = [path.name for path in folder.iterdir()]
    if status.st_uid != os.geteuid() or not all(name.startswith((".", FILE)) or "_train_" in name for name in names):
        log.warning("%s can be read by others and is not kshot's alone; close it, or choose another --state", folder)
        return
    folder.chmod(0o700)
    log.warning("%s could be read by others; it is now for its user alone (0700)", folder)
