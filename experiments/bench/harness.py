"""What every benchmark shares: timing in turns, the record of machine and versions, the JSON file and the table.

Knows no benchmark. A result is {"machine", "versions", "rows": [{"name", "median", "unit", ...}], "ratios": {...}}.

TODO A process of its own for each contestant of a benchmark, as a user's program would be.

Two programs in one process are not what they are alone: with two pools of OpenMP threads libgomp counts more threads
than cores and lets none wait actively, and memory is nobody's. Knows no contestant and no clock.
"""

import json
import os
import platform
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from importlib import metadata
from multiprocessing import get_context, set_start_method
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, TypeVar

import torch

from experiments.sweep.workers import end_with, interrupts_held_back
from experiments.terminal import out, plain_table, print_paths
from kshot.errors import InputError, KshotError, ResultsError
from kshot.files import processor, write_file

# ---- What every benchmark shares: timing in turns, the record of machine and versions, the JSON file and the table.

FOLDER = Path("results/bench")  # X.json of `kshot bench X`
DIGITS = 3  # significant ones in the table
UNITS = {
    "grid_seconds": "s",
    "feature_rate_share": "of 1",
    "overhead_ms": "ms",
    "overhead_ms_together": "ms",
    "engine_share": "of 1",
    "second_seed_vision_forwards": "images",
}  # of what stands among the ratios and is no quotient


def in_turn(tasks: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds that each task took in each round, after one that does not count.

    A round runs every task once, so that a slow minute of the machine meets all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for n in range(rounds + 1):
        for name, task in tasks.items():
            start = perf_counter()
            task()
            if n:
                seconds[name].append(perf_counter() - start)
    return seconds


def row(name: str, values: Sequence[float], unit: str, **facts: Any) -> dict[str, Any]:
    """One measurement: the median of its values, the values, and what else must be known of it (JSON values)."""
    return {"name": name, "median": median(values), "unit": unit, "values": list(values), **facts}


def result(rows: list[dict[str, Any]], ratios: Mapping[str, float], packages: Iterable[str]) -> dict[str, Any]:
    """The record of a benchmark; packages: the distributions that its numbers depend on."""
    versions = {"python": platform.python_version(), **{name: metadata.version(name) for name in sorted(packages)}}
    return {"machine": machine(), "versions": versions, "rows": rows, "ratios": dict(ratios)}


def machine() -> dict[str, Any]:
    """The kind of machine, never its name."""
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": processor(),
        "cores": os.cpu_count(),
    }


def finish(result: dict[str, Any], path: Path) -> None:
    """Print the table and write the JSON file. Raises ResultsError where it cannot be written."""
    show(result)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, (json.dumps(result, indent=2) + "\n").encode())
    except OSError as error:
        raise ResultsError(f"{path} cannot be written ({error.strerror}); name another with --json") from error
    print_paths([path])


def show(result: dict[str, Any]) -> None:
    """The medians and the ratios as a table."""
    table = plain_table(["what", "median", "unit"])
    for measured in result["rows"]:
        table.add_row(measured["name"], _number(measured["median"]), measured["unit"])
    for name, ratio in result["ratios"].items():
        table.add_row(name, _number(ratio), UNITS.get(name, "times"))
    out.print(table, soft_wrap=False)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10**DIGITS else f"{value:.{DIGITS}g}"


# ---- A process of its own for each contestant of a benchmark, as a user's program would be.

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
