"""An estimate as a table for the terminal. Computes nothing but units."""

from collections.abc import Iterator, Mapping

from experiments.estimate import Estimate, size
from experiments.estimate_counts import Counts
from experiments.estimate_downloads import HUB
from experiments.estimate_features import Turns
from experiments.estimate_time import Spent
from experiments.terminal import out, plain_table

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
        yield "vision tower", f"{counts.tower:,} images", _turns(found.turns)
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


def _turns(when: Turns) -> str:
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
    yield "memory", size(memory.needed), f"{_workers(memory.workers)}, of {size(memory.free)} that are free: {fits}"


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
    yield "time", seconds(spent.total), f"{parts}; {_workers(found.room.workers)}"
    each = ", ".join(f"{name} {seconds(count)}" for name, count in spent.methods.items())
    yield "", seconds(sum(spent.methods.values())), f"of one worker: {each}"
    yield "", "", f"measured here in {seconds(found.measured.spent)}; less where image features are kept from before"


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _workers(count: int) -> str:
    return "1 worker" if count == 1 else f"{count} workers"
