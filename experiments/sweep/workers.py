"""Who runs the jobs of a sweep: worker processes side by side on this machine, or a Ray cluster's.

Knows nothing of what a job computes. On a CPU every worker computes on one thread unless told otherwise: the numbers of
a cell then do not depend on how many run beside it. A job that fails stops no other; a worker that dies takes its job
with it, which is tried once more, elsewhere.

TODO A worker process: one function called again and again, on jobs sent to it one by one. Knows no cell and no order.

It lives no longer than the parent's end of a pipe: closing it ends the process at once, whatever it is doing, and so
does the parent's death.
TODO Jobs on a Ray cluster: the one that Ray finds (RAY_ADDRESS, or one that was started on this machine), or a local one.

kshot, its data and its models must be where the nodes find them, at the same paths. A node or worker that is lost takes
no job with it: Ray starts it elsewhere. Answers come to this process alone, which hands each on once.
"""

import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from logging import CRITICAL, getLogger
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from traceback import format_exception
from typing import Any, Generic, TypeVar

from kshot.errors import InputError, KshotError

# ---- A worker process: one function called again and again, on jobs sent to it one by one. Knows no cell and no

J = TypeVar("J")
R = TypeVar("R")
CONTEXT = get_context("spawn")


@dataclass(frozen=True)
class Failure:
    """Why a job has no result. message: one line. exit_status: of the error (2: bad input). trace: where an error came
    from that is none of kshot's; empty for those that are. lost: whether its process died instead of answering."""

    message: str
    exit_status: int = KshotError.exit_status
    trace: str = ""
    lost: bool = False


class Worker(Generic[J, R]):
    """A process that calls `run`, which is picklable as its jobs are, on `threads` threads of torch.

    lifeline: the parent's pipe, whose other end the process watches. environment: set before any library is there.
    """

    def __init__(
        self, run: Callable[[J], R], watched: Connection, threads: int, environment: Mapping[str, str]
    ) -> None:
        self._job: J | None = None  # what it works on
        self.channel, theirs = CONTEXT.Pipe()
        given = run, theirs, watched, threads, dict(environment)
        self._process = CONTEXT.Process(target=_work, args=given, daemon=True)  # ended, not waited for, at exit
        with interrupts_held_back(), theirs:
            self._process.start()

    def give(self, job: J) -> None:
        """Send it a job; it must be idle."""
        self._job = job
        with suppress(OSError):  # it is dead, which `answer` says
            self.channel.send(job)

    def answer(self) -> R | Failure:
        """Wait for what it says of its job."""
        try:
            found: R | Failure = self.channel.recv()
        except (EOFError, OSError):
            self._process.join()
            status = self._process.exitcode
            how = signal.Signals(-status).name if status and status < 0 else f"status {status}"
            found = Failure(f"a worker process died ({how}; killed? out of memory?) with {self._job}", lost=True)
        return found

    def leave(self) -> None:
        """Let an idle process end in peace."""
        with suppress(OSError):
            self.channel.send(None)
        self._process.join()

    def end(self) -> None:
        """Wait for its end and let go of it; its lifeline is closed."""
        self._process.join()
        self.channel.close()
        self._process.close()


def answered(run: Callable[[J], R], job: J) -> R | Failure:
    """What `run` says of a job; an error as a Failure, which survives pickling whatever it was."""
    try:
        return run(job)
    except KshotError as error:
        return Failure(str(error), error.exit_status)
    except Exception as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        return Failure(line, trace="".join(format_exception(error)))


def settle(threads: int) -> None:
    """In a process that is to compute: its threads, and no progress bars of its own."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    import torch
    from transformers.utils import logging

    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    getLogger("huggingface_hub").setLevel(CRITICAL)  # its retries; what they end in is reported in one line


def end_with(watched: Connection) -> None:
    """End this process with the other end of the pipe, whatever it is doing."""
    watched.poll(None)  # nothing is ever sent: it returns when the other end is closed
    os._exit(1)


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Children born here never see Ctrl-C, which a terminal sends to all: the parent gets it, and ends them."""
    resource_tracker.ensure_running()  # the first child would start it, which lets interrupts through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(
    run: Callable[[Any], Any], channel: Connection, watched: Connection, threads: int, environment: dict[str, str]
) -> None:
    threading.Thread(target=end_with, args=(watched,), daemon=True).start()
    os.environ.update(environment)
    settle(threads)
    while (job := channel.recv()) is not None:
        channel.send_bytes(_sent(answered(run, job)))


def _sent(answer: Any) -> Any:
    """As `send` would pickle it; where it cannot be, that is the answer."""
    try:
        return ForkingPickler.dumps(answer)
    except Exception as error:
        return ForkingPickler.dumps(answered(_raise, error))


def _raise(error: Exception) -> None:
    raise error


# ---- Jobs on a Ray cluster: the one that Ray finds (RAY_ADDRESS, or one that was started on this machine), or a local one.

RETRIES = 3  # of a job whose worker or node is lost
MISSING = "Ray is not installed; install it with: pip install 'kshot[ray]', or leave --executor ray out"


def on_cluster(
    run: Callable[[J], R],
    jobs: Sequence[J],
    workers: int | None = None,
    *,
    first: Sequence[J] = (),
    threads: int = 1,
    gpu: bool = False,
) -> Generator[tuple[J, R | Failure], None, None]:
    """(job, result or Failure) as they finish, `workers` at a time (default: as many as the cluster has room for).

    A job takes `threads` CPUs, and a GPU where `gpu`. first: jobs that must be finished before any of `jobs` begins.
    However it ends, also when the iterator is closed, no job of this run goes on. Raises InputError without Ray,
    KshotError where the cluster cannot be reached or has no place for a job.
    """
    if not jobs and not first:
        return
    ray = _ray()
    with _connected(ray):
        _check_room(ray, threads, gpu)
        task = ray.remote(num_cpus=threads, num_gpus=int(gpu), max_retries=RETRIES, scheduling_strategy="SPREAD")(
            _ray_work
        )
        running: dict[Any, J] = {}
        try:
            for stage in (first, jobs):
                waiting = deque(stage)
                while waiting or running:
                    while waiting and (workers is None or len(running) < workers):
                        job = waiting.popleft()
                        running[task.remote(run, job, threads)] = job
                    for done in ray.wait([*running], num_returns=1)[0]:
                        yield running.pop(done), _answer(ray, done)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


def _ray_work(run: Callable[[J], R], job: J, threads: int) -> R | Failure:
    """In a worker of the cluster."""
    settle(threads)
    return answered(run, job)


def _answer(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.ObjectLostError) as lost:
        return Failure(f"lost in the Ray cluster, {RETRIES + 1} times: {_line(lost)}", lost=True)
    except ray.exceptions.RayError as error:  # kshot is not there, say, or the data
        return Failure(f"a node of the Ray cluster cannot run it: {_line(error)}", trace=str(error))


def _line(error: Exception) -> str:
    """What it ends in, without the colours of a terminal."""
    lines = [line.strip() for line in re.sub("\x1b\\[[0-9;]*m", "", str(error)).splitlines() if line.strip()]
    return " ".join([type(error).__name__, *lines[-1:]])[:300]


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise InputError(MISSING) from error
    return ray


@contextmanager
def _connected(ray: Any) -> Iterator[None]:
    """Within a cluster: the one this process is in already, or else one that is left again."""
    if ray.is_initialized():
        yield
        return
    try:
        ray.init(log_to_driver=False, logging_level="error", include_dashboard=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise KshotError(f"no Ray cluster: {' '.join(str(error).split())[:300]}; check RAY_ADDRESS") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_room(ray: Any, threads: int, gpu: bool) -> None:
    """A job that fits nowhere would wait for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= threads and node.get("GPU", 0) >= int(gpu) for node in nodes):
        what = f"{threads} CPUs{' and a GPU' if gpu else ''}"
        raise KshotError(
            f"no node of the Ray cluster has {what} for a worker; give fewer --threads or another --device"
        )


# ---- Who runs the jobs of a sweep: worker processes side by side on this machine, or a Ray cluster's.

Answers = Generator[tuple[J, R | Failure], None, None]
EXECUTORS = ("local", "ray")  # functions of this module
TRIES = 2  # of a job whose worker dies
LIBRARIES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def local(
    run: Callable[[J], R],
    jobs: Sequence[J],
    workers: int | None = None,
    *,
    first: Sequence[J] = (),
    threads: int = 1,
    gpus: Sequence[str] = (),
) -> Answers[J, R]:
    """(job, result or Failure) as they finish, with `workers` processes (default: as many as the cores have room for
    with `threads` each, or one a GPU; at most one a job).

    run and jobs must be picklable. first: jobs that must be finished before any of `jobs` begins. gpus: what
    CUDA_VISIBLE_DEVICES calls the GPUs that workers get, one each. However it ends, also when the iterator is closed,
    no worker is left.
    """
    room = len(gpus) or max(1, cores() // threads)
    count = min(workers or room, max(len(jobs), len(first)))
    if count == 0:
        return
    with _worker_pool(run, count, threads, gpus) as crew:
        yield from _JobScheduler(crew, first, jobs).all()


def ray(
    run: Callable[[J], R],
    jobs: Sequence[J],
    workers: int | None = None,
    *,
    first: Sequence[J] = (),
    threads: int = 1,
    gpus: Sequence[str] = (),
) -> Answers[J, R]:
    """The same on a Ray cluster: see `experiments.sweep.workers`. Raises InputError where Ray is not installed."""

    return on_cluster(run, jobs, workers, first=first, threads=threads, gpu=bool(gpus))


def cores() -> int:
    """Those this process may use; where the system cannot tell (macOS), all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(threads: int) -> dict[str, str]:
    """Read by the libraries when a worker starts: its threads, and one memory arena, which is enough for it."""
    return {**dict.fromkeys(LIBRARIES, str(threads)), "MALLOC_ARENA_MAX": "1"}


def results(answers: Answers[J, R]) -> Iterator[tuple[J, R]]:
    """The results of jobs of which none may fail. The first Failure ends the run and is raised, as InputError or
    KshotError."""
    with closing(answers):
        for job, answer in answers:
            if isinstance(answer, Failure):
                kind = InputError if answer.exit_status == InputError.exit_status else KshotError
                raise kind(answer.message)
            yield job, answer


class _WorkerPool:
    """The workers of a run. Of one that dies another takes the place, on the same GPU."""

    def __init__(self, make: Callable[[int], Worker[Any, Any]], count: int) -> None:
        self._make = make
        self.workers = [make(number) for number in range(count)]

    def replace(self, dead: Worker[Any, Any]) -> None:
        number = self.workers.index(dead)
        self.workers[number] = self._make(number)  # first: where that fails, all of the old ones are ended later
        dead.end()


@contextmanager
def _worker_pool(run: Callable[[J], R], count: int, threads: int, gpus: Sequence[str]) -> Iterator[_WorkerPool]:
    os.environ.update(environment(threads))  # a library reads it on being loaded, which a child does on its first line
    watched, lifeline = CONTEXT.Pipe(duplex=False)

    def make(number: int) -> Worker[J, R]:
        one = {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {}
        return Worker(run, watched, threads, one)

    with watched:
        crew: _WorkerPool | None = None
        try:
            crew = _WorkerPool(make, count)
            yield crew
            for worker in crew.workers:
                worker.leave()  # nothing runs: let the workers go in peace
        finally:
            lifeline.close()  # what still runs now is not wanted
            for worker in crew.workers if crew else ():
                worker.end()


@dataclass
class _Task(Generic[J]):
    """A job, whether others wait for it, and how often its worker has died."""

    job: J
    first: bool
    lost: int = 0


class _JobScheduler:
    """Which worker does what, and when."""

    def __init__(self, crew: _WorkerPool, first: Sequence[Any], jobs: Sequence[Any]) -> None:
        self._crew, self._at = crew, dict[Worker[Any, Any], _Task[Any]]()
        self._waiting = deque([*(_Task(job, True) for job in first), *(_Task(job, False) for job in jobs)])
        self._ahead = len(first)  # jobs that must be finished before the others begin

    def all(self) -> Answers[Any, Any]:
        while self._fill():
            busy: dict[Any, Worker[Any, Any]] = {worker.channel: worker for worker in self._at}
            for channel in wait([*busy]):
                task, answer = self._answer(busy[channel])
                if isinstance(answer, Failure) and answer.lost and task.lost < TRIES:
                    self._put_back(task)
                    continue
                self._ahead -= task.first
                yield task.job, answer

    def _fill(self) -> bool:
        """Give every idle worker a job, if one may begin; whether any is at work."""
        for worker in self._crew.workers:
            if worker not in self._at and self._waiting and (self._waiting[0].first or not self._ahead):
                self._at[worker] = self._waiting.popleft()
                worker.give(self._at[worker].job)
        return bool(self._at)

    def _answer(self, worker: Worker[Any, Any]) -> tuple[_Task[Any], Any]:
        task, answer = self._at.pop(worker), worker.answer()
        if isinstance(answer, Failure) and answer.lost:
            task.lost += 1
            self._crew.replace(worker)
        return task, answer

    def _put_back(self, task: _Task[Any]) -> None:
        """At once, where others wait for it; else at the end, when fewer run beside it."""
        (self._waiting.appendleft if task.first else self._waiting.append)(task)
