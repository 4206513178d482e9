"""How much is kept of sessions, and for how long: their texts, an owner's rows, and what goes when it is over.

A session that is over goes with its runs, their losses and its samplers after the time that `--keep` says, and before
that where its owner has many. Checkpoints stay until they are deleted or expire, and so do the run and the session of
one.
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from tinker import types

from kshot.errors import BusyError, InputError, RequestError
from vlm.server.checkpoints import logged
from vlm.server.owners import Owner
from vlm.server.store import Store
from vlm.server.tables import Run, Sampler, Session

KEEP = 30 * 86400.0  # seconds
UNITS = {"h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
MOST = {Session: 10_000, Run: 10_000, Sampler: 100_000}  # rows of one owner
ALL = -1  # rows: no limit of SQLite's
FULL, AIM = 0.9, 0.8  # of these: beyond it old ones go early, until so many are left
TAGS, TEXT = 64, 1024  # tags of a session; characters of a tag, a display name and an SDK's version
REASON = 1 << 16  # characters of the JSON of why a session was finished


def seconds_of(text: str) -> float:
    """The seconds of a time such as 30d. Raises InputError for what is none, or less than an hour."""
    found = re.fullmatch(r"([1-9][0-9]{0,4})([hdw])", text)
    if found is None:
        raise InputError(f"--keep {text!r}: give a number and a unit, h, d or w: 12h, 30d")
    return int(found[1]) * UNITS[found[2]]


def check_texts(request: types.CreateSessionRequest) -> None:
    """Raise RequestError for a session with too many or too long texts, beside its metadata."""
    if len(request.tags) > TAGS:
        raise RequestError(f"tags are {len(request.tags):,}; at most {TAGS} are kept")
    texts = {"display_name": request.display_name, "sdk_version": request.sdk_version}
    for name, text in [*(("a tag", tag) for tag in request.tags), *texts.items()]:
        if len(text or "") > TEXT:
            raise RequestError(f"{name} has {len(text or ''):,} characters; at most {TEXT:,} are kept")


def check_reason(reason: dict[str, Any]) -> None:
    """Raise RequestError for more words than are kept of why a session was finished."""
    if (size := len(json.dumps(reason))) > REASON:
        raise RequestError(f"reason and detail have {size:,} characters; at most {REASON:,} are kept")


@dataclass
class Retention:
    """What is kept in a store. keep: seconds for which a session that is over is kept."""

    store: Store
    keep: float = KEEP

    def __post_init__(self) -> None:
        self._counts = self._counted()

    def add(self, row: Session | Run | Sampler) -> None:
        """Store a new row. Raises as `check` and `Store.add`."""
        self.check(type(row), row.owner)
        self.store.add(row)
        counts = self._counts[type(row)]
        counts[row.owner] = counts.get(row.owner, 0) + 1

    def check(self, kind: type, owner: str | None) -> None:
        """Raise BusyError where an owner has as many rows as are kept."""
        if self._counts[kind].get(owner, 0) >= MOST[kind]:
            kept = f"{MOST[kind]:,} {kind.__name__.lower()}s of this key"
            raise BusyError(f"{kept} are kept; finish sessions: old ones without checkpoints go within a minute")

    def prune(self, now: float, stale: float, in_memory: Collection[str]) -> None:
        """Delete what is over. stale: seconds without a sign of life after which a session is over. in_memory: the
        unsaved samplers that can still be used. Call it from a thread."""
        for session in self.store.over(now - self.keep):
            self._remove(session)
        for kind, most in MOST.items():
            for owner, count in self.store.owners(kind).items():
                if count > FULL * most:
                    self._make_room(kind, owner, count - int(AIM * most), now - stale, in_memory)
        self._counts = self._counted()
        self.store.shrink()

    def _make_room(self, kind: type, owner: str | None, excess: int, before: float, in_memory: Collection[str]) -> None:
        """Delete an owner's sessions that are over, oldest first, and of samplers those whose weights are gone."""
        if kind is Sampler:
            for sampler in set(self.store.unsaved_samplers(owner, excess)).difference(in_memory):
                self.store.remove(Sampler, sampler)
        left = self.store.owners(kind).get(owner, 0) - int(AIM * MOST[kind])
        for session in self.store.over(before, Owner(owner, everything=False), ALL, finished=True):
            if left <= 0:
                return
            if rows := 1 if kind is Session else len(self.store.of_session(kind, session)):  # else it makes no room
                self._remove(session)
                left -= rows

    def _remove(self, session: str) -> None:
        with logged(f"session {session}"):  # which may just have come to life
            self.store.remove_session(session)

    def _counted(self) -> dict[type, dict[str | None, int]]:
        return {kind: self.store.owners(kind) for kind in MOST}
