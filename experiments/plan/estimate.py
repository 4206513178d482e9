"""What a sweep will take, before it starts: counts, downloads, memory, disk and time. And whether it can start at all.

The parts of an estimate are in modules of their own (estimate_*.py); this one puts them together.

TODO An estimate as a table for the terminal. Computes nothing but units.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.plan.memory import PASS, Memory, memory
from experiments.plan.storage import HUB, Disk, Download, disks, downloads
from experiments.plan.time import Measured, Spent, measure, spent
from experiments.sweep import workers as executors
from experiments.sweep.encoding import EncodingSchedule, encoding_schedule, encodings
from experiments.sweep.workload import Counts, Lengths, Workload, counts, of_jobs, of_sweep, reachable
from experiments.terminal import out, plain_table
from kshot.errors import InputError

# ---- What a sweep will take, before it starts: counts, downloads, memory, disk and time. And whether it can start at all.

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
    encoding_schedule: EncodingSchedule
    counts: Counts
    lengths: Mapping[tuple[str, str], Lengths] | None
    measured: Measured | None
    spent: Spent | None
    no_time: str = ""
    no_tokens: str = ""


def room(
    todo: Workload,
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
    todo: Workload,
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
    needed, when = room(todo, out, workers, threads=threads, gpus=gpus, device=device), encoding_schedule(todo)
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


def _workers(todo: Workload, workers: int | None, threads: int, gpus: Sequence[str]) -> int:
    """As many as `executors.local` starts."""
    most = len(gpus) or (max(1, executors.cores() // threads) if todo.device == "cpu" else 1)
    return max(1, min(workers or most, max(len(todo.parts), encodings(todo))))


def _unmeasured(todo: Workload, needed: Room) -> str:
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


# ---- An estimate as a table for the terminal. Computes nothing but units.

Row = tuple[str, str, str]


def print_estimate(found: Estimate) -> None:
    """What a sweep will take."""
    table = plain_table(["", "", ""])
    table.show_header = False
    for row in rows(found):
        table.add_row(*row)
    out.print(table, soft_wrap=False)


def rows(found: Estimate) -> list[Row]:
    """(what, how much, of what) of the estimate, a line each."""
    return [*_counts(found.counts, found), *_downloads(found), *_memory(found), *_disks(found), *_time(found)]


def seconds(count: float) -> str:
    """A time as people say it."""
    if count < 90:
        return f"{count:.0f} s"
    if count < 5400:
        return f"{count / 60:.0f} min"
    return f"{count / 3600:.1f} h" if count < 48 * 3600 else f"{count / 86400:.1f} days"


def _counts(counts: Counts, found: Estimate) -> Iterator[Row]:
    yield "cells", f"{sum(counts.cells.values()):,}", _listed(counts.cells)
    yield "images", f"{counts.train + counts.test:,}", f"{counts.train:,} to learn from, {counts.test:,} to test on"
    yield "steps", f"{sum(counts.steps.values()):,}", _listed(counts.steps)
    if counts.tower:
        yield "vision tower", f"{counts.tower:,} images", _turns(found.encoding_schedule)
    if counts.backbone:
        yield "backbone", f"{counts.backbone:,} images", "each once for all cells"
    if counts.training_tokens is None or counts.question_tokens is None:
        if counts.asked:
            yield "tokens", "unknown", found.no_tokens
        return
    assumed = any(each.assumed for each in (found.lengths or {}).values())
    note = ", for photographs of 480 x 360 pixels where a data set is not here" if assumed else ""
    if counts.training_tokens:
        yield "tokens in training", f"{counts.training_tokens:,}", f"about{note}"
    if counts.asked:
        yield "tokens of questions", f"{counts.question_tokens:,}", f"about, in {counts.asked:,} questions"


def _turns(when: EncodingSchedule) -> str:
    """How often the tower sees them."""
    if not (when.worker or when.cell):
        return "each once for all cells, mirrored twins too"
    said = (
        ("each once for all cells, mirrored twins too: {}", when.once),
        ("once in every worker: {} (their features do not fit beside those of the sets before)", when.worker),
        (f"again in every cell: {{}} (their features do not fit into {size(when.room)})", when.cell),
    )
    return "; ".join(line.format(", ".join(sources)) for line, sources in said if sources)


def _downloads(found: Estimate) -> Iterator[Row]:
    if not found.room.downloads:
        yield "downloads", "0", "all that is needed is on this machine"
    for each in found.room.downloads:
        amount = "unknown" if each.bytes is None else size(each.bytes)
        yield "download", amount, each.name if each.source == HUB else f"{each.name} ({each.source})"


def _memory(found: Estimate) -> Iterator[Row]:
    memory = found.room.memory
    most = f"{', '.join(f'{size(count)} {name}' for name, count in memory.parts.items() if count)}"
    yield "memory of a worker", size(memory.worker), most
    for name in memory.unknown:
        yield "", "unknown", f"what {name} takes"
    fits = "fits" if memory.fits else f"does not fit: there is room for {memory.fitting}"
    yield (
        "memory",
        size(memory.needed),
        f"{_worker_count(memory.workers)}, of {size(memory.free)} that are free: {fits}",
    )


def _disks(found: Estimate) -> Iterator[Row]:
    for disk in found.room.disks:
        fits = "fits" if disk.fits else "does not fit"
        parts = ", ".join(f"{size(count)} {what}" for what, count in disk.needs.items() if count)
        yield "disk", size(disk.needed), f"{parts}; of {size(disk.free)} that are free at {disk.folder}: {fits}"


def _time(found: Estimate) -> Iterator[Row]:
    if found.spent is None or found.measured is None:
        yield "time", "unknown", found.no_time
        return
    spent: Spent = found.spent
    start, prepare, encode, cells = (seconds(each) for each in (spent.start, spent.prepare, spent.encode, spent.cells))
    parts = f"{start} to start, {prepare} to read images, {encode} to encode them, {cells} of cells"
    yield "time", seconds(spent.total), f"{parts}; {_worker_count(found.room.workers)}"
    each = ", ".join(f"{name} {seconds(count)}" for name, count in spent.methods.items())
    yield "", seconds(sum(spent.methods.values())), f"of one worker: {each}"
    yield "", "", f"measured here in {seconds(found.measured.spent)}; less where image features are kept from before"


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _worker_count(count: int) -> str:
    return "1 worker" if count == 1 else f"{count} workers"
