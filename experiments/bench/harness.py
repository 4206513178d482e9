"""What every benchmark shares: rounds in turn, processes of their own, the record, its JSON file and its table.

A record is {"machine", "versions", "rows": [{"name", "median", "unit", ...}], "ratios": {...}}.
"""

import json
import os
import platform
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from multiprocessing import get_context, set_start_method
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Generic, TypeVar

import torch

from experiments.sweep.workers import exit_with, interrupts_blocked
from experiments.terminal import err, out, plain_table, print_paths
from kshot.errors import InputError, KshotError, ResultsError, UnknownNameError
from kshot.files import processor, write_file
from kshot.hub import one_line

T = TypeVar("T")

Rows = list[dict[str, Any]]
Process = Callable[..., Any]  # a function and its arguments → its result
FOLDER = Path("results/bench")  # X.json of `kshot bench X`
DIGITS = 3  # significant ones in the table
UNITS = {  # of what stands among the ratios and is no quotient
    "grid_seconds": "s",
    "feature_rate_share": "of 1",
    "overhead_ms": "ms",
    "overhead_ms_together": "ms",
    "engine_share": "of 1",
    "second_seed_vision_forwards": "images",
}


@dataclass(frozen=True)
class Timed(Generic[T]):
    """The result of a task that measured its own seconds, such as one that ran in another process."""

    seconds: float
    value: T


def timed(function: Callable[..., T], *args: object, device: str = "cpu") -> Timed[T]:
    """function(*args) and the seconds it took, with what it has sent to the device."""
    start = perf_counter()
    value = function(*args)
    synchronize(device)
    return Timed(perf_counter() - start, value)


def in_turn(
    tasks: Mapping[str, Callable[[], Any]], rounds: int, *, warm_up: bool = True
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """The seconds that each task took in each round, and its last result. A round runs every task once, so that a slow
    minute of the machine affects all of them. warm_up: one more round before them, which does not count; False: of
    tasks that take minutes, with a line on stderr after each."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    results = dict[str, Any]()
    for number in range(0 if warm_up else 1, rounds + 1):
        for name, task in tasks.items():
            measured = timed(task)
            if isinstance(measured.value, Timed):
                measured = measured.value
            results[name] = measured.value
            if number:
                seconds[name].append(measured.seconds)
            if not warm_up:
                text = f"round {number} of {rounds}, {name}: {measured.seconds:.3g} s"
                err.print(text, style="dim", highlight=False)
    return seconds, results


def row(name: str, values: Sequence[float], unit: str, **facts: Any) -> dict[str, Any]:
    """One measurement: the median of its values, the values, and what else must be known of it (JSON values)."""
    return {"name": name, "median": median(values), "unit": unit, "values": list(values), **facts}


def median_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of the quotients of each round: what ran in one round ran within moments."""
    return median(a / b for a, b in zip(over, under, strict=True))


def check_agreement(name: str, difference: float, tolerance: float) -> None:
    """Raise KshotError where results that must agree differ by more than `tolerance`, or by NaN."""
    if not difference <= tolerance:
        raise KshotError(f"{name} {difference:.2g} apart, more than {tolerance}: nothing to compare")


def record(rows: Rows, ratios: Mapping[str, float], packages: Iterable[str]) -> dict[str, Any]:
    """The record of a benchmark on this kind of machine; packages: the distributions that its numbers depend on."""
    machine = {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": processor(),
        "cores": os.cpu_count(),
    }
    versions = {"python": platform.python_version(), **{name: metadata.version(name) for name in sorted(packages)}}
    return {"machine": machine, "versions": versions, "rows": rows, "ratios": dict(ratios)}


def finish(record: dict[str, Any], path: Path) -> None:
    """Print the table and write the JSON file. Raises ResultsError where it cannot be written."""
    table = plain_table(["what", "median", "unit"])
    lines = [(measured["name"], measured["median"], measured["unit"]) for measured in record["rows"]]
    lines += [(name, ratio, UNITS.get(name, "times")) for name, ratio in record["ratios"].items()]
    for name, value, unit in lines:
        table.add_row(name, f"{value:,.0f}" if abs(value) >= 10**DIGITS else f"{value:.{DIGITS}g}", unit)
    out.print(table, soft_wrap=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, (json.dumps(record, indent=2) + "\n").encode())
    except OSError as error:
        raise ResultsError(f"{path} cannot be written ({error.strerror}); name another with --json") from error
    print_paths([path])
    for note in record.get("notes", []):
        out.print(note, style="yellow", markup=False, highlight=False)


def check_device(device: str) -> None:
    """Raise UnknownNameError for another name than cpu and cuda, InputError for a device that is not here."""
    if device not in ("cpu", "cuda"):
        raise UnknownNameError("device", device, ["cpu", "cuda"])
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("this torch sees no CUDA device; leave --device out to measure on the CPU")


def device_facts(device: str) -> dict[str, Any]:
    """The device by its name, and the number of torch's threads."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {"device": name, "threads": torch.get_num_threads()}


def synchronize(device: str) -> None:
    """Wait for what was sent to the device."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def quiet() -> None:
    """No progress bars and notes of the libraries between the lines of the benchmark."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@contextmanager
def processes(names: Iterable[str]) -> Iterator[dict[str, Process]]:
    """A process of each name, all starting at once, with as many torch threads as this one has: what calls a picklable
    function there, with its arguments. It raises InputError for one in the process, and KshotError for every other
    exception and for its death.

    Two programs in one process are not what they are alone: with two pools of OpenMP threads libgomp counts more
    threads than cores and lets none wait actively, and peak memory belongs to both.
    """
    # They live no longer than this process's end of a pipe: it is closed on leaving, or by this process's death. (A
    # daemonic process would do, were it allowed to have loader processes.)
    context, threads = get_context("spawn"), torch.get_num_threads()
    watched, lifeline = context.Pipe(duplex=False)
    with watched, ExitStack() as stack:
        pools = {n: ProcessPoolExecutor(1, context, initializer=_begin, initargs=(watched, threads)) for n in names}
        for pool in pools.values():
            stack.enter_context(pool)
        stack.enter_context(lifeline)  # closed before the pools are waited for: what still runs then is not wanted
        with interrupts_blocked():
            for pool in pools.values():
                pool.submit(int)  # a pool has no process before it has work
        yield {name: partial(_run, name, pool) for name, pool in pools.items()}


def _begin(watched: Connection, threads: int) -> None:
    """In a new process: all as in a user's program, which sets no number of threads that is torch's own choice."""
    threading.Thread(target=exit_with, args=(watched,), daemon=True).start()
    set_start_method(None, force=True)  # else its loader processes would be spawned as it was, and import for seconds
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    quiet()


def _run(name: str, pool: ProcessPoolExecutor, function: Callable[..., T], *args: object) -> T:
    try:
        return pool.submit(_call, name, function, *args).result()
    except BrokenProcessPool as error:
        raise KshotError(f"the process of {name!r} died (killed? out of memory?)") from error


def _call(name: str, function: Callable[..., T], *args: object) -> T:
    """In the process: its errors as ones that survive pickling, with one line each."""
    try:
        return function(*args)
    except Exception as error:
        line = str(error) if isinstance(error, KshotError) else f"{name!r} failed: {one_line(error)}"
        raise (InputError if isinstance(error, InputError) else KshotError)(line) from None
