"""Who runs the jobs of a sweep: worker processes side by side on this machine, or a Ray cluster's.

Knows nothing of what a job computes. On a CPU every worker computes on one thread unless told otherwise: the numbers of
a cell then do not depend on how many run beside it. A job that fails stops no other; a worker that dies takes its job
with it, which is tried once more, elsewhere.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, Generic, TypeVar

from experiments.processes import CONTEXT, Failure, Worker
from kshot_errors import InputError, KshotError

J = TypeVar("J")
R = TypeVar("R")
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
    with _crew(run, count, threads, gpus) as crew:
        yield from _Turns(crew, first, jobs).all()


def ray(
    run: Callable[[J], R],
    jobs: Sequence[J],
    workers: int | None = None,
    *,
    first: Sequence[J] = (),
    threads: int = 1,
    gpus: Sequence[str] = (),
) -> Answers[J, R]:
    """The same on a Ray cluster: see `experiments.executor_ray`. Raises InputError where Ray is not installed."""
    from experiments.executor_ray import on_cluster

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


class _Crew:
    """The workers of a run. Of one that dies another takes the place, on the same GPU."""

    def __init__(self, make: Callable[[int], Worker[Any, Any]], count: int) -> None:
        self._make = make
        self.workers = [make(number) for number in range(count)]

    def replace(self, dead: Worker[Any, Any]) -> None:
        number = self.workers.index(dead)
        self.workers[number] = self._make(number)  # first: where that fails, all of the old ones are ended later
        dead.end()


@contextmanager
def _crew(run: Callable[[J], R], count: int, threads: int, gpus: Sequence[str]) -> Iterator[_Crew]:
    os.environ.update(environment(threads))  # a library reads it on being loaded, which a child does on its first line
    watched, lifeline = CONTEXT.Pipe(duplex=False)

    def make(number: int) -> Worker[J, R]:
        one = {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {}
        return Worker(run, watched, threads, one)

    with watched:
        crew: _Crew | None = None
        try:
            crew = _Crew(make, count)
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


class _Turns:
    """Which worker does what, and when."""

    def __init__(self, crew: _Crew, first: Sequence[Any], jobs: Sequence[Any]) -> None:
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
