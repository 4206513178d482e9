"""What every benchmark shares: timing in turns, the record of machine and versions, the JSON file and the table.

Knows no benchmark. A result is {"machine", "versions", "rows": [{"name", "median", "unit", ...}], "ratios": {...}}.
"""

import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from experiments.terminal import out, plain_table, print_paths
from kshot_errors import ResultsError
from kshot_files import write_file
from kshot_machine import processor

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
