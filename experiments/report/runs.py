"""The tables of a report on how it was run: what, at what cost, what is missing, and where the numbers come from.

Cell records and the content of sweep.json in, tables out.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from experiments.report.document import Table
from experiments.report.tables import NONE, Record
from experiments.sweep.config import MODELS, capped
from experiments.sweep.methods import METHODS
from experiments.sweep.metrics import seeds_of
from experiments.sweep.provenance import name
from experiments.sweep.series import by_series, method_of, ordered, style

CellId = tuple[str, str, int, int]  # dataset, method or series, shots, seed
PHASES = ("fit", "predict", "answer")
WORK = {"vision_forwards": "vision forwards", "train_tokens": "training tokens"}  # what a record may count

# Cost


def timings_table(cells: Sequence[Record]) -> Table:
    """Median seconds per cell to fit and to predict, by method."""
    rows = []
    for title, group in _by_method(cells).items():
        times = [_known(group, "timings", f"{phase}_seconds") for phase in ("fit", "predict")]
        rows.append((title, *(f"{median(seconds):.2f}" if seconds else NONE for seconds in times)))
    caption = (
        "Median seconds per cell. What an earlier cell has loaded, or an earlier cell or sweep has encoded, costs "
        "nothing again."
    )
    return Table(caption, ("method", "fit", "predict"), tuple(rows))


def cost_table(cells: Sequence[Record]) -> Table:
    """What all cells of each method took, and below them those of the sweep."""
    counted = [kind for kind in WORK if _known(cells, "work", kind)]
    groups = {**_by_method(cells), "the whole sweep": cells}
    rows = [_cost_row(title, group, counted) for title, group in groups.items()]
    caption = (
        "Cost: seconds that the cells took, summed, and in hours of a core; a cell has one core, or on a GPU the hours "
        "are those of that GPU. What another cell or sweep has loaded or encoded before costs nothing again."
    )
    if counted:
        caption += (
            " Counts are of the cells that recorded any: images that the vision tower saw, and tokens trained on."
        )
    header = ("method", "cells", *PHASES, "all seconds", "per cell", "core-hours", *(WORK[kind] for kind in counted))
    return Table(caption, header, tuple(rows))


def _by_method(cells: Sequence[Record]) -> dict[str, list[Record]]:
    """{title of a method: its cells}."""
    return {
        style(method).title: [cell for cell in cells if cell["method"] == method]
        for method in ordered(cell["method"] for cell in cells)
    }


def _known(cells: Sequence[Record], record: str, key: str) -> list[Any]:
    """The values of the cells that recorded one."""
    return [value for cell in cells if (value := cell.get(record, {}).get(key)) is not None]


def _cost_row(title: str, cells: Sequence[Record], counted: Sequence[str]) -> tuple[str, ...]:
    phases = [_known(cells, "timings", f"{phase}_seconds") for phase in PHASES]
    seconds = sum(second for known in phases for second in known)
    totals = (f"{seconds:,.1f}", f"{seconds / len(cells):,.2f}", f"{seconds / 3600:,.3f}")
    counts = [_known(cells, "work", kind) for kind in counted]
    return (
        title,
        str(len(cells)),
        *(f"{sum(known):,.1f}" if known else NONE for known in phases),
        *(totals if any(phases) else [NONE] * 3),
        *(f"{sum(known):,}" if known else NONE for known in counts),
    )


# What was run


def facts_table(
    sweep: Record, cells: Sequence[Record], n_images: Mapping[str, int], n_classes: Mapping[str, int]
) -> Table:
    """Per data set: classes, test images, seeds, cells; where models were trained, how often images were mirrored."""
    rows: list[tuple[str, ...]] = []
    for dataset in sweep["datasets"]:
        here = [cell for cell in cells if cell["dataset"] == dataset]
        counts = n_classes.get(dataset, NONE), n_images.get(dataset, NONE), len(seeds_of(here, dataset)), len(here)
        hflips = ", ".join(f"{hflip:g}" for hflip in sorted({*_known(here, "settings", "hflip")}))
        rows.append((name(dataset), *map(str, counts), hflips or NONE))
    header: tuple[str, ...] = ("data set", "classes", "test images", "seeds", "cells", "hflip")
    if all(row[-1] == NONE for row in rows):
        return Table("What was run.", header[:-1], tuple(row[:-1] for row in rows))
    caption = "What was run. hflip: the share of training views that were mirrored, as it was set."
    return Table(caption, header, tuple(rows))


def prompts_table(sweep: Record) -> Table | None:
    """The prompts by the numbers that name them; None where there are not several."""
    rows = [(str(number), text) for number, text in enumerate(sweep.get("prompts", ()), 1)]
    return Table("Prompts.", ("prompt", "text"), tuple(rows)) if len(rows) > 1 else None


def missing_table(sweep: Record, cells: Sequence[Record], failures: Mapping[CellId, str]) -> Table | None:
    """The cells of the grid that are missing, one row per (data set, method, seed) and error; None when none is.
    failures: the error of those that were tried and failed, by the method's name without what is compared."""
    present = {(cell["dataset"], cell["method"], cell["shots"], cell["seed"]) for cell in cells}
    missing: dict[tuple[str, str, int, str], list[int]] = defaultdict(list)
    for dataset, method, shots, seed in full_grid(sweep, cells):
        if (dataset, method, shots, seed) not in present:
            error = failures.get((dataset, method_of(method), shots, seed), "")
            missing[dataset, method, seed, error].append(shots)
    if not missing:
        return None
    caption = f"Cells not run yet: {sum(map(len, missing.values()))}."
    header: tuple[str, ...] = ("data set", "method", "seed", "shots", "error")
    rows = [
        (name(dataset), style(method).title, str(seed), ", ".join(map(str, sorted(shots))), error or NONE)
        for (dataset, method, seed, error), shots in missing.items()
    ]
    failed = sum(len(shots) for (*_, error), shots in missing.items() if error)
    if not failed:
        return Table(caption, header[:-1], tuple(row[:-1] for row in rows))
    caption += f" Of them {failed} failed, with the error that is shown; {NONE}: not tried."
    return Table(caption, header, tuple(rows), prose=True)


def full_grid(sweep: Record, cells: Sequence[Record]) -> list[CellId]:
    """All cells of the sweep, a method with each combination of what is compared and it reads. A zero-shot method
    counts once per data set and series: under the seed it ran with, else 0."""
    sweep, cells = by_series(sweep, cells)
    grid: list[CellId] = []
    for dataset in sweep["datasets"]:
        shots = capped(sweep["shots"], sweep.get("most_shots", {}).get(dataset))
        for method in sweep["methods"]:
            if method_of(method) in METHODS and not METHODS[method_of(method)].learns:
                seeds = [c["seed"] for c in cells if c["dataset"] == dataset and c["method"] == method]
                grid.append((dataset, method, 0, min(seeds, default=0)))
            else:
                grid += [(dataset, method, k, seed) for k in shots if k for seed in sweep["seeds"]]
    return grid


# Where the numbers come from


def provenance_tables(sweep: Record, cells: Sequence[Record]) -> Iterator[Table]:
    """Data, models, machines, settings and versions, each where something is recorded of it."""
    if sweep.get("protocols"):
        yield _data_table(sweep)
    if models := _models_table(sweep):
        yield models
    if cells:
        yield _machines_table(cells)
    if sweep.get("settings"):
        yield _settings_table("Settings of the sweep.", "setting", sweep["settings"])
    if cells:
        yield _settings_table("Versions.", "package", *(cell["versions"] for cell in cells))


def _data_table(sweep: Record) -> Table:
    """Per data set its protocol, and what is recorded of its files: their source and fingerprints."""
    rows = []
    for dataset, protocol in sweep["protocols"].items():
        facts = [f"{key}: {value}" for key, value in _leaves(sweep.get("data", {}).get(dataset, {})) if value]
        rows.append((name(dataset), protocol, "; ".join(facts) or NONE))
    if all(row[-1] == NONE for row in rows):
        return Table("Data: the protocol.", ("data set", "protocol"), tuple(row[:-1] for row in rows), prose=True)
    caption = "Data: the protocol, and its files as they were found."
    return Table(caption, ("data set", "protocol", "files"), tuple(rows), prose=True)


def _models_table(sweep: Record) -> Table | None:
    """The models that the methods read, with their revisions, each of several that are compared in a row of its own;
    None where they read none."""
    settings, methods = sweep.get("settings", {}), map(method_of, sweep["methods"])
    read = {setting for method in methods if method in METHODS for setting in METHODS[method].settings}
    rows: list[tuple[str, ...]] = []
    for kind in (kind for kind in MODELS if kind in settings and kind in read):
        names, revisions = (as_list(settings.get(key)) for key in (kind, f"{kind}_revision"))
        revisions = revisions if len(revisions) == len(names) else revisions * len(names)
        rows += [
            (kind, _value(model), NONE if revision is None else _value(revision))
            for model, revision in zip(names, revisions, strict=True)
        ]
    caption = f"Models: the revision is a fingerprint of the weights. {NONE}: of a hub, its newest at the time."
    return Table(caption, ("setting", "model", "revision"), tuple(rows), prose=True) if rows else None


def _machines_table(cells: Sequence[Record]) -> Table:
    """The kinds of machines and services that ran the cells, and how many cells each."""
    counts = Counter((cell["versions"].get("machine", NONE), cell["versions"].get("service", NONE)) for cell in cells)
    rows = tuple((machine, service, str(count)) for (machine, service), count in sorted(counts.items()))
    caption = "Machines: system, processor and device, and the service that computed."
    return Table(caption, ("machine", "service", "cells"), rows)


def _settings_table(caption: str, header: str, *records: Record) -> Table:
    """Nested settings, one row per leaf in order of name; records that differ show every value."""
    leaves: dict[str, set[str]] = defaultdict(set)
    for record in records:
        for key, value in _leaves(record):
            leaves[key].add(value)
    rows = [(name(key), "; ".join(sorted(values))) for key, values in sorted(leaves.items())]
    return Table(caption, (header, "value"), tuple(rows))


def as_list(value: Any) -> list[Any]:
    """The values of a setting: several where they are compared."""
    return list(value) if isinstance(value, list | tuple) else [value]


def _leaves(record: Record, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _value(value)


def _value(value: Any) -> str:
    if isinstance(value, str):
        return name(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value))
    return json.dumps(value, sort_keys=True)
