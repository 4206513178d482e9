"""The one thread that makes all calls of a service's engines: jobs in order, and sampling that goes on between them.

Between two jobs every snapshot that is being sampled writes one token of each of its sequences, whoever asked for them,
and requests that have arrived meanwhile join. So no job waits for a sampling to end, and none waits for all jobs. Knows
nothing of training, of clients and of what a job does.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from tinker import types

from kshot_errors import RequestError
from vlm.local.engine import Engine, Snapshot
from vlm.local.lane import Lane, OnToken, Request
from vlm.local.sampling import Ask

T = TypeVar("T")


@dataclass(frozen=True)
class Sampling:
    """A sampling request that is under way, in any thread. Who cancels its future cancels it."""

    future: "Future[types.SampleResponse]"

    def cancel(self) -> bool:
        """Give it up: its sequences leave the batch at the next token. False where the answer is already there."""
        return self.future.cancel()


class Worker:
    """One thread, for engines that are not safe to call from several.

    waiting_jobs, waiting_samples: requests that nothing has been done for yet. active_sequences: that are being
    written. tokens_sampled, busy_seconds: since the start. Other threads read them as they were a moment ago.
    """

    def __init__(self) -> None:
        self.active_sequences, self.tokens_sampled = 0, 0
        self._busy = 0.0  # seconds of the turns that are over
        self._since: float | None = None  # when the present one began
        self._lock = threading.Lock()  # of what other threads put in
        self._jobs: deque[Callable[[], None]] = deque()
        self._arrived: deque[Request] = deque()
        self._lanes: dict[tuple[int, int], Lane] = {}
        self._ident: int | None = None
        self._scheduled = self._closed = False
        # an executor ends its thread when the interpreter exits, or when nobody has the worker any more
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kshot-engine")

    @property
    def busy_seconds(self) -> float:
        """Also of the turn that is not over: its answers are out before it is."""
        busy, since = self._busy, self._since
        return busy if since is None else busy + time.perf_counter() - since

    def submit(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> "Future[T]":
        """A future of the call's result; jobs run one by one in the order in which they were submitted.

        Raises RequestError on the worker's own thread, and after `close`.
        """
        future: Future[T] = Future()
        self._put(self._jobs, partial(_run, future, partial(call, *args, **kwargs)))
        return future

    def sample(self, engine: Engine, snapshot: Snapshot, ask: Ask, on_token: OnToken | None = None) -> Sampling:
        """What `sampling.sample` gives for this ask, written together with all else that is sampled meanwhile.

        on_token: called on the worker with the writer that has got a token, after each; what it raises fails this
        request alone. Raises as `submit`; the future raises RequestError and ImageError for what cannot be sampled.
        """
        request = Request(engine, snapshot, ask, on_token)
        self._put(self._arrived, request)
        return Sampling(request.future)

    def close(self, wait: bool = True) -> None:
        """Take no more; what was submitted is finished. wait: until it is."""
        with self._lock:
            self._closed = True
        self._thread.shutdown(wait)

    @property
    def waiting_jobs(self) -> int:
        return len(self._jobs)

    @property
    def waiting_samples(self) -> int:
        return len(self._arrived) + sum(len(lane.waiting) for lane in [*self._lanes.values()])

    def _put(self, queue: deque[Any], item: Any) -> None:
        if self._ident == threading.get_ident():
            raise RequestError("a custom loss cannot ask its own service: the answer would wait for the loss itself")
        with self._lock:
            if not (self._closed or self._scheduled):
                self._schedule()
            if self._closed:
                raise RequestError("the service is closed; connect again")
            queue.append(item)

    def _schedule(self) -> None:
        try:
            self._thread.submit(self._work)
            self._scheduled = True
        except RuntimeError:  # the interpreter is ending
            self._closed = True

    def _work(self) -> None:
        """Until nothing is left to do."""
        self._ident = threading.get_ident()
        try:
            while self._turn():
                pass
        except BaseException:
            with self._lock:
                self._schedule()  # whatever it was, others wait
            raise

    def _turn(self) -> bool:
        """One job, if there is any, and one token for everyone; says whether there was anything to do."""
        with self._lock:
            if not (self._jobs or self._arrived or self._lanes):
                self._scheduled = False
                return False
            job = self._jobs.popleft() if self._jobs else None
            arrived = [*self._arrived]
            self._arrived.clear()
        self._since = start = time.perf_counter()
        for request in arrived:
            self._lane(request).take(request)
        if job is not None:
            job()
        for key, lane in [*self._lanes.items()]:
            self.tokens_sampled += lane.turn()
            if lane.empty:
                del self._lanes[key]
        self.active_sequences = sum(lane.decoder.going for lane in self._lanes.values())
        self._busy, self._since = self._busy + time.perf_counter() - start, None
        return True

    def _lane(self, request: Request) -> Lane:
        key = id(request.engine), id(request.snapshot)  # a lane holds both, so that no other gets their ids
        return self._lanes.setdefault(key, Lane(request.engine, request.snapshot))


def _run(future: "Future[T]", call: Callable[[], T]) -> None:
    """A job: the call, unless its future was cancelled."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
