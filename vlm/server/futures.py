"""Answers to requests that are accepted now and fetched later, and the HTTP status and body of errors.

A request has a key (the run or sampler, and its number there): sent twice, as clients do when a connection drops, it is
one request. Answers outlive connections, and the server's own end. Everything here runs on the event loop, but for
writing to the store, which a thread of its own does.
"""

import asyncio
import json
import logging
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from kshot.errors import (
    BusyError,
    DeniedError,
    EngineLostError,
    InputError,
    KshotError,
    LostError,
    MissingError,
    NotFiniteError,
    RequestError,
    TooLargeError,
    UnauthorizedError,
    UnsupportedError,
)
from vlm.server.limits.memory import ANSWERS, QUEUES, Reservation
from vlm.server.owners import Owner
from vlm.server.store import Store
from vlm.server.tables import Future as FutureRow

log = logging.getLogger("kshot.server")

JSON, PROTOBUF = "application/json", "application/x-protobuf"
INTERNAL = "the server failed; its log says more"
STATUS = (  # the first that fits
    (TooLargeError, 413),
    (UnauthorizedError, 401),
    (UnsupportedError, 415),
    (LostError, 410),
    (DeniedError, 403),
    (MissingError, 404),
    (BusyError, 429),
    (NotFiniteError, 422),  # clients would send again what gets a 5xx
    (InputError, 400),
)


@dataclass(frozen=True)
class Answer:
    """A finished request's answer. failed: whether it is an error."""

    content: bytes
    content_type: str = JSON
    failed: bool = False


def status_of(error: BaseException) -> int:
    """The HTTP status of an error that is answered at once."""
    return next((status for kind, status in STATUS if isinstance(error, kind)), 500)


def error_body(error: BaseException) -> dict[str, str]:
    """The Tinker protocol's form of an error: one line, and whose fault it is; of an unforeseen one no detail."""
    if isinstance(error, CancelledError):
        return {"error": "the request was cancelled", "category": "user"}
    message = str(error) if isinstance(error, (InputError, BusyError, EngineLostError)) else INTERNAL
    return {"error": message, "category": "user" if isinstance(error, InputError) else "server"}


def json_answer(value: Any, *, failed: bool = False) -> Answer:
    """An answer in JSON."""
    return Answer(json.dumps(value, separators=(",", ":"), allow_nan=False).encode(), failed=failed)


def error_answer(error: BaseException) -> Answer:
    """An answer that says what went wrong. What nobody meant to raise is logged: the answer says nothing of it."""
    if not isinstance(error, KshotError | CancelledError):
        log.error("a request failed", exc_info=error)
    return json_answer(error_body(error), failed=True)


@dataclass(frozen=True)
class _Kept:
    """A request in memory. taken: what it and then its answer take. owner: its owner's name."""

    key: str
    taken: Reservation
    owner: str | None
    answer: "asyncio.Future[Answer]"


class Futures:
    """The answers: those that are pending or not written yet are in memory, all others in the store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._kept, self._ids = dict[str, _Kept](), dict[str, str]()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="kshot-answers")
        self._stopping = asyncio.Event()
        self._unwritten: list[str] = []  # finished, and the store did not take the answer

    @property
    def sizes(self) -> list[int]:
        """Bytes that each request takes that has no answer yet."""
        return [each.taken.size for each in [*self._kept.values()] if not each.answer.done()]

    def id_of(self, key: str, owner: Owner) -> str | None:
        """The id of the request that has this key, if there is one that this owner reaches."""
        known = self._known(key)
        return known[0] if known and owner.reaches(known[1]) else None

    def _known(self, key: str) -> tuple[str, str | None] | None:
        """The id and the owner of the request that has this key."""
        if key in self._ids:
            return self._ids[key], self._kept[self._ids[key]].owner
        row = self._store.future_of(key)
        return None if row is None else (row.request_id, row.owner)

    def open(self, key: str, owner: Owner, taken: Reservation) -> str:
        """The id of a new request. taken: what it takes until it is answered, and its answer then; it is handed over.
        Raises RequestError where the key is used: by another owner of what is everybody's, since `id_of` finds one's
        own."""
        if self._known(key) is not None:
            raise RequestError(f"request {key} was made with another API key; take the next number")
        request_id = self._ids[key] = uuid.uuid4().hex
        self._kept[request_id] = _Kept(key, taken.hand_over(), owner.name, asyncio.get_running_loop().create_future())
        return request_id

    def begun(self, request_id: str) -> None:
        """A request that was held has begun: it goes away by itself."""
        self._kept[request_id].taken.become(QUEUES, forced=True)

    def pending(self, owner: Owner) -> set[str]:
        """The ids of all requests of this owner that have no answer yet."""
        kept = self._kept.items()
        return {name for name, each in kept if owner.reaches(each.owner) and not each.answer.done()}

    def finish(self, request_id: str, answer: Answer) -> None:
        """Publish the answer to a request, once, and write it to the store."""
        if self._stopping.is_set() and answer.failed:  # what is dropped may be sent again to the next server
            return
        kept = self._kept[request_id]
        kept.answer.set_result(answer)
        kept.taken.become(ANSWERS, len(answer.content), forced=True)
        self._write_answers([request_id])

    def write_again(self) -> None:
        """Write the answers that the store did not take, as on a full disk: there may be room by now."""
        unwritten = self._unwritten[:]
        self._unwritten.clear()
        self._write_answers(unwritten)

    def _write_answers(self, request_ids: Sequence[str]) -> None:
        """In this order, until the store does not take one; those stay in memory, where they can be fetched."""
        left, loop = deque(request_ids), asyncio.get_running_loop()

        def write() -> None:
            try:
                while left:
                    kept = self._kept[left[0]]
                    answer = kept.answer.result()
                    status = "failed" if answer.failed else "finished"
                    row = left[0], kept.key, answer.content_type, answer.content, status, kept.owner
                    self._store.finish_future(*row)
                    loop.call_soon_threadsafe(self._forget, left.popleft())
            finally:
                left.rotate(-1)  # one that is never taken stands in no other's way
                loop.call_soon_threadsafe(self._unwritten.extend, left)

        self._write(write)

    async def wait(self, request_id: str, seconds: float, owner: Owner) -> Answer | None:
        """The answer once it is there; None after so many seconds, or when the server stops. Raises LostError where
        there is no such request that this owner reaches."""
        kept = self._kept.get(request_id)
        if kept is not None and owner.reaches(kept.owner):
            stop = asyncio.ensure_future(self._stopping.wait())
            either: list[asyncio.Future[Any]] = [kept.answer, stop]
            await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            stop.cancel()
            return kept.answer.result() if kept.answer.done() else None
        row = self._store.get(FutureRow, request_id, owner)
        if row is None:
            raise LostError(
                f"request {request_id!r} is unknown: it was not finished when the server ended, or dropped since"
            )
        return Answer(row.payload, row.content_type, row.status == "failed")

    def retrieved(self, request_id: str) -> None:
        """Note in the store that the answer has been sent."""
        self._write(lambda: self._store.mark_retrieved(request_id), "that an answer was sent is not noted")

    def stop(self) -> None:
        """End all waiting."""
        self._stopping.set()

    def close(self) -> None:
        """Finish writing to the store."""
        self._writer.shutdown()

    def _write(self, call: Callable[[], Any], failing: str = "answers stay in memory, and are written later") -> None:
        def logged() -> None:
            try:
                call()
            except KshotError as error:
                log.error("%s; %s", str(error), failing)  # not the error itself, which holds the answer
            except Exception:
                log.exception(failing)

        try:
            self._writer.submit(logged)
        except RuntimeError:  # the server has ended
            return

    def _forget(self, request_id: str) -> None:
        kept = self._kept.pop(request_id)
        kept.taken.release()
        del self._ids[kept.key]
