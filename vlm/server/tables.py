"""The tables of the server's store: their schema, the rows as Python has them, and how one becomes the other.

Times are seconds since 1970 (UTC). A column has the name of its field; what SQLite has no type for is JSON.
"""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

# A checkpoint's run may be of another process (a folder that was put there), so it is no reference.
# SQLite writes a row as a whole: when an answer was sent is beside it, or it would be written again.
# Losses count from 0 within their run, so that every so manieth is found without reading the others.
SCHEMA = """
CREATE TABLE sessions (
    id TEXT PRIMARY KEY, created REAL NOT NULL, heartbeat REAL NOT NULL, finished TEXT, user_metadata TEXT,
    tags TEXT NOT NULL, display_name TEXT, sdk_version TEXT
) STRICT;
CREATE INDEX sessions_by_time ON sessions (created);
CREATE TABLE runs (
    id TEXT PRIMARY KEY, session TEXT NOT NULL REFERENCES sessions, base_model TEXT NOT NULL, lora TEXT NOT NULL,
    user_metadata TEXT, created REAL NOT NULL, last_request REAL NOT NULL, next_seq INTEGER NOT NULL
) STRICT;
CREATE INDEX runs_by_time ON runs (created);
CREATE INDEX runs_by_session ON runs (session, created);
CREATE TABLE samplers (
    id TEXT PRIMARY KEY, session TEXT NOT NULL REFERENCES sessions, base_model TEXT NOT NULL, model_path TEXT,
    ephemeral INTEGER NOT NULL, created REAL NOT NULL, clones INTEGER NOT NULL
) STRICT;
CREATE INDEX samplers_by_session ON samplers (session, created);
CREATE TABLE checkpoints (
    path TEXT PRIMARY KEY, run TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL, created REAL NOT NULL,
    size_bytes INTEGER NOT NULL, user_metadata TEXT, expires REAL, public INTEGER NOT NULL, base_model TEXT NOT NULL,
    lora TEXT NOT NULL, has_optimizer INTEGER NOT NULL
) STRICT;
CREATE INDEX checkpoints_by_time ON checkpoints (created);
CREATE INDEX checkpoints_by_run ON checkpoints (run, created);
CREATE INDEX checkpoints_by_end ON checkpoints (expires) WHERE expires IS NOT NULL;
CREATE TABLE futures (
    request_id TEXT PRIMARY KEY, key TEXT NOT NULL UNIQUE, created REAL NOT NULL, finished REAL NOT NULL,
    status TEXT NOT NULL, content_type TEXT NOT NULL, payload BLOB NOT NULL, retrieved REAL
) STRICT;
CREATE INDEX futures_by_time ON futures (finished);
CREATE INDEX futures_by_retrieval ON futures (retrieved) WHERE retrieved IS NOT NULL;
CREATE TABLE losses (
    run TEXT NOT NULL REFERENCES runs, number INTEGER NOT NULL, step INTEGER NOT NULL, time REAL NOT NULL, loss REAL,
    examples INTEGER NOT NULL, PRIMARY KEY (run, number)
) STRICT, WITHOUT ROWID
"""
MIGRATIONS = (  # what makes the schema of each version that of the next; a new file goes through all of them
    """
ALTER TABLE sessions ADD COLUMN owner TEXT;
ALTER TABLE runs ADD COLUMN owner TEXT;
ALTER TABLE samplers ADD COLUMN owner TEXT;
ALTER TABLE checkpoints ADD COLUMN owner TEXT;
ALTER TABLE futures ADD COLUMN owner TEXT;
CREATE INDEX sessions_by_heartbeat ON sessions (heartbeat);
CREATE INDEX sessions_by_owner ON sessions (owner);
CREATE INDEX runs_by_owner ON runs (owner);
CREATE INDEX samplers_by_owner ON samplers (owner)
""",
    """
CREATE TABLE retrievals (
    request_id TEXT PRIMARY KEY REFERENCES futures ON DELETE CASCADE, retrieved REAL NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX retrievals_by_time ON retrievals (retrieved);
INSERT INTO retrievals SELECT request_id, retrieved FROM futures WHERE retrieved IS NOT NULL;
DROP INDEX futures_by_retrieval;
ALTER TABLE futures DROP COLUMN retrieved
""",
)
VERSION = 1 + len(MIGRATIONS)  # of the schema

Row = TypeVar("Row")


def _to_json(value: Any) -> str | None:
    return None if value is None else json.dumps(value)


def _from_json(text: str | None) -> Any:
    return None if text is None else json.loads(text)


def _not_null(stored: float | None) -> float:
    return math.nan if stored is None else stored  # SQLite has no NaN and stores NULL for it


_JSON = {"write": _to_json, "read": _from_json}
_FLAG = {"read": bool}
_NUMBER = {"read": _not_null}


@dataclass(frozen=True)
class Session:
    """A client's session; finished: why it ended, or None."""

    id: str
    created: float = field(default_factory=time.time)
    heartbeat: float = field(default_factory=time.time)
    finished: Mapping[str, Any] | None = field(default=None, metadata=_JSON)
    user_metadata: Mapping[str, Any] | None = field(default=None, metadata=_JSON)
    tags: list[str] = field(default_factory=list, metadata=_JSON)
    display_name: str | None = None
    sdk_version: str | None = None
    owner: str | None = None


@dataclass(frozen=True)
class Run:
    """A training run; lora: rank and what is trained; next_seq: the number that its next request should have."""

    id: str
    session: str
    base_model: str
    lora: Mapping[str, Any] = field(metadata=_JSON)
    user_metadata: Mapping[str, str] | None = field(default=None, metadata=_JSON)
    created: float = field(default_factory=time.time)
    last_request: float = field(default_factory=time.time)
    next_seq: int = 1
    owner: str | None = None


@dataclass(frozen=True)
class Sampler:
    """A sampling session; model_path: None for the base model; ephemeral: the weights were in memory alone; clones:
    how many clients have joined it."""

    id: str
    session: str
    base_model: str
    model_path: str | None = None
    ephemeral: bool = field(default=False, metadata=_FLAG)
    created: float = field(default_factory=time.time)
    clones: int = 0
    owner: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """Saved weights; path: tinker://<run>/<kind>/<name>; expires: None for never."""

    path: str
    run: str
    kind: str
    name: str
    created: float
    size_bytes: int
    user_metadata: Mapping[str, str] | None = field(metadata=_JSON)
    expires: float | None
    public: bool = field(metadata=_FLAG)
    base_model: str
    lora: Mapping[str, Any] = field(metadata=_JSON)
    has_optimizer: bool = field(metadata=_FLAG)
    owner: str | None = None


@dataclass(frozen=True)
class Future:
    """A request that is finished; key: whose it is, and its number there."""

    request_id: str
    key: str
    created: float
    finished: float
    status: str
    content_type: str
    payload: bytes
    owner: str | None = None


@dataclass(frozen=True)
class Loss:
    """A point of a run's curve."""

    step: int
    time: float
    loss: float = field(metadata=_NUMBER)
    examples: int


TABLES = {Session: "sessions", Run: "runs", Sampler: "samplers", Checkpoint: "checkpoints", Future: "futures"}
KEYS = {kind: fields(kind)[0].name for kind in TABLES}  # primary keys
READERS = {kind: [(each.name, each.metadata.get("read")) for each in fields(kind)] for kind in (*TABLES, Loss)}


def columns(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """What SQLite stores of the values of some fields."""
    written = [(each.name, each.metadata.get("write")) for each in fields(kind) if each.name in values]
    return {name: write(values[name]) if write else values[name] for name, write in written}
