"""What the tests read from a results folder."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from experiments.sweep.store import Results

CLASSES = ("café déjà vu", "<script>alert(1)", "a|b")


def numbers(folder: Path) -> dict[str, tuple[dict[str, Any], pa.Table]]:
    """All that must be the same bit for bit: records without timings, and predictions."""
    results = Results(folder)
    records = {record["key"]: {**record, "timings": None} for record in results.cells()}
    return {key: (record, results.predictions(key)) for key, record in records.items()}


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its time of change and its content; the lock is no content."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in paths}


def rewrite(path: Path, **changes: object) -> None:
    """A JSON file with some fields changed."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
