"""What a sweep will take, before it starts: downloads, memory, disk, computation, time; and whether there is room."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.plan.counts import Counts, LengthTable, count, prompt_lengths
from experiments.plan.memory import PASS, Memory, memory, tightest
from experiments.plan.ranks import RanksPlan, of_workload
from experiments.plan.ranks import rows as rows_of_ranks
from experiments.plan.storage import HUB, Disk, Download, disks, downloads
from experiments.plan.time import Measurement, SweepTime, measure, sweep_time
from experiments.sweep import workers as executors
from experiments.sweep.config import RunOptions
from experiments.sweep.grid import gpu_groups, worker_place
from experiments.sweep.workload import EncodingSchedule, Workload, encoding_jobs, encoding_schedule
from experiments.terminal import out, plain_table
from kshot.errors import InputError, RequestError


@dataclass(frozen=True)
class Requirements:
    """What a sweep needs of a machine, as far as it is known without a measurement. ranks: what the VLM takes in each
    process of a worker, where it is over several and that is known."""

    workers: int
    downloads: Sequence[Download]
    memory: Memory
    disks: Sequence[Disk]
    ranks: RanksPlan | None = None


@dataclass(frozen=True)
class Estimate:
    """time, lengths: None where the time, or the numbers of tokens, are not known: `no_time`, `no_tokens` say why.
    no_service: why the service does not answer; "" where it does. machine: what the time was estimated for from stored
    rates, "" where it was measured here; basis: where those come from."""

    requirements: Requirements
    encoding_schedule: EncodingSchedule
    counts: Counts
    lengths: LengthTable | None
    measurement: Measurement | None
    time: SweepTime | None
    no_time: str = ""
    no_tokens: str = ""
    no_service: str = ""
    machine: str = ""
    basis: str = ""


def requirements(workload: Workload, out: Path, options: RunOptions, free: int | None = None) -> Requirements:
    """Without a measurement. out: the results folder. free: bytes of each GPU of a machine that is not here, and that
    has enough of them for options.workers."""
    from vlm import service

    gpus = () if free is not None else gpu_groups(_here(options), here=False)
    most = executors.room(options.threads, options.ranks, gpus) if gpus or workload.device == "cpu" else 1
    workers = max(1, min(options.workers or most, max(len(workload.cells), encoding_jobs(workload))))
    if free is None and (device := tightest(options.device, workers * options.gpus_per_worker)):
        free = service.free_bytes(device)
    found, fetched = of_workload(workload, options.ranks, free), downloads(workload)
    needed = memory(workload, workers, options.device, found)
    return Requirements(workers, fetched, needed, disks(workload, out, fetched, workers), found)


def _here(options: RunOptions) -> RunOptions:
    """What is planned is what this machine would do, also where a cluster will run it."""
    return replace(options, executor="local")


def estimate(workload: Workload, out: Path, options: RunOptions) -> Estimate:
    """The whole estimate, for a device and a service that need not be here; the time is measured where all that it
    needs is here and fits. Raises what loading the models raises, UnknownNameError for what can be no service."""
    no_service = _unanswered(options.service)
    needed, schedule = requirements(workload, out, options), encoding_schedule(workload)
    lengths, no_tokens = prompt_lengths(workload)
    counts = count(workload, lengths)
    if no_time := _unmeasured(workload, needed) or no_tokens:
        return Estimate(needed, schedule, counts, lengths, None, None, no_time, no_tokens, no_service)
    workers, gpus = needed.workers, gpu_groups(_here(options))
    placed = replace(workload, device=worker_place(options.device, options.gpus_per_worker))
    measured = measure(placed, workers, lengths, threads=options.threads, ranks=options.ranks, gpus=gpus)
    needed = replace(needed, memory=replace(needed.memory, measured=measured.peak if workload.device == "cpu" else 0))
    return Estimate(needed, schedule, counts, lengths, measured, sweep_time(workload, measured, workers))


def _unanswered(service: str) -> str:
    from vlm.service import check

    try:
        check(service)
    except RequestError as error:
        return str(error)
    return ""


def _unmeasured(workload: Workload, needed: Requirements) -> str:
    """Why no time can be measured; "" where it can."""
    if not workload.cells:
        return "nothing is left to compute"
    if workload.service != "local":
        return f"the time of the service {workload.service} is not measured: its use may cost"
    if any(cell.spec.uses_vlm and cell.settings.thinking for cell in workload.cells):
        return "not measured with --thinking: how long the model thinks is not known before"
    if needed.memory.free is None:
        where = needed.memory.location.removeprefix("the memory of ")
        return f"not known for {where} here: --plan measures it on a machine that has it"
    if needed.downloads:
        names = ", ".join(each.name for each in needed.downloads)
        return f"{names} must be downloaded before the time can be measured"
    return "" if needed.memory.fits else "it does not fit into the memory"


OTHER_DISK = {"downloads": "HF_HOME", "results": "--out"}  # what names a folder on another disk; else KSHOT_CACHE


def check(needed: Requirements) -> None:
    """Raise InputError, with the need, what is free and the way out, where a sweep does not fit."""
    for disk in needed.disks:
        if not disk.fits:
            largest = max(disk.needs, key=lambda what: disk.needs[what])
            raise InputError(
                f"the sweep needs {_size(disk.needed)} of disk at {disk.folder}, most of it for {largest}, and "
                f"{_size(disk.free)} are free; make room, or name a folder on another disk "
                f"({OTHER_DISK.get(largest, 'KSHOT_CACHE')})"
            )
    m = needed.memory
    if m.free is None or m.fits:
        return
    largest = max(m.parts, key=lambda what: m.parts[what])
    subject = f"{m.workers} workers need" if m.workers > 1 else "a worker needs"
    ways = [f"--workers {m.possible_workers}"] if 0 < m.possible_workers < m.workers else []
    ways += ["a smaller batch (--set batch_size=8)"] if largest == PASS else []
    ways += ["a smaller model"] if largest != "libraries" else ["another machine"]
    need = f"{subject} {_size(m.needed)} of {m.location}, most of it for {largest}"
    raise InputError(f"{need}, and {_size(m.free)} are free; use {' or '.join(ways)}")


Row = tuple[str, str, str]  # what, how much, of what


def print_estimate(estimate: Estimate) -> None:
    table = plain_table(["", "", ""])
    table.show_header = False
    for row in rows(estimate):
        table.add_row(*row)
    out.print(table, soft_wrap=False)


def rows(estimate: Estimate) -> list[Row]:
    needed, counts = estimate.requirements, _counts(estimate)
    return [*counts, *_downloads(needed), *_ranks(needed), *_memory(needed.memory), *_disks(needed), *_time(estimate)]


def _counts(estimate: Estimate) -> Iterator[Row]:
    counts = estimate.counts
    yield "cells", f"{sum(counts.cells.values()):,}", _listed(counts.cells)
    yield "images", f"{counts.train + counts.test:,}", f"{counts.train:,} to learn from, {counts.test:,} to test on"
    yield "steps", f"{sum(counts.steps.values()):,}", _listed(counts.steps)
    if counts.tower:
        yield "vision tower", f"{counts.tower:,} images", _schedule(estimate.encoding_schedule)
    if counts.backbone:
        yield "backbone", f"{counts.backbone:,} images", "each once for all cells"
    if counts.prompts and estimate.lengths is None:
        yield "tokens", "unknown", estimate.no_tokens
    assumed = any(each.assumed for each in (estimate.lengths or {}).values())
    note = ", for photographs of 480 x 360 pixels where a data set is not here" if assumed else ""
    if counts.training_tokens:
        yield "tokens in training", f"{counts.training_tokens:,}", f"about{note}"
    if counts.prompts and counts.prompt_tokens is not None:
        yield "tokens of questions", f"{counts.prompt_tokens:,}", f"about, in {counts.prompts:,} questions"


def _schedule(schedule: EncodingSchedule) -> str:
    """How often the vision tower encodes an image."""
    ahead = f"each once for all cells{', mirrored twins too' if schedule.mirrored else ''}"
    if not (schedule.per_worker or schedule.per_cell):
        return ahead
    lines = (
        (f"{ahead}: {{}}", schedule.ahead),
        ("once in every worker: {} (their features do not fit beside those of the sets before)", schedule.per_worker),
        (
            f"again in every cell: {{}} (their features do not fit into {_size(schedule.capacity)})",
            schedule.per_cell,
        ),
    )
    return "; ".join(line.format(", ".join(sources)) for line, sources in lines if sources)


def _downloads(needed: Requirements) -> Iterator[Row]:
    if not needed.downloads:
        yield "downloads", "0", "all that is needed is on this machine"
    for each in needed.downloads:
        amount = "unknown" if each.bytes is None else _size(each.bytes)
        yield "download", amount, each.name if each.source == HUB else f"{each.name} ({each.source})"


def to_download(needed: Requirements) -> list[str]:
    """A line on each thing that must be fetched first, with its size."""
    return [f"to download: {name}, {amount}" for what, amount, name in _downloads(needed) if what == "download"]


def _ranks(needed: Requirements) -> Iterator[Row]:
    if found := needed.ranks:
        where = "processes of one thread" if found.on_cpu else "one a GPU"
        yield "ranks", f"{found.count}", f"of each worker's VLM, {where}"
        yield from rows_of_ranks(found, alone=False)  # the rows of memory count the rest, and say whether all fits


def _memory(memory: Memory) -> Iterator[Row]:
    yield "memory of a worker", _size(memory.per_worker), _sizes(memory.parts)
    for name in memory.unknown:
        yield "", "unknown", f"what {name} takes"
    if memory.free is None:
        yield "memory", _size(memory.needed), f"{_workers(memory.workers)}; {memory.location} is not known here"
        return
    fits = "fits" if memory.fits else f"does not fit: there is room for {memory.possible_workers}"
    yield (
        "memory",
        _size(memory.needed),
        f"{_workers(memory.workers)}, of {_size(memory.free)} that are free: {fits}",
    )


def _disks(needed: Requirements) -> Iterator[Row]:
    for disk in needed.disks:
        fits = "fits" if disk.fits else "does not fit"
        free = f"of {_size(disk.free)} that are free at {disk.folder}: {fits}"
        yield "disk", _size(disk.needed), f"{_sizes(disk.needs)}; {free}"


def _time(estimate: Estimate) -> Iterator[Row]:
    time, measurement = estimate.time, estimate.measurement
    if estimate.no_service:
        yield "service", "no answer", estimate.no_service
    if time is None or measurement is None:
        yield "time", "unknown", estimate.no_time
        return
    start, prepare, encode, cells = map(duration, (time.start, time.prepare, time.encode, time.cells))
    parts = f"{start} to start, {prepare} to read images, {encode} to encode them, {cells} of cells"
    yield "time", duration(time.total), f"{parts}; {_workers(estimate.requirements.workers)}"
    each = ", ".join(f"{name} {duration(seconds)}" for name, seconds in time.methods.items())
    yield "", duration(sum(time.methods.values())), f"of one worker: {each}"
    if estimate.machine:
        yield "", "", f"an ESTIMATE for {estimate.machine}: nothing was measured; {estimate.basis}"
        return
    yield "", "", f"measured here in {duration(measurement.seconds)}; less where image features are kept from before"


def duration(seconds: float) -> str:
    """A time in the unit that people use for it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _sizes(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{_size(count)} {name}" for name, count in parts.items() if count)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _workers(count: int) -> str:
    return "1 worker" if count == 1 else f"{count} workers"
