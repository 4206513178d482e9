"""A worker process: one function called again and again, on jobs sent to it one by one. Knows no cell and no order.

It lives no longer than the parent's end of a pipe: closing it ends the process at once, whatever it is doing, and so
does the parent's death.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from logging import CRITICAL, getLogger
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from traceback import format_exception
from typing import Any, Generic, TypeVar

from kshot_errors import KshotError

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
