"""What a sweep will take, before it starts: counts, downloads, memory, disk and time. And whether it can start at all.

The parts of an estimate are in modules of their own (estimate_*.py); this one puts them together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments import executors
from experiments.estimate_counts import Counts, counts
from experiments.estimate_disk import Disk, disks
from experiments.estimate_downloads import Download, downloads
from experiments.estimate_features import Turns, encodings, turns
from experiments.estimate_memory import PASS, Memory, memory
from experiments.estimate_parts import Todo, of_jobs, of_sweep
from experiments.estimate_time import Measured, Spent, measure, spent
from experiments.estimate_tokens import Lengths, reachable
from kshot_errors import InputError

__all__ = ["Estimate", "check", "estimate", "of_jobs", "of_sweep", "room"]


@dataclass(frozen=True)
class Room:
    """What a sweep needs of a machine that can be known at once."""

    workers: int
    downloads: Sequence[Download]
    memory: Memory
    disks: Sequence[Disk]


@dataclass(frozen=True)
class Estimate:
    """All of it. turns: when the tower sees images. spent, lengths: None where the time, or how many tokens, are not
    known; `no_time` and `no_tokens` say why."""

    room: Room
    turns: Turns
    counts: Counts
    lengths: Mapping[tuple[str, str], Lengths] | None
    measured: Measured | None
    spent: Spent | None
    no_time: str = ""
    no_tokens: str = ""


def room(
    todo: Todo,
    out: Path,
    workers: int | None = None,
    *,
    threads: int = 1,
    gpus: Sequence[str] = (),
    device: str | None = None,
) -> Room:
    """The cheap part: downloads, memory and disk, without a measurement. workers: None is one a core, or one a GPU.
    device: see `memory`."""
    count = _workers(todo, workers, threads, gpus)
    fetched = downloads(todo)
    return Room(count, fetched, memory(todo, count, device=device), disks(todo, out, fetched, count))


def estimate(
    todo: Todo,
    out: Path,
    workers: int | None = None,
    *,
    threads: int = 1,
    gpus: Sequence[str] = (),
    device: str | None = None,
) -> Estimate:
    """The whole estimate; the time from a measurement on this machine, where all that it needs is here and fits.

    Raises what loading the models raises.
    """
    needed, when = room(todo, out, workers, threads=threads, gpus=gpus, device=device), turns(todo)
    lengths, no_tokens = reachable(todo)
    if no_time := _unmeasured(todo, needed) or no_tokens:
        return Estimate(needed, when, counts(todo, lengths), lengths, None, None, no_time, no_tokens)
    measured = measure(todo, needed.workers, lengths, threads=threads, gpus=gpus)
    needed = replace(needed, memory=memory(todo, needed.workers, device=device, seen=measured.peak))
    return Estimate(needed, when, counts(todo, lengths), lengths, measured, spent(todo, measured, needed.workers))


def check(needed: Room) -> None:
    """Raise InputError, with need, what is free and the way out, where a sweep does not fit."""
    for disk in needed.disks:
        if not disk.fits:
            largest = max(disk.needs, key=lambda what: disk.needs[what])
            raise InputError(
                f"the sweep needs {size(disk.needed)} of disk at {disk.folder}, most of it for {largest}, and "
                f"{size(disk.free)} are free; make room, or name a folder on another disk ({WAYS[largest]})"
            )
    if not needed.memory.fits:
        raise InputError(_too_little(needed.memory))


def _too_little(m: Memory) -> str:
    largest = max(m.parts, key=lambda what: m.parts[what])
    what = f"{m.workers} workers need {size(m.needed)}" if m.workers > 1 else f"a worker needs {size(m.needed)}"
    ways = [f"--workers {m.fitting}"] if 0 < m.fitting < m.workers else []
    ways += ["a smaller batch (--set batch_size=8)"] if largest == PASS else []
    ways += ["a smaller model"] if largest != "libraries" else ["another machine"]
    return f"{what} of {m.place}, most of it for {largest}, and {size(m.free)} are free; use {' or '.join(ways)}"


def size(count: float) -> str:
    """Bytes as people say them."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


WAYS = {
    "downloads": "HF_HOME",
    "packed data sets": "KSHOT_CACHE",
    "image features": "KSHOT_CACHE",
    "prepared images": "KSHOT_CACHE",
    "results": "--out",
}


def _workers(todo: Todo, workers: int | None, threads: int, gpus: Sequence[str]) -> int:
    """As many as `executors.local` starts."""
    most = len(gpus) or (max(1, executors.cores() // threads) if todo.device == "cpu" else 1)
    return max(1, min(workers or most, max(len(todo.parts), encodings(todo))))


def _unmeasured(todo: Todo, needed: Room) -> str:
    """Why no time can be measured; "" where it can."""
    if not todo.parts:
        return "nothing is left to compute"
    if todo.service != "local":
        return f"the time of the service {todo.service} is not measured: its use may cost"
    if needed.downloads:
        names = ", ".join(each.name for each in needed.downloads)
        return f"{names} must be downloaded before the time can be measured"
    if not needed.memory.fits:
        return "it does not fit into the memory"
    return ""
