"""The tables of where the numbers come from: data, models, machines, settings and versions.

Cell records and sweep.json in, tables out; it does not know what a setting or a fact means, nor Markdown or HTML.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.report.blocks import Cell, Table
from experiments.report.tables import NONE, Record
from experiments.sweep.methods import METHODS
from experiments.sweep.provenance import name
from experiments.sweep.series import method_of

MODELS = ("model", "backbone")  # the settings that name one; their revision is in `<name>_revision`


def provenance(sweep: Record, cells: Sequence[Record]) -> Iterator[Table]:
    """Every table that there is something to say in."""
    if sweep.get("protocols"):
        yield data_table(sweep)
    if models := models_table(sweep):
        yield models
    if cells:
        yield machines_table(cells)
    if sweep.get("settings"):
        yield settings_table("Settings of the sweep.", "setting", sweep["settings"])
    if cells:
        yield settings_table("Versions.", "package", *(cell["versions"] for cell in cells))


def data_table(sweep: Record) -> Table:
    """Per data set its protocol, and what is known of its files: where they came from, their fingerprints."""
    rows = []
    for dataset, protocol in sweep["protocols"].items():
        facts = [f"{key}: {value}" for key, value in _leaves(sweep.get("data", {}).get(dataset, {})) if value]
        rows.append((Cell(name(dataset)), Cell(protocol), Cell("; ".join(facts) or NONE)))
    caption = "Data: the protocol, and its files as they were found."
    return Table(caption, ("data set", "protocol", "files"), tuple(rows), prose=True)


def models_table(sweep: Record) -> Table | None:
    """The models that the methods read, with their revisions, each of several that are compared in a row of its own;
    None where they read none."""
    settings, read = sweep.get("settings", {}), {name for m in sweep["methods"] for name in _settings_of(m)}
    rows: list[tuple[Cell, ...]] = []
    for kind in (kind for kind in MODELS if kind in settings and kind in read):
        values, revisions = (_each(settings.get(key)) for key in (kind, f"{kind}_revision"))
        revisions = revisions if len(revisions) == len(values) else revisions * len(values)
        pairs = zip(values, revisions, strict=True)
        rows += [(Cell(kind), Cell(_value(value)), Cell(_revision(revision))) for value, revision in pairs]
    caption = f"Models: the revision is a fingerprint of the weights. {NONE}: of a hub, its newest at the time."
    return Table(caption, ("setting", "model", "revision"), tuple(rows), prose=True) if rows else None


def machines_table(cells: Sequence[Record]) -> Table:
    """The kinds of machines and services that ran the cells, and how many each."""
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for cell in cells:
        versions = cell["versions"]
        counts[versions.get("machine", NONE), versions.get("service", NONE)] += 1
    rows = [(Cell(machine), Cell(service), Cell(str(count))) for (machine, service), count in sorted(counts.items())]
    return Table(
        "Machines: system, processor and device, and the service that computed.",
        ("machine", "service", "cells"),
        tuple(rows),
    )


def settings_table(caption: str, header: str, *records: Record) -> Table:
    """Nested settings, one row per leaf in order of name; records that differ show every value."""
    leaves: dict[str, set[str]] = defaultdict(set)
    for record in records:
        for key, value in _leaves(record):
            leaves[key].add(value)
    rows = [(Cell(name(key)), Cell("; ".join(sorted(values)))) for key, values in sorted(leaves.items())]
    return Table(caption, (header, "value"), tuple(rows))


def _settings_of(series: str) -> tuple[str, ...]:
    method = method_of(series)
    return METHODS[method].settings if method in METHODS else ()


def _each(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _revision(value: Any) -> str:
    return NONE if value is None else _value(value)


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
