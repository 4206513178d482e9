"""Runs the jobs of a sweep: in worker processes side by side on this machine, or in actors on a Ray cluster.

On a CPU every worker computes on one thread unless more are asked for: the numbers of a cell then do not depend on how
many run beside it. A worker keeps what it has loaded from job to job. A job that fails stops no other. A worker that
dies has its job tried again; one whose parent dies ends at once. Ray's cluster is the one that it finds (RAY_ADDRESS,
or one started on this machine), or a local one; kshot, its data and its models must be at the same paths on every node.
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
RETRIES = 3  # of a job whose worker or node is lost, and of starting a worker
PATIENCE = 10.0  # seconds without a worker, after which it is looked whether any node has room for one


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
    ranks: int = 1,
    gpus: Sequence[str] = (),
    started: Callable[[J], None] | None = None,
) -> Answers[J, R]:
    """(job, result or Failure) as they finish, with `workers` processes (default: as many as there is room for, see
    `room`; at most one a job). However it ends, no worker is left. run and jobs must be picklable. first: jobs that
    must be finished before any of `jobs` begins. threads: of each worker. ranks: processes that each may start for its
    model. gpus: what CUDA_VISIBLE_DEVICES calls the GPUs that workers get, one or several each. started: called in this
    process with each job that begins."""
    count = min(workers or room(threads, ranks, gpus), max(len(jobs), len(first)))
    if count == 0:
        return
    with _worker_pool(run, count, threads, gpus, starts_others=ranks > 1) as (pool, replace):
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
    ranks: int = 1,
    gpus: Sequence[str] = (),
    started: Callable[[J], None] | None = None,
) -> Answers[J, R]:
    """As `local`, on a cluster: an actor for each worker (default: as many as its nodes have room for), with `threads`
    CPUs and as many GPUs as each of `gpus` names, or a CPU for each of `ranks`, all of one node. One that waits for its
    room holds nothing up; where one is lost, its job is tried again by another. However it ends, no job of this run
    goes on. Raises InputError without Ray, KshotError where the cluster cannot be reached, has no node for a worker, or
    none that can run it."""
    if not jobs and not first:
        return
    gpu = {"GPU": len(gpus[0].split(","))} if gpus else {}
    bundle = {"CPU": threads if gpu else max(threads, ranks), **gpu}
    with _cluster() as library, closing(_Actors(library, bundle, run, threads)) as actors:
        most = _room(library, bundle)
        for _ in range(min(workers or most, max(len(jobs), len(first)))):
            actors.start()
        for stage in (first, jobs):
            pending = deque((job, 1) for job in stage)
            while pending or actors.running:
                while pending and actors.idle:
                    job, tries = pending.popleft()
                    actors.send(job, tries)
                    if started:
                        started(job)
                for job, tries, answer in actors.wait():
                    if isinstance(answer, Failure) and answer.lost and tries <= RETRIES:
                        pending.append((job, tries + 1))
                    else:
                        yield job, answer


class _Caller(Generic[J, R]):
    """In a process of the cluster: what `run` has loaded is there for the next job."""

    def __init__(self, run: Callable[[J], R], threads: int) -> None:
        prepare_process(threads)
        self._run = run

    def call(self, job: J) -> R | Failure:
        return call(self._run, job)


class _Actors(Generic[J, R]):
    """The actors of a run, each with a placement group of its own, by which it is known here: all that it needs, on one
    node. Ray restarts none of them: a new one may go elsewhere. idle: those without a job. running: jobs under way."""

    def __init__(self, ray: Any, bundle: Mapping[str, int], run: Callable[[J], R], threads: int) -> None:
        self._ray, self._bundle, self._arguments = ray, dict(bundle), (run, threads)
        self._actors, self.idle, self.running = dict[Any, Any](), list[Any](), 0
        self._awaited = dict[Any, tuple[Any, ...]]()  # Ray's reference → group, tries, and the job if it has one

    def start(self, tries: int = 1) -> None:
        """Ask for another one; it is idle once it has room and its libraries. tries: to start it, this one too."""
        group = self._ray.util.placement_group([self._bundle])
        self._actors[group] = None
        where = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(group)
        needs = {"num_cpus": self._bundle["CPU"], "num_gpus": self._bundle.get("GPU", 0)}
        make = self._ray.remote(_Caller).options(**needs, max_restarts=0, scheduling_strategy=where)
        self._actors[group] = actor = make.remote(*self._arguments)
        self._awaited[actor.__ray_ready__.remote()] = group, tries

    def send(self, job: J, tries: int) -> None:
        """Give a job to one that is idle."""
        group = self.idle.pop()  # the last one: others may have been lost meanwhile
        self._awaited[self._actors[group].call.remote(job)] = group, tries, job
        self.running += 1

    def wait(self) -> Iterator[tuple[J, int, R | Failure]]:
        """Wait until an actor is ready, or is done with a job: that, its tries, and its result."""
        ready, _ = self._ray.wait([*self._awaited], timeout=None if self.running else PATIENCE)
        if not ready:
            _room(self._ray, self._bundle)  # the nodes that had it may be gone
        for reference in ready:
            answer, (group, tries, *sent) = _ray_result(self._ray, reference), self._awaited.pop(reference)
            self.running -= len(sent)
            if not isinstance(answer, Failure) or (sent and not answer.lost):
                self.idle.append(group)
            else:
                self._end(group)
                if sent or tries <= RETRIES:
                    self.start(1 if sent else tries + 1)
                elif not (self.idle or self._awaited):
                    raise KshotError(answer.message)
            yield from ((job, tries, answer) for job in sent)

    def _end(self, group: Any) -> None:
        if (actor := self._actors.pop(group)) is not None:
            self._ray.kill(actor)
        self._ray.util.remove_placement_group(group)

    def close(self) -> None:
        """End all of them, whatever they do."""
        for group in [*self._actors]:
            self._end(group)


def _ray_result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        unfit = isinstance(error, (ray.exceptions.RayTaskError, ray.exceptions.RaySystemError))
        if unfit or getattr(error, "actor_init_failed", False):  # kshot is not there, say, or the data
            return Failure(f"a node of the Ray cluster cannot run it: {_line(error)}", trace=str(error))
        return Failure(f"lost in the Ray cluster, {RETRIES + 1} times: {_line(error)}", lost=True)


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


def _room(ray: Any, bundle: Mapping[str, int]) -> int:
    """How many workers its nodes have room for. Raises KshotError for none: one would wait for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(min(int(node.get(kind, 0) // need) for kind, need in bundle.items()) for node in nodes)
    if not room:
        gpus = bundle.get("GPU", 0)
        needed = f"{bundle['CPU']} CPUs{(' and a GPU' if gpus == 1 else f' and {gpus} GPUs') if gpus else ''}"
        raise KshotError(
            f"no node of the Ray cluster has {needed} for a worker; give fewer --threads or another --device"
        )
    return room


def room(threads: int, ranks: int = 1, gpus: Sequence[str] = ()) -> int:
    """How many workers this machine has room for: one for each entry of `gpus`, or with a core for each thread, or for
    each rank of its model."""
    return len(gpus) or max(1, cores() // max(threads, ranks))


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
    other end of `watched` is closed. environment: set before any library is loaded. starts_others: whether it has
    processes of its own, which no daemon may."""

    def __init__(
        self,
        run: Callable[[J], R],
        watched: Connection,
        threads: int,
        environment: Mapping[str, str],
        *,
        starts_others: bool,
    ) -> None:
        self._job: J | None = None  # what it works on
        self.channel, theirs = CONTEXT.Pipe()
        arguments = run, theirs, watched, threads, dict(environment)
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
    run: Callable[[J], R], count: int, threads: int, gpus: Sequence[str], *, starts_others: bool
) -> Iterator[tuple[list[Worker[J, R]], Callable[[Worker[J, R]], None]]]:
    """The workers, and what puts another in the place of one that died, on the same GPU."""
    os.environ.update(environment(threads))  # a library reads it on being loaded, which a child does on its first line
    watched, parent_end = CONTEXT.Pipe(duplex=False)
    workers: list[Worker[J, R]] = []

    def start(number: int) -> Worker[J, R]:
        gpu = {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {}
        return Worker(run, watched, threads, gpu, starts_others=starts_others)

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
