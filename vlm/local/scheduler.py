"""The one thread that makes all calls of a service's engines: jobs, those of a client in order and the clients in turn,
and sampling steps between them.

In a step every sequence that is being sampled gets one token, and requests that have arrived meanwhile join the batch
of their snapshot. So no job waits for a sampling request to end, and no request waits for all jobs. A job of several
passes gives way after each of them, and within a pass that takes long, between its layers. While there is something to
sample, it gets as much time as the job has had before, one step at least. Futures are completed here and nowhere else;
they may be cancelled from any thread.
"""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from traceback import clear_frames
from typing import Any, TypeVar

import torch
from tinker import types

from kshot.errors import RequestError
from vlm.local.engine import POSITIONS, ROWS, Engine, Snapshot, length_of
from vlm.local.packs import groups
from vlm.local.sampling import sampler
from vlm.local.sampling.decoder import TokenSequence
from vlm.local.sampling.sampler import SamplingRequest, SamplingResult

GIVE_WAY_AFTER = 0.05  # seconds of a pass; then others may sample between its layers
OnToken = Callable[[TokenSequence], None]


@dataclass(eq=False)
class QueuedRequest:
    """A sampling request that waits or runs. result: once its prompt has been read. error: why it has failed.

    Its future stays pending until there is a result, so that it can be cancelled at any time.
    """

    engine: Engine
    snapshot: Snapshot
    request: SamplingRequest
    on_token: OnToken | None
    future: Future[types.SampleResponse] = field(default_factory=Future)
    result: SamplingResult | None = None
    error: BaseException | None = None

    @property
    def prefill_only(self) -> bool:
        """Whether its samples are complete once the prompt has been read."""
        return self.request.params.max_tokens == 1

    @property
    def sequences(self) -> Sequence[TokenSequence]:
        return self.result.sequences if self.result else ()

    def fail(self, error: BaseException) -> None:
        clear_frames(error.__traceback__)  # they hold a pass's tensors, and the error may be kept for long
        self.error = error

    def notify(self, grown: set[TokenSequence]) -> None:
        """Call `on_token` with each of its sequences that has got a token."""
        if self.on_token is None or self.result is None:
            return
        try:
            self.result.check()
            for sequence in self.sequences:
                if sequence in grown:
                    self.on_token(sequence)
        except BaseException as error:
            self.fail(error)

    def finish_if_done(self) -> bool:
        """Whether it is over; then its future is completed and its sequences get no more tokens."""
        if self.error is None and not self.future.cancelled() and not (self.result and self.result.done):
            return False
        for sequence in self.sequences:
            sequence.end()
        if self.future.set_running_or_notify_cancel():
            try:
                if self.result and self.error is None:
                    self.future.set_result(self.result.response())
            except Exception as error:  # no response can be made of it: this request fails, and no other
                self.fail(error)
            if self.error is not None:
                self.future.set_exception(self.error)
        return True


class SnapshotBatch:
    """The requests of one snapshot: those that wait for a row of its decoder, and those that run."""

    def __init__(self, engine: Engine, snapshot: Snapshot) -> None:
        self.decoder = sampler.decoder_of(engine, snapshot, ROWS)
        self.waiting: deque[QueuedRequest] = deque()
        self._running: list[QueuedRequest] = []

    @property
    def empty(self) -> bool:
        return not (self.waiting or self._running)

    def add(self, request: QueuedRequest) -> None:
        """Queue a request; one of which it shows before its prompt is read that it cannot be sampled fails at once."""
        try:
            sampler.check(request.engine, request.request)
        except Exception as error:
            request.fail(error)
        if not request.finish_if_done():
            self.waiting.append(request)

    def step(self) -> int:
        """Prefill the requests for which there is a row, decode a token of each sequence; returns how many tokens."""
        admitted = self._admitted()
        self._running += admitted
        for members in groups([length_of(each.request.prompt) for each in admitted], ROWS, POSITIONS):
            self._prefill([admitted[n] for n in members])
        started = {sequence for each in admitted for sequence in each.sequences}
        self._notify(started)
        grown = self._decode()
        self._notify(grown)
        return len(started) + len(grown)

    def _admitted(self) -> list[QueuedRequest]:
        """Those of the waiting whose prompts are read now, in order: as many as find a row, and fit one pass."""
        admitted, left = list[QueuedRequest](), deque[QueuedRequest]()
        free, positions = self.decoder.free_rows, POSITIONS
        for each in self.waiting:
            if each.finish_if_done():
                continue
            if len(admitted) == ROWS or positions <= 0 or not (each.prefill_only or free > 0):
                left.append(each)
                continue
            admitted.append(each)
            positions -= length_of(each.request.prompt)
            free -= 0 if each.prefill_only else each.request.num_samples
        self.waiting = left
        return admitted

    def _prefill(self, requests: Sequence[QueuedRequest]) -> None:
        """Read their prompts, together if none of them fails."""
        try:
            results = sampler.prefill(self.decoder, [each.request for each in requests])
        except BaseException as error:
            if len(requests) == 1:
                requests[0].fail(error)
                return
            clear_frames(error.__traceback__)  # they hold the pass's tensors
        else:
            for each, result in zip(requests, results, strict=True):
                each.result = result
            return
        for each in requests:
            self._prefill([each])

    def _decode(self) -> set[TokenSequence]:
        try:
            return set(self.decoder.step())
        except BaseException as error:
            for each in self._running:
                each.fail(error)
            self.decoder = sampler.decoder_of(self.decoder.engine, self.decoder.snapshot, ROWS)
            return set()

    def _notify(self, grown: set[TokenSequence]) -> None:
        for each in self._running:
            each.notify(grown)
        self._running = [each for each in self._running if not each.finish_if_done()]


T = TypeVar("T")


@dataclass(eq=False)
class QueuedJob:
    """A call, of the job itself, that waits or runs. of: whose it is. until_claimed: whether it can be cancelled also
    while it runs, until `claim`; the future of any other is running from the beginning."""

    call: Callable[["QueuedJob"], Any]
    of: int = 0
    until_claimed: bool = False
    future: Future[Any] = field(default_factory=Future)
    _claimed: bool | None = None

    def claim(self) -> bool:
        """Whether it was not cancelled; from now on it cannot be."""
        if self._claimed is None:
            self._claimed = self.future.set_running_or_notify_cancel()
        return self._claimed

    def run(self) -> None:
        if (self.future.cancelled() or not self.until_claimed) and not self.claim():
            return
        try:
            result = self.call(self)
        except BaseException as error:
            if self.claim():
                self.future.set_exception(error)
        else:
            if self.claim():
                self.future.set_result(result)


class JobQueue:
    """Jobs of training and sampling clients: those of one client in order, and the clients in turn, so that nobody
    waits for all that another has sent."""

    def __init__(self) -> None:
        self._jobs = OrderedDict[int, deque[QueuedJob]]()

    def __len__(self) -> int:
        return sum(map(len, [*self._jobs.values()]))

    def append(self, job: QueuedJob) -> None:
        self._jobs.setdefault(job.of, deque()).append(job)

    def popleft(self) -> QueuedJob:
        of, jobs = self._jobs.popitem(last=False)
        job = jobs.popleft()
        if jobs:
            self._jobs[of] = jobs  # behind all others
        return job


class Scheduler:
    """One thread, for engines that are not safe to call from several.

    waiting_jobs, waiting_samples: requests that have not been started. active_sequences: that get a token in each
    step. tokens_sampled, busy_seconds: since the start. Other threads read them as they were a moment ago.
    before_step: called on the thread, before a job and the tokens that go with it.
    """

    def __init__(self) -> None:
        self.before_step: Callable[[], None] | None = None
        self.active_sequences, self.tokens_sampled = 0, 0
        self._busy = 0.0  # seconds of the steps that are over
        self._since: float | None = None  # when the present one began
        self._lock = threading.Lock()  # of what other threads put in
        self._jobs = JobQueue()
        self._first: deque[QueuedJob] = deque()
        self._resumed = 0.0  # when the present job began, or went on
        self._new_requests: deque[QueuedRequest] = deque()
        self._batches: dict[tuple[int, int], SnapshotBatch] = {}
        self._ident: int | None = None
        self._scheduled = self._closed = False
        # an executor ends its thread when the interpreter exits, or when nobody has the scheduler any more
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kshot-engine")

    @property
    def busy_seconds(self) -> float:
        """Also of the step that is not over: its results are out before it is."""
        busy, since = self._busy, self._since
        return busy if since is None else busy + time.perf_counter() - since

    def submit(self, call: Callable[..., T], *args: Any, of: object = None, **kwargs: Any) -> Future[T]:
        """A future of the call's result. of: the client whose job it is; a client's jobs run in the order in which they
        were submitted, and clients take turns.

        Raises RequestError on the scheduler's own thread, and after `close`.
        """
        return self._queued(self._jobs, QueuedJob(lambda _: call(*args, **kwargs), id(of)))

    def submit_passes(self, call: Callable[..., T], *args: Any, of: object = None, **kwargs: Any) -> Future[T]:
        """The same for a call of several passes: it gets `between` (see `vlm.local.engine.Between`) and is to call that
        after each. There others sample meanwhile; and a job whose future was cancelled ends there, by CancelledError.
        After the last pass it can no longer be cancelled. Raises as `submit`."""

        def run(job: QueuedJob) -> T:
            return call(*args, **kwargs, between=partial(self._between, job))

        return self._queued(self._jobs, QueuedJob(run, id(of), until_claimed=True))

    def submit_first(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> Future[T]:
        """The same for a call that depends on no other job, as what loads or makes something: it waits neither for the
        others nor for the end of one with several passes. Raises as `submit`."""
        return self._queued(self._first, QueuedJob(lambda _: call(*args, **kwargs)))

    def sample(
        self, engine: Engine, snapshot: Snapshot, request: SamplingRequest, on_token: OnToken | None = None
    ) -> Future[types.SampleResponse]:
        """What `sampler.sample` gives for this request, decoded in a batch with all else that is sampled meanwhile.

        on_token: called on the scheduler's thread with the sequence that has got a token, after each; what it raises
        fails this request alone. The future may be cancelled until there is a result, from any thread: then its
        sequences leave the batch at the next token. Raises as `submit`; the future raises RequestError and ImageError
        for what cannot be sampled.
        """
        queued = QueuedRequest(engine, snapshot, request, on_token)
        self._enqueue(self._new_requests, queued)
        return queued.future

    def close(self, wait: bool = True) -> None:
        """Accept no more requests; what was submitted is finished. wait: until it is."""
        with self._lock:
            self._closed = True
        self._thread.shutdown(wait)

    @property
    def waiting_jobs(self) -> int:
        return len(self._jobs) + len(self._first)

    @property
    def waiting_samples(self) -> int:
        return len(self._new_requests) + sum(len(batch.waiting) for batch in [*self._batches.values()])

    def _queued(self, queue: deque[QueuedJob] | JobQueue, job: QueuedJob) -> Future[Any]:
        self._enqueue(queue, job)
        return job.future

    def _enqueue(self, queue: deque[Any] | JobQueue, item: Any) -> None:
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
            while self._run_once():
                pass
        except BaseException:
            with self._lock:
                self._schedule()  # whatever it was, others wait
            raise

    def _run_once(self) -> bool:
        """One job, if there is any, and a token for everyone; says whether there was anything to do."""
        with self._lock:
            if not (self._jobs or self._first or self._new_requests or self._batches):
                self._scheduled = False
                return False
            job = self._jobs.popleft() if self._jobs else None
        self._since = self._resumed = start = time.perf_counter()
        if self.before_step is not None:
            self.before_step()
        if job is not None:
            job.run()
        self._give_way()
        self._busy, self._since = self._busy + time.perf_counter() - start, None
        return True

    def _between(self, job: QueuedJob, last: bool) -> None:
        """After a pass of a job. Raises CancelledError where its future was cancelled."""
        if not last:
            self._give_way()
        if (last or job.future.cancelled()) and not job.claim():
            raise CancelledError

    def between_layers(self) -> None:
        """Where a pass has gone on for GIVE_WAY_AFTER seconds, let those sample who wait. On the scheduler's thread."""
        if time.perf_counter() - self._resumed > GIVE_WAY_AFTER and (self._new_requests or self._batches):
            with torch.no_grad():
                self._give_way(self._sample)

    def _give_way(self, turn: Callable[[], bool] | None = None) -> None:
        """Let everyone have turns for as long as the present job has run since it last gave way, one at least."""
        turn, now = turn or self._turn, time.perf_counter()
        until = now + (now - self._resumed)
        while turn() and time.perf_counter() < until:
            pass
        self._resumed = time.perf_counter()

    def _turn(self) -> bool:
        """One of the jobs that go first, if there is any, and one token for everyone; says whether there is more."""
        with self._lock:
            job = self._first.popleft() if self._first else None
        if job is not None:
            job.run()
        return self._sample() or bool(self._first)

    def _sample(self) -> bool:
        """One token for everyone; says whether there is more."""
        with self._lock:
            new_requests = [*self._new_requests]
            self._new_requests.clear()
        for request in new_requests:
            self._batch_of(request).add(request)
        for key, batch in [*self._batches.items()]:
            self.tokens_sampled += batch.step()
            if batch.empty:
                del self._batches[key]
        self.active_sequences = sum(batch.decoder.active for batch in self._batches.values())
        return bool(self._new_requests or self._batches)

    def _batch_of(self, request: QueuedRequest) -> SnapshotBatch:
        key = id(request.engine), id(request.snapshot)  # a batch holds both, so that no other gets their ids
        return self._batches.setdefault(key, SnapshotBatch(request.engine, request.snapshot))
