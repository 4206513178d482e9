"""A results folder: sweep.json, cells/<key>.json, predictions/<key>.parquet. Knows no method and draws nothing.

Every file is written to a temporary name and renamed, predictions before their cell: a cell that exists is complete.
One writer a folder, held by a lock that dies with its process.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from kshot_errors import ResultsError
from kshot_files import remove_unfinished, write_file

if TYPE_CHECKING:
    import pyarrow as pa

GROWING = ("datasets", "methods", "shots", "seeds")  # what a folder may gain from one run to the next


class Results:
    """The results of one sweep, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder for writing, made if it is not there. Raises ResultsError where that cannot be."""
        try:
            for part in ("cells", "predictions", "figures"):
                (self.folder / part).mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / ".lock", blocking=False)
            lock.acquire()
        except Timeout as error:
            raise ResultsError(f"{self.folder} is being written by another kshot; wait for it or use --out") from error
        except OSError as error:
            reason = f"cannot write to {self.folder}: {error.strerror}"
            raise ResultsError(f"{reason}; choose another folder with --out") from error
        try:
            for part in ("", "cells", "predictions", "figures"):
                remove_unfinished(self.folder / part)
            yield
        finally:
            lock.release()

    def begin(self, sweep: Mapping[str, Any]) -> dict[str, Any]:
        """Write sweep.json, joined with the one that is there; returns the joined one.

        Data sets, methods, shots and seeds may grow; raises ResultsError, with the difference, for any other change.
        """
        path = self.folder / "sweep.json"
        old = self.sweep() if path.exists() else {}
        _check_same(self.folder, old.get("settings", sweep["settings"]), sweep["settings"])
        joined = dict(sweep)
        for field in GROWING:
            joined[field] = _union(old.get(field, []), sweep[field])
        joined["classes"] = {**old.get("classes", {}), **sweep["classes"]}
        _write_json(path, joined)
        return joined

    def sweep(self) -> dict[str, Any]:
        """The content of sweep.json. Raises ResultsError where there is none."""
        return _read_json(self.folder / "sweep.json", f"{self.folder} holds no results")

    def has(self, key: str) -> bool:
        return (self.folder / "cells" / f"{key}.json").exists()

    def add(self, record: Mapping[str, Any], predictions: "pa.Table") -> None:
        """Store a finished cell."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        buffer = pa.BufferOutputStream()
        pq.write_table(predictions, buffer)
        write_file(self.folder / "predictions" / f"{record['key']}.parquet", buffer.getvalue().to_pybytes())
        _write_json(self.folder / "cells" / f"{record['key']}.json", record)

    def cells(self) -> list[dict[str, Any]]:
        """The records of all finished cells, in the order of data set, method, shots and seed."""
        paths = (self.folder / "cells").glob("*.json")
        records = [_read_json(path, "a cell's record is missing") for path in paths]
        return sorted(records, key=lambda r: (r["dataset"], r["method"], r["shots"], r["seed"], r["key"]))

    def predictions(self, key: str) -> "pa.Table":
        """The stored predictions of a cell. Raises ResultsError where they cannot be read."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.folder / "predictions" / f"{key}.parquet"
        try:
            return pq.read_table(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise ResultsError(f"{path} cannot be read; delete cells/{key}.json and run the sweep again") from error


def _check_same(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    changed = [f"{k} {old.get(k)!r} → {new.get(k)!r}" for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
    if changed:
        raise ResultsError(
            f"{folder} holds results of another configuration ({'; '.join(changed)}); choose another folder with --out"
        )


def _union(old: list[Any], new: list[Any]) -> list[Any]:
    both = list(dict.fromkeys([*old, *new]))
    return sorted(both) if all(isinstance(each, int) for each in both) else both


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_file(path, f"{text}\n".encode())


def _read_json(path: Path, missing: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"{missing}: no readable {path.name} ({error.strerror})") from error
    except ValueError as error:
        raise ResultsError(f"{path} is damaged ({error}); delete it and run the sweep again") from error
    return content
