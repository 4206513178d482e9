"""The one thread that makes all calls of a service's engines: jobs in order, and sampling that goes on between them.

Between two jobs every snapshot that is being sampled writes one token of each of its sequences, whoever asked for them,
and requests that have arrived meanwhile join. So no job waits for a sampling to end, and none waits for all jobs. Knows
nothing of training, of clients and of what a job does.

TODO The sampling requests of one snapshot: they wait, join its decoder, are told their tokens, and end or fail alone.

Futures are told here, and nowhere else, that a request is over. Knows no threads but that futures may be cancelled from
any, and no other snapshots.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from traceback import clear_frames
from typing import Any, TypeVar

from tinker import types

from kshot.errors import RequestError
from vlm.local.engine import Engine, Snapshot, groups, length_of
from vlm.local.sampling import sampler
from vlm.local.sampling.decoder import Decoder
from vlm.local.sampling.sampler import SamplingRequest, SamplingResult
from vlm.local.sampling.sequence import TokenSequence

# ---- The sampling requests of one snapshot: they wait, join its decoder, are told their tokens, and end or fail

OnToken = Callable[[TokenSequence], None]


@dataclass(eq=False)
class QueuedRequest:
    """A sampling request. answer: what is written for it, once its prompt has been read. error: why it has failed.

    Its future stays pending until there is a result, so that it can be cancelled at any time.
    """

    engine: Engine
    snapshot: Snapshot
    ask: SamplingRequest
    on_token: OnToken | None
    future: "Future[types.SampleResponse]" = field(default_factory=Future)
    answer: SamplingResult | None = None
    error: BaseException | None = None

    @property
    def brief(self) -> bool:
        """Whether reading the prompt is all it takes."""
        return self.ask.params.max_tokens == 1

    @property
    def writers(self) -> Sequence[TokenSequence]:
        return self.answer.writers if self.answer else ()

    def fits(self) -> bool:
        """Whether it can be asked, as far as that shows before the prompt is read; if not it has failed."""
        try:
            sampler.check(self.engine, self.ask)
        except Exception as error:
            self.fail(error)
        return self.error is None

    def fail(self, error: BaseException) -> None:
        clear_frames(error.__traceback__)  # they hold a pass's tensors, and the error may be kept for long
        self.error = error

    def tell(self, written: set[TokenSequence]) -> None:
        """Pass on who of its writers has got a token."""
        if self.on_token is None:
            return
        try:
            for writer in self.writers:
                if writer in written:
                    self.on_token(writer)
        except BaseException as error:
            self.fail(error)

    def settled(self) -> bool:
        """Whether it is over; then its future has been told, and its writers write no more."""
        if self.error is None and not self.future.cancelled() and not (self.answer and self.answer.done):
            return False
        for writer in self.writers:
            writer.end()
        if self.future.set_running_or_notify_cancel():
            response = self._response()
            if self.error is not None:
                self.future.set_exception(self.error)
            else:
                self.future.set_result(response)
        return True

    def _response(self) -> Any:
        """What was written; where that cannot be said the request fails, and no other."""
        try:
            return self.answer.response() if self.answer and self.error is None else None
        except Exception as error:
            self.fail(error)
            return None


class SnapshotBatch:
    """The requests of one snapshot: those that wait for a row, and those that are being written."""

    def __init__(self, engine: Engine, snapshot: Snapshot) -> None:
        self.decoder = Decoder(engine, snapshot, sampler.ROWS)
        self.waiting: deque[QueuedRequest] = deque()
        self._going: list[QueuedRequest] = []

    @property
    def empty(self) -> bool:
        return not (self.waiting or self._going)

    def take(self, request: QueuedRequest) -> None:
        """Let it wait for a row, if it can be asked at all."""
        if request.fits():
            self.waiting.append(request)
        else:
            request.settled()

    def turn(self) -> int:
        """Let those join for whom there is a row, and write one token of each sequence; says how many were written."""
        taken = self._taken()
        self._going += taken
        for members in groups([length_of(each.ask.prompt) for each in taken], sampler.ROWS, sampler.POSITIONS):
            self._join([taken[n] for n in members])
        first = {writer for each in taken for writer in each.writers}
        self._tell(first)
        written = self._step()
        self._tell(written)
        return len(first) + len(written)

    def _taken(self) -> list[QueuedRequest]:
        """Those of the waiting whose prompts are read now, in order: as many as find a row, and one pass's worth."""
        taken, left = list[QueuedRequest](), deque[QueuedRequest]()
        free, positions = self.decoder.free, sampler.POSITIONS
        for each in self.waiting:
            if each.settled():
                continue
            if len(taken) == sampler.ROWS or positions <= 0 or not (each.brief or free > 0):
                left.append(each)
                continue
            taken.append(each)
            positions -= length_of(each.ask.prompt)
            free -= 0 if each.brief else each.ask.num_samples
        self.waiting = left
        return taken

    def _join(self, requests: Sequence[QueuedRequest]) -> None:
        """Read their prompts, together if none of them fails."""
        try:
            answers = sampler.join(self.decoder, [each.ask for each in requests])
        except BaseException as error:
            if len(requests) == 1:
                requests[0].fail(error)
                return
            clear_frames(error.__traceback__)  # they hold the pass's tensors
        else:
            for each, answer in zip(requests, answers, strict=True):
                each.answer = answer
            return
        for each in requests:
            self._join([each])

    def _step(self) -> set[TokenSequence]:
        try:
            return set(self.decoder.step())
        except BaseException as error:
            for each in self._going:
                each.fail(error)
            self.decoder = Decoder(self.decoder.engine, self.decoder.snapshot, self.decoder.rows)
            return set()

    def _tell(self, written: set[TokenSequence]) -> None:
        for each in self._going:
            each.tell(written)
        self._going = [each for each in self._going if not each.settled()]


# ---- The one thread that makes all calls of a service's engines: jobs in order, and sampling that goes on

T = TypeVar("T")


@dataclass(frozen=True)
class SamplingTask:
    """A sampling request that is under way, in any thread. Who cancels its future cancels it."""

    future: "Future[types.SampleResponse]"

    def cancel(self) -> bool:
        """Give it up: its sequences leave the batch at the next token. False where the answer is already there."""
        return self.future.cancel()


class Scheduler:
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
        self._arrived: deque[QueuedRequest] = deque()
        self._lanes: dict[tuple[int, int], SnapshotBatch] = {}
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

    def sample(
        self, engine: Engine, snapshot: Snapshot, ask: SamplingRequest, on_token: OnToken | None = None
    ) -> SamplingTask:
        """What `sampling.sample` gives for this ask, written together with all else that is sampled meanwhile.

        on_token: called on the worker with the writer that has got a token, after each; what it raises fails this
        request alone. Raises as `submit`; the future raises RequestError and ImageError for what cannot be sampled.
        """
        request = QueuedRequest(engine, snapshot, ask, on_token)
        self._put(self._arrived, request)
        return SamplingTask(request.future)

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

    def _lane(self, request: QueuedRequest) -> SnapshotBatch:
        key = id(request.engine), id(request.snapshot)  # a lane holds both, so that no other gets their ids
        return self._lanes.setdefault(key, SnapshotBatch(request.engine, request.snapshot))


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
