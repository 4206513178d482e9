"""Who runs the cells: worker processes side by side on this machine. Knows nothing of what a cell computes.

On a CPU every worker computes on one thread: the numbers of a cell then do not depend on how many run beside it. A
worker ends itself when its parent is gone.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from kshot_errors import InputError, KshotError

J = TypeVar("J")
R = TypeVar("R")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def local(run: Callable[[J], R], jobs: Sequence[J], workers: int | None = None) -> Iterator[tuple[J, R]]:
    """(job, result) as they finish, with `workers` processes (default: one a core, at most one a job).

    run and jobs must be picklable. The first error ends the run: a KshotError comes out as itself, a worker that died
    (out of memory, killed) as a KshotError that names the job.
    """
    import multiprocessing

    count = min(workers or len(os.sched_getaffinity(0)), len(jobs))
    if count == 0:
        return
    os.environ.update(dict.fromkeys(THREADS, "1"))  # read by the libraries when a worker starts
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context, initializer=_begin) as pool:
        waiting: dict[Future[R], J] = {pool.submit(_call, run, job): job for job in jobs}
        try:
            yield from _finished(waiting)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _finished(waiting: dict[Future[R], J]) -> Iterator[tuple[J, R]]:
    while waiting:
        for future in wait(waiting, return_when=FIRST_COMPLETED).done:
            job = waiting.pop(future)
            try:
                result = future.result()
            except BrokenProcessPool as error:
                reason = f"a worker process died (out of memory?) while running {job}"
                raise KshotError(f"{reason}; the same command goes on with the rest") from error
            except _Failed as error:
                raise error.restored() from error
            yield job, result


class _Failed(Exception):  # noqa: N818 - it carries an error, it is none
    """A KshotError on its way between processes: pickling keeps neither its constructor nor its cause."""

    def __init__(self, exit_status: int, message: str) -> None:
        super().__init__(exit_status, message)

    def restored(self) -> KshotError:
        status, message = self.args
        return InputError(message) if status == InputError.exit_status else KshotError(message)


def _call(run: Callable[[J], R], job: J) -> R:
    try:
        return run(job)
    except KshotError as error:
        raise _Failed(error.exit_status, str(error)) from None


def _begin() -> None:
    """In a new worker: one thread, no progress bars of its own, and a watch on the parent."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    from multiprocessing import parent_process
    from multiprocessing.connection import wait as wait_for

    parent = parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
    os._exit(1)
