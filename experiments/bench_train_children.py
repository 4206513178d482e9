"""A process of its own for each contestant of a benchmark, as a user's program would be.

Two programs in one process are not what they are alone: with two pools of OpenMP threads libgomp counts more threads
than cores and lets none wait actively, and memory is nobody's. Knows no contestant and no clock.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context, set_start_method
from multiprocessing.connection import Connection
from typing import TypeVar

import torch

from experiments.processes import end_with, interrupts_held_back
from kshot_errors import InputError, KshotError

T = TypeVar("T")


class Child:
    """A process that calls functions on its main thread, one at a time, and sleeps in between."""

    def __init__(self, name: str, pool: ProcessPoolExecutor) -> None:
        self._name, self._pool = name, pool

    def begin(self, function: Callable[..., T], *args: object) -> Callable[[], T]:
        """Have it call function(*args), all of it picklable; what this gives waits for the answer.

        Waiting raises InputError for one in the child, and KshotError for every other exception and for its death.
        """
        with self._alive():
            future = self._pool.submit(_call, self._name, function, *args)

        def answer() -> T:
            with self._alive():
                return future.result()

        return answer

    def ask(self, function: Callable[..., T], *args: object) -> T:
        """Begin and wait."""
        return self.begin(function, *args)()

    @contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except BrokenProcessPool as error:
            raise KshotError(f"the process of {self._name!r} died (killed? out of memory?)") from error


@contextmanager
def children(names: Iterable[str]) -> Iterator[dict[str, Child]]:
    """A child of each name, all starting at once, with the threads that torch has here.

    They live no longer than this process's end of a pipe: it is closed on leaving, or by this process's death. (A
    daemonic process would do, were it allowed to have loader processes.)
    """
    context, threads = get_context("spawn"), torch.get_num_threads()
    watched, lifeline = context.Pipe(duplex=False)
    with watched, ExitStack() as stack:
        pools = {n: ProcessPoolExecutor(1, context, initializer=_begin, initargs=(watched, threads)) for n in names}
        for pool in pools.values():
            stack.enter_context(pool)
        stack.enter_context(lifeline)  # closed before the pools are waited for: what still runs then is not wanted
        with interrupts_held_back():
            for pool in pools.values():
                pool.submit(_nothing)  # a pool has no process before it has work
        yield {name: Child(name, pool) for name, pool in pools.items()}


def quiet() -> None:
    """No progress bars and notes of the libraries between the lines of the benchmark."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _begin(watched: Connection, threads: int) -> None:
    """In a new child: all as in a user's program, which sets no number of threads that is torch's own choice."""
    threading.Thread(target=end_with, args=(watched,), daemon=True).start()
    set_start_method(None, force=True)  # else its loader processes would be spawned as it was, and import for seconds
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    quiet()


def _nothing() -> None:
    pass


def _call(name: str, function: Callable[..., T], *args: object) -> T:
    """In the child: its errors as ones that survive pickling, with one line each."""
    try:
        return function(*args)
    except InputError as error:
        raise InputError(str(error)) from None
    except KshotError as error:
        raise KshotError(str(error)) from None
    except Exception as error:
        raise KshotError(f"{name!r} failed: {type(error).__name__}: {' '.join(str(error).split())}") from None
