"""Who runs the cells: worker processes side by side on this machine. Knows nothing of what a cell computes.

On a CPU every worker computes on one thread: the numbers of a cell then do not depend on how many run beside it. A
worker lives no longer than the parent's end of a pipe: closing it stops a run at once, and so does the parent's death.
"""

import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from logging import CRITICAL, getLogger
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import TypeVar

from kshot_errors import InputError, KshotError

J = TypeVar("J")
R = TypeVar("R")
# Read by the libraries when a worker starts: one thread to compute on, and one memory arena, which is enough for it.
ENVIRONMENT = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MALLOC_ARENA_MAX"), "1")


def local(run: Callable[[J], R], jobs: Sequence[J], workers: int | None = None) -> Generator[tuple[J, R], None, None]:
    """(job, result) as they finish, with `workers` processes (default: one a core, at most one a job).

    run and jobs must be picklable. The first error ends the run: a KshotError comes out as itself, a worker that died
    (out of memory, killed) as a KshotError. However it ends, also when the iterator is closed, no worker is left.
    """
    count = min(workers or _cores(), len(jobs))
    if count == 0:
        return
    os.environ.update(ENVIRONMENT)
    context = get_context("spawn")
    watched, lifeline = context.Pipe(duplex=False)
    with (
        watched,
        ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=(watched,)) as pool,
        lifeline,  # closed before the pool is waited for: what still runs then is not wanted
    ):
        with interrupts_held_back():
            waiting = {pool.submit(_call, run, job): job for job in jobs}
        yield from _finished(waiting)
        pool.shutdown()  # nothing runs: let the workers leave in peace


def _cores() -> int:
    """Those this process may use; where the system cannot tell (macOS), all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Children born here never see Ctrl-C, which a terminal sends to all: the parent gets it, and ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _finished(waiting: dict[Future[R], J]) -> Iterator[tuple[J, R]]:
    while waiting:
        finished = wait(waiting, return_when=FIRST_COMPLETED).done
        done = [future for future in waiting if future in finished]
        for future in sorted(done, key=lambda future: future.exception() is not None):  # no result is lost to an error
            job = waiting.pop(future)
            try:
                result = future.result()
            except BrokenProcessPool as error:
                reason = f"a worker process died (killed? out of memory?) with {job} or a cell beside it"
                raise KshotError(f"{reason}; finished cells are kept, the same command goes on from there") from error
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


def _begin(watched: Connection) -> None:
    """In a new worker: a watch on the parent, one thread, no progress bars of its own."""
    threading.Thread(target=end_with, args=(watched,), daemon=True).start()
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    getLogger("huggingface_hub").setLevel(CRITICAL)  # its retries; what they end in is reported in one line


def end_with(watched: Connection) -> None:
    """End this process with the other end of the pipe, whatever it is doing."""
    watched.poll(None)  # nothing is ever sent: it returns when the other end is closed
    os._exit(1)
