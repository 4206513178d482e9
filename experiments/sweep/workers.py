"""Runs the jobs of a sweep: in worker processes side by side on this machine, or on a Ray cluster.

On a CPU every worker computes on one thread unless more are asked for: the numbers of a cell then do not depend on how
many run beside it. A job that fails stops no other. Where a worker dies, its job is tried once more.

A worker process watches a pipe from its parent: when the parent closes it, or dies, the worker ends at once. Jobs on
Ray go to the cluster that Ray finds (RAY_ADDRESS, or one started on this machine), or to a local one; kshot, its data
and its models must be at the same paths on every node. Ray starts the job of a lost node elsewhere.
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

J = TypeVar("J")
R = TypeVar("R")
CONTEXT = get_context("spawn")
EXECUTORS = ("local", "ray")  # functions of this module
TRIES = 2  # of a job whose worker dies
LIBRARIES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
RETRIES = 3  # of a job whose worker or node is lost
MISSING = "Ray is not installed; install it with: pip install 'kshot[ray]', or leave --executor ray out"


@dataclass(frozen=True)
class Failure:
    """Why a job has no result. message: one line. exit_status: of the error (2: bad input). trace: of an error that
    kshot does not raise on purpose, else empty. lost: whether its process died instead of giving a result."""

    message: str
    exit_status: int = KshotError.exit_status
    trace: str = ""
    lost: bool = False


Answers = Generator[tuple[J, R | Failure], None, None]  # (job, result), each when it is finished


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
    with _worker_pool(run, count, threads, gpus) as pool:
        yield from _JobScheduler(pool, first, jobs).all()


def ray(
    run: Callable[[J], R],
    jobs: Sequence[J],
    workers: int | None = None,
    *,
    first: Sequence[J] = (),
    threads: int = 1,
    gpus: Sequence[str] = (),
) -> Answers[J, R]:
    """(job, result or Failure) as they finish, `workers` at a time (default: as many as the cluster has room for).

    A job takes `threads` CPUs, and a GPU where there are `gpus`. first: jobs that must be finished before any of `jobs`
    begins. However it ends, also when the iterator is closed, no job of this run goes on. Raises InputError without
    Ray, KshotError where the cluster cannot be reached or has no place for a job.
    """
    if not jobs and not first:
        return
    library, gpu = _ray(), bool(gpus)
    with _connected(library):
        _check_room(library, threads, gpu)
        task = library.remote(num_cpus=threads, num_gpus=int(gpu), max_retries=RETRIES, scheduling_strategy="SPREAD")(
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
                    for done in library.wait([*running], num_returns=1)[0]:
                        yield running.pop(done), _ray_result(library, done)
        finally:
            for reference in running:
                library.cancel(reference, force=True)


def _ray_work(run: Callable[[J], R], job: J, threads: int) -> R | Failure:
    """In a worker of the cluster."""
    prepare_process(threads)
    return call(run, job)


def _ray_result(ray: Any, reference: Any) -> Any:
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
    """Within a cluster: the one that this process is in already, or one that it leaves at the end."""
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
        needed = f"{threads} CPUs{' and a GPU' if gpu else ''}"
        raise KshotError(
            f"no node of the Ray cluster has {needed} for a worker; give fewer --threads or another --device"
        )


def cores() -> int:
    """The cores that this process may use; all, where the system does not say (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(threads: int) -> dict[str, str]:
    """Read by the libraries when a worker starts: its threads, and one memory arena, which is enough for it."""
    return {**dict.fromkeys(LIBRARIES, str(threads)), "MALLOC_ARENA_MAX": "1"}


def results(answers: Answers[J, R]) -> Iterator[tuple[J, R]]:
    """The results of jobs of which none may fail. The first Failure ends the run and is raised, as InputError or
    KshotError."""
    with closing(answers):
        for job, result in answers:
            if isinstance(result, Failure):
                kind = InputError if result.exit_status == InputError.exit_status else KshotError
                raise kind(result.message)
            yield job, result


class Worker(Generic[J, R]):
    """A process that calls `run`, which is picklable as its jobs are, on `threads` threads of torch.

    watched: the process ends when the other end of this pipe is closed. environment: set before any library is loaded.
    """

    def __init__(
        self, run: Callable[[J], R], watched: Connection, threads: int, environment: Mapping[str, str]
    ) -> None:
        self._job: J | None = None  # what it works on
        self.channel, theirs = CONTEXT.Pipe()
        arguments = run, theirs, watched, threads, dict(environment)
        self._process = CONTEXT.Process(target=_work, args=arguments, daemon=True)  # ended, not waited for, at exit
        with interrupts_blocked(), theirs:
            self._process.start()

    def start(self, job: J) -> None:
        """Send it a job; it must be idle."""
        self._job = job
        with suppress(OSError):  # it is dead, which `result` reports
            self.channel.send(job)

    def result(self) -> R | Failure:
        """Wait for the result of its job."""
        try:
            result: R | Failure = self.channel.recv()
        except (EOFError, OSError):
            self._process.join()
            status = self._process.exitcode
            end = signal.Signals(-status).name if status and status < 0 else f"status {status}"
            result = Failure(f"a worker process died ({end}; killed? out of memory?) with {self._job}", lost=True)
        return result

    def stop(self) -> None:
        """Let an idle process end by itself."""
        with suppress(OSError):
            self.channel.send(None)
        self._process.join()

    def close(self) -> None:
        """Wait for its end and free it; the pipe that it watches is closed before."""
        self._process.join()
        self.channel.close()
        self._process.close()


class _WorkerPool:
    """The workers of a run. Of one that dies another takes the place, on the same GPU."""

    def __init__(self, make: Callable[[int], Worker[Any, Any]], count: int) -> None:
        self._make = make
        self.workers = [make(number) for number in range(count)]

    def replace(self, dead: Worker[Any, Any]) -> None:
        number = self.workers.index(dead)
        self.workers[number] = self._make(number)  # first: where that fails, all of the old ones are ended later
        dead.close()


@contextmanager
def _worker_pool(run: Callable[[J], R], count: int, threads: int, gpus: Sequence[str]) -> Iterator[_WorkerPool]:
    os.environ.update(environment(threads))  # a library reads it on being loaded, which a child does on its first line
    watched, parent_end = CONTEXT.Pipe(duplex=False)

    def make(number: int) -> Worker[J, R]:
        gpu = {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {}
        return Worker(run, watched, threads, gpu)

    with watched:
        pool: _WorkerPool | None = None
        try:
            pool = _WorkerPool(make, count)
            yield pool
            for worker in pool.workers:
                worker.stop()
        finally:
            parent_end.close()  # ends the workers that still run
            for worker in pool.workers if pool else ():
                worker.close()


@dataclass
class _Task(Generic[J]):
    """A job, whether others wait for it, and how often its worker has died."""

    job: J
    first: bool
    lost: int = 0


class _JobScheduler:
    """Gives the jobs to the workers of a pool."""

    def __init__(self, pool: _WorkerPool, first: Sequence[Any], jobs: Sequence[Any]) -> None:
        self._pool, self._running = pool, dict[Worker[Any, Any], _Task[Any]]()
        self._pending = deque([*(_Task(job, True) for job in first), *(_Task(job, False) for job in jobs)])
        self._unfinished_first = len(first)  # jobs that must be finished before the others begin

    def all(self) -> Answers[Any, Any]:
        while self._fill():
            busy: dict[Any, Worker[Any, Any]] = {worker.channel: worker for worker in self._running}
            for channel in wait([*busy]):
                task, result = self._result(busy[channel])
                if isinstance(result, Failure) and result.lost and task.lost < TRIES:
                    self._put_back(task)
                    continue
                self._unfinished_first -= task.first
                yield task.job, result

    def _fill(self) -> bool:
        """Give every idle worker a job, if one may begin; whether any is at work."""
        for worker in self._pool.workers:
            if worker not in self._running and self._pending and (self._pending[0].first or not self._unfinished_first):
                self._running[worker] = self._pending.popleft()
                worker.start(self._running[worker].job)
        return bool(self._running)

    def _result(self, worker: Worker[Any, Any]) -> tuple[_Task[Any], Any]:
        task, result = self._running.pop(worker), worker.result()
        if isinstance(result, Failure) and result.lost:
            task.lost += 1
            self._pool.replace(worker)
        return task, result

    def _put_back(self, task: _Task[Any]) -> None:
        """At once, where others wait for it; else at the end, when fewer run beside it."""
        (self._pending.appendleft if task.first else self._pending.append)(task)


def call(run: Callable[[J], R], job: J) -> R | Failure:
    """The result of `run`; an error as a Failure, which can be pickled whatever it was."""
    try:
        return run(job)
    except KshotError as error:
        return Failure(str(error), error.exit_status)
    except Exception as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        return Failure(line, trace="".join(format_exception(error)))


def prepare_process(threads: int) -> None:
    """Set the threads of a process that computes, and turn off progress bars of its libraries."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    import torch
    from transformers.utils import logging

    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    getLogger("huggingface_hub").setLevel(CRITICAL)  # its retries; what they end in is reported in one line


def exit_with(watched: Connection) -> None:
    """End this process with the other end of the pipe, whatever it is doing."""
    watched.poll(None)  # nothing is ever sent: it returns when the other end is closed
    os._exit(1)


@contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Children started here never get Ctrl-C, which a terminal sends to all: the parent gets it, and ends them."""
    resource_tracker.ensure_running()  # the first child would start it, which lets interrupts through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(
    run: Callable[[Any], Any], channel: Connection, watched: Connection, threads: int, environment: dict[str, str]
) -> None:
    threading.Thread(target=exit_with, args=(watched,), daemon=True).start()
    os.environ.update(environment)
    prepare_process(threads)
    while (job := channel.recv()) is not None:
        channel.send_bytes(_pickled(call(run, job)))


def _pickled(result: Any) -> Any:
    """As `send` would pickle it; where that fails, the Failure."""
    try:
        return ForkingPickler.dumps(result)
    except Exception as error:
        return ForkingPickler.dumps(call(_raise, error))


def _raise(error: Exception) -> None:
    raise error
