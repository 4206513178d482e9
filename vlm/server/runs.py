"""The training runs in memory, each with a queue of operations that are started in order, however they arrive.

The SDK numbers a run's requests from 1 and may send them in another order: of a batch that it splits, the first part
comes last. Everything here runs on the event loop; the operations themselves run on the engine's thread.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from kshot.errors import BusyError, RequestError
from vlm.local.clients import LocalTrainingClient
from vlm.server.futures import Answer, error_answer

WAITING = 512  # unfinished requests of a run; one more where all others wait for it
GAP = 300.0  # seconds after which requests fail that wait for a number that does not come

Settle = Callable[[str, Answer], None]  # publishes the answer to a request id


class Operation(ABC):
    """What one request does with a training run."""

    @abstractmethod
    def run(self, client: LocalTrainingClient) -> Any:
        """Start the work; gives the SDK's future of it. What it raises is the answer to the request."""

    @abstractmethod
    def reply(self, result: Any) -> Answer:
        """The answer, from the result of the future."""


@dataclass
class LiveRun:
    """A run in memory. settle: called with the answer to each request; begun: with the id of each that starts. owner:
    its owner's name. steps: optimizer steps. loss, examples: summed since the last step. held: request id and operation
    by number, of those not started; calls: by request id, of those not done; cancelled: ids of held requests that are
    not to be started."""

    id: str
    session: str
    settle: Settle
    begun: Callable[[str], None]
    owner: str | None = None
    client: LocalTrainingClient | None = None
    failure: BaseException | None = None
    next_seq: int = 1
    last_request: float = field(default_factory=time.time)
    steps: int = 0
    loss: float = 0.0
    examples: int = 0
    held: dict[int, tuple[str, Operation]] = field(default_factory=dict)
    calls: "dict[str, Future[Any]]" = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)
    started: asyncio.Event = field(default_factory=asyncio.Event)

    def check(self, seq: int) -> None:
        """Raise RequestError for a number that was used, BusyError where too many wait. The next in order has room
        where nothing of the run is at the engine: all others wait for it."""
        if seq < self.next_seq or seq in self.held:
            raise RequestError(f"request {seq} of run {self.id} was made before; its next number is {self.next_seq}")
        if self.waiting >= WAITING and not self.needs(seq):
            raise BusyError(f"{WAITING} requests of run {self.id} are waiting; send this one again later")

    def needs(self, seq: int) -> bool:
        """Whether nothing goes on before a request of this number comes."""
        return seq == self.next_seq and not self.calls

    def add(self, seq: int, request_id: str, operation: Operation) -> None:
        """Queue an operation; it starts when all before it have started and the run's weights are there."""
        self.last_request = time.time()
        self.held[seq] = request_id, operation
        self._start_next()

    def begin(self, client: LocalTrainingClient) -> None:
        """The run's weights are there: start what is queued."""
        self.client = client
        self.started.set()
        self._start_next()

    def end(self, failure: BaseException) -> None:
        """The run is over, or could not be created: all that has not started fails with this error."""
        self.client, self.failure = None, failure
        self.started.set()
        self._fail_held(failure)
        for call in [*self.calls.values()]:
            call.cancel()

    def cancel(self, request_id: str) -> None:
        """Do not start a request, or end it after the pass that runs: then all gradients since the last step are
        dropped, so that no step is made with a part. What has not started is answered when its turn comes, as the
        requests behind it count on its number. An id that is none of the run's does nothing."""
        if (call := self.calls.get(request_id)) is not None:
            call.cancel()
        elif any(request_id == held for held, _ in self.held.values()):
            self.cancelled.add(request_id)

    def skip(self, now: float) -> None:
        """Where a number has not come for GAP seconds (a client that was stopped, an upload that was too large), fail
        what waits behind it and go on after that."""
        if self.held and self.next_seq not in self.held and self.client and now - self.last_request > GAP:
            missing, self.next_seq = self.next_seq, max(self.held) + 1
            message = f"request {missing} of run {self.id} never came; those after it are not made"
            self._fail_held(RequestError(message))

    @property
    def waiting(self) -> int:
        """Requests that are not finished."""
        return len(self.held) + len(self.calls)

    def _start_next(self) -> None:
        while self.client is not None and self.next_seq in self.held:
            request_id, operation = self.held.pop(self.next_seq)
            self.next_seq += 1
            self.begun(request_id)
            try:
                if request_id in self.cancelled:
                    self.cancelled.remove(request_id)
                    raise CancelledError
                call = operation.run(self.client).future()
            except Exception as error:  # of this request alone
                self.settle(request_id, error_answer(error))
                continue
            self.calls[request_id] = call
            asyncio.wrap_future(call).add_done_callback(partial(self._done, request_id, operation))

    def _done(self, request_id: str, operation: Operation, outcome: "asyncio.Future[Any]") -> None:
        del self.calls[request_id]
        try:
            answer = operation.reply(outcome.result())
        except asyncio.CancelledError:
            answer = error_answer(self.failure or CancelledError())
        except Exception as error:
            answer = error_answer(error)
        self.settle(request_id, answer)

    def _fail_held(self, failure: BaseException) -> None:
        held, self.held = list(self.held.values()), {}
        self.cancelled.clear()
        for request_id, _ in held:
            self.settle(request_id, error_answer(failure))
