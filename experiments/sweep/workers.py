"""Runs the jobs of a sweep: in worker processes side by side on this machine, or on a Ray cluster.

On a CPU every worker computes on one thread unless more are asked for: the numbers of a cell then do not depend on how
many run beside it. A job that fails stops no other. A worker that dies has its job tried once more; one whose parent
dies ends at once. Jobs on Ray go to the cluster that Ray finds (RAY_ADDRESS, or one started on this machine), or to a
local one; kshot, its data and its models must be at the same paths on every node. Ray starts the job of a lost node
elsewhere.
"""

import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
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
    started: Callable[[J], None] | None = None,
) -> Answers[J, R]:
    """(job, result or Failure) as they finish, with `workers` processes (default: as many as the cores have room for
    with `threads` each, or one a GPU; at most one a job). However it ends, no worker is left. run and jobs must be
    picklable. first: jobs that must be finished before any of `jobs` begins. gpus: what CUDA_VISIBLE_DEVICES calls the
    GPUs that workers get, one or several each. started: called in this process with each job that begins."""
    room = len(gpus) or max(1, cores() // threads)
    count = min(workers or room, max(len(jobs), len(first)))
    if count == 0:
        return
    with _worker_pool(run, count, threads, gpus) as (pool, replace):
        for stage in (first, jobs):
            pending, running = deque((job, 1) for job in stage), dict[Worker[J, R], tuple[J, int]]()
            while pending or running:
                for worker in pool:
                    if pending and worker not in running:
                        running[worker] = pending.popleft()
                        worker.start(running[worker][0])
                        if started:
                            started(running[worker][0])
                busy: dict[Any, Worker[J, R]] = {worker.channel: worker for worker in running}
                for channel in wait([*busy]):
                    worker = busy[channel]
                    (job, tries), result = running.pop(worker), worker.result()
                    lost = isinstance(result, Failure) and result.lost
                    if lost:
                        replace(worker)
                    if lost and tries < TRIES:
                        pending.append((job, tries + 1))  # at the end, when fewer run beside it
                    else:
                        yield job, result


def ray(
    run: Callable[[J], R],
    jobs: Sequence[J],
    workers: int | None = None,
    *,
    first: Sequence[J] = (),
    threads: int = 1,
    gpus: Sequence[str] = (),
    started: Callable[[J], None] | None = None,
) -> Answers[J, R]:
    """As `local`, on a cluster: `workers` jobs at a time (default: as many as it has room for). A job takes `threads`
    CPUs, and as many GPUs of one node as each of `gpus` names. However it ends, no job of this run goes on. Raises
    InputError without Ray, KshotError where the cluster cannot be reached or has no place for a job."""
    if not jobs and not first:
        return
    gpu = len(gpus[0].split(",")) if gpus else 0
    with _cluster() as library:
        _check_room(library, threads, gpu)
        remote = library.remote(num_cpus=threads, num_gpus=gpu, max_retries=RETRIES, scheduling_strategy="SPREAD")
        task, running = remote(_ray_work), dict[Any, J]()
        try:
            for stage in (first, jobs):
                waiting = deque(stage)
                while waiting or running:
                    while waiting and (workers is None or len(running) < workers):
                        job = waiting.popleft()
                        running[task.remote(run, job, threads)] = job
                        if started and workers:  # without a number all are sent at once, and the cluster lets them wait
                            started(job)
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


@contextmanager
def _cluster() -> Iterator[Any]:
    """Ray, within a cluster: the one that this process is in already, or one that it leaves at the end."""
    try:
        ray: Any = import_module("ray")
    except ImportError as error:
        way_out = "install it with: pip install 'kshot[ray]', or leave --executor ray out"
        raise InputError(f"Ray is not installed; {way_out}") from error
    if ray.is_initialized():
        yield ray
        return
    try:
        ray.init(log_to_driver=False, logging_level="error", include_dashboard=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise KshotError(f"no Ray cluster: {' '.join(str(error).split())[:300]}; check RAY_ADDRESS") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_room(ray: Any, threads: int, gpus: int) -> None:
    """A job that fits nowhere would wait for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= threads and node.get("GPU", 0) >= gpus for node in nodes):
        needed = f"{threads} CPUs{(' and a GPU' if gpus == 1 else f' and {gpus} GPUs') if gpus else ''}"
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
    """The results of jobs; the first Failure ends the run and is raised, as InputError or KshotError."""
    with closing(answers):
        for job, result in answers:
            if isinstance(result, Failure):
                kind = InputError if result.exit_status == InputError.exit_status else KshotError
                raise kind(result.message)
            yield job, result


class Worker(Generic[J, R]):
    """A process that calls `run`, which is picklable as its jobs are, on `threads` threads of torch. It ends when the
    other end of `watched` is closed. environment: set before any library is loaded."""

    def __init__(
        self, run: Callable[[J], R], watched: Connection, threads: int, environment: Mapping[str, str]
    ) -> None:
        self._job: J | None = None  # what it works on
        self.channel, theirs = CONTEXT.Pipe()
        arguments = run, theirs, watched, threads, dict(environment)
        starts_others = "," in environment.get("CUDA_VISIBLE_DEVICES", "")  # which no daemon may
        # a daemon is ended, not waited for, at exit
        self._process = CONTEXT.Process(target=_work, args=arguments, daemon=not starts_others)
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


@contextmanager
def _worker_pool(
    run: Callable[[J], R], count: int, threads: int, gpus: Sequence[str]
) -> Iterator[tuple[list[Worker[J, R]], Callable[[Worker[J, R]], None]]]:
    """The workers, and what puts another in the place of one that died, on the same GPU."""
    os.environ.update(environment(threads))  # a library reads it on being loaded, which a child does on its first line
    watched, parent_end = CONTEXT.Pipe(duplex=False)
    workers: list[Worker[J, R]] = []

    def start(number: int) -> Worker[J, R]:
        gpu = {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {}
        return Worker(run, watched, threads, gpu)

    def replace(dead: Worker[J, R]) -> None:
        number = workers.index(dead)
        workers[number] = start(number)  # first: where that fails, all of the old ones are ended later
        dead.close()

    with watched:
        try:
            workers.extend(map(start, range(count)))
            yield workers, replace
            for worker in workers:
                worker.stop()
        finally:
            parent_end.close()  # ends the workers that still run
            for worker in workers:
                worker.close()


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


@contextmanager
def one_thread_on_a_cpu(device: str) -> Iterator[None]:
    """As in a sweep's workers, so that sums come out the same."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1 if device.startswith("cpu") else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
    packed = call(ForkingPickler.dumps, result)
    return ForkingPickler.dumps(packed) if isinstance(packed, Failure) else packed
