"""One training run of a client: its requests by their numbers, made in order however they arrive.

The SDK numbers a run's requests from 1 and may send them in another order: of a batch that it splits, the first part
comes last. Everything here runs on the event loop; the calls themselves run on the engine's worker. Knows no HTTP.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from kshot.errors import BusyError, RequestError
from vlm.local.clients import LocalTrainingClient
from vlm.server.futures import Answer, error_answer, outcome

WAITING = 512  # requests of a run that may wait, beside the one that is its next
GAP = 300.0  # seconds for which those that came wait for one before them that does not

Settle = Callable[[str, Answer], None]  # how a request's answer is made known


@dataclass(frozen=True)
class Operation:
    """A request. call: what is done with the run. answer: what the result is answered with, and noted."""

    request_id: str
    call: Callable[[LocalTrainingClient], "Future[Any]"]
    answer: Callable[[Any], Answer]


@dataclass
class LiveRun:
    """A run in memory. settle: called with each request's answer.

    steps, loss, examples: optimizer steps, and what was gathered since the last one. held: requests whose turn has not
    come; calls: those that the worker has.
    """

    id: str
    session: str
    settle: Settle
    client: LocalTrainingClient | None = None
    failure: BaseException | None = None
    next_seq: int = 1
    last_request: float = field(default_factory=time.time)
    steps: int = 0
    loss: float = 0.0
    examples: int = 0
    held: dict[int, Operation] = field(default_factory=dict)
    calls: "set[Future[Any]]" = field(default_factory=set)
    started: asyncio.Event = field(default_factory=asyncio.Event)

    def begin(self, client: LocalTrainingClient) -> None:
        """The run's weights are there: make what has been asked for meanwhile."""
        self.client = client
        self.started.set()
        self._go_on()

    def end(self, failure: BaseException) -> None:
        """There is no run, or none any more: whoever waits for it is told why, and what has not begun is not made."""
        self.client, self.failure = None, failure
        self.started.set()
        self._fail_held(failure)
        for call in [*self.calls]:
            call.cancel()

    def skip(self, now: float) -> None:
        """Where a number has not come for GAP seconds (a client that was stopped, an upload that was too large), fail
        what waits behind it and go on after that."""
        if self.held and self.next_seq not in self.held and self.client and now - self.last_request > GAP:
            missing, self.next_seq = self.next_seq, max(self.held) + 1
            told = f"request {missing} of run {self.id} never came; those after it are not made"
            self._fail_held(RequestError(told))

    def check(self, seq: int) -> None:
        """Raise RequestError for a number that was used, BusyError where too many wait. The next in order always has
        room: all others wait for it."""
        if seq < self.next_seq or seq in self.held:
            raise RequestError(f"request {seq} of run {self.id} was made before; its next number is {self.next_seq}")
        if seq != self.next_seq and self.waiting >= WAITING:
            raise BusyError(f"{WAITING} requests of run {self.id} are waiting; send this one again later")

    def add(self, seq: int, operation: Operation) -> None:
        """Make a request when its turn has come."""
        self.last_request = time.time()
        self.held[seq] = operation
        self._go_on()

    @property
    def waiting(self) -> int:
        """Requests that are not finished."""
        return len(self.held) + len(self.calls)

    def _fail_held(self, failure: BaseException) -> None:
        waiting, self.held = list(self.held.values()), {}
        for operation in waiting:
            self.settle(operation.request_id, error_answer(failure))

    def _go_on(self) -> None:
        while self.client is not None and self.next_seq in self.held:
            operation = self.held.pop(self.next_seq)
            self.next_seq += 1
            try:
                future = operation.call(self.client)
            except Exception as error:  # it is this request's, and its answer
                self.settle(operation.request_id, error_answer(error))
                continue
            self.calls.add(inner(future))
            when_done(future, partial(self._done, operation, inner(future)))

    def _done(self, operation: Operation, call: "Future[Any]", result: Any) -> None:
        self.calls.discard(call)
        if isinstance(result, CancelledError) and self.failure is not None:
            result = self.failure
        self.settle(operation.request_id, answered(operation.answer, result))


def answered(answer: Callable[[Any], Answer], result: Any) -> Answer:
    """What a result is answered with; an exception, also one of `answer`'s own, as the error it is."""
    if isinstance(result, BaseException):
        return error_answer(result)
    try:
        return answer(result)
    except Exception as error:
        return error_answer(error)


def when_done(future: Any, call: Callable[[Any], None]) -> None:
    """Call with the outcome of a worker's future, on this event loop, unless the loop has ended."""
    loop = asyncio.get_running_loop()

    def hand_over(done: "Future[Any]") -> None:
        try:
            loop.call_soon_threadsafe(lambda: call(outcome(done)))
        except RuntimeError:  # the server is gone; what is kept is in the store
            return

    inner(future).add_done_callback(hand_over)


def inner(future: Any) -> "Future[Any]":
    """What the SDK's awaitable wraps."""
    return future.future() if hasattr(future, "future") else future
