"""Jobs on a Ray cluster: the one that Ray finds (RAY_ADDRESS, or one that was started on this machine), or a local one.

kshot, its data and its models must be where the nodes find them, at the same paths. A node or worker that is lost takes
no job with it: Ray starts it elsewhere. Answers come to this process alone, which hands each on once.
"""

import re
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from experiments.processes import Failure, answered, settle
from kshot_errors import InputError, KshotError

J = TypeVar("J")
R = TypeVar("R")
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
        task = ray.remote(num_cpus=threads, num_gpus=int(gpu), max_retries=RETRIES, scheduling_strategy="SPREAD")(_work)
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


def _work(run: Callable[[J], R], job: J, threads: int) -> R | Failure:
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
