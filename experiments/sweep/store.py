"""A results folder: sweep.json, a record of each finished cell, and its predictions in predictions/<key>.parquet.

A record is a file, cells/<key>.json, or in a packed folder a line of cells.jsonl; a file wins over a line of the same
key. A cell that failed has failed/<key>.json instead. Files are complete or not there, and predictions are written
before their record: a cell that has one is complete. A folder has one writer, by a lock that ends with its process.
"""

import errno
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from experiments.sweep.config import LATER, Settings
from kshot.errors import KshotError, ResultsError
from kshot.files import remove_unfinished, write_file
from kshot.untrusted import check_regular, parse_json, read_file, set_damaged_aside

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

GROWING = ("datasets", "methods", "shots", "seeds", "notes")  # what a folder may gain from one run to the next
COMPUTED = ("service", "device")  # what computed the numbers, and on what kind of device
SWEEP_FIELDS = (*GROWING, "name", "settings", "protocols", "classes")
IDENTITY = ("key", "dataset", "protocol", "method", "shots", "seed", "settings")
CELL_FIELDS = (*IDENTITY, "test_images", "metrics", "timings", "versions")
FAILURE_FIELDS = (*IDENTITY, "error", "exit_status")
FOLDERS = ("cells", "predictions", "figures")
PACKED = "cells.jsonl"
WRONG_FILE = None, errno.ENOENT, errno.EINVAL, errno.EISDIR, errno.EFBIG  # none: of what a library finds in it
RUN_AGAIN = "run the sweep again"
_LATER = {name: getattr(Settings(), name) for name in LATER}  # which a folder need not have


class Results:
    """The results of one sweep, in `folder`."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def sweep(self) -> dict[str, Any]:
        """The content of sweep.json. Raises ResultsError where there is none."""
        missing = f"{self.folder} is no results folder; name one that kshot sweep wrote, or a new one with --out"
        path = self.folder / "sweep.json"
        return _checked(_read(path, missing), path, SWEEP_FIELDS, "restore it or use another --out")

    def cells(self) -> list[dict[str, Any]]:
        """The records of all finished cells, in the order of data set, method, shots and seed."""
        return _in_order({**self._packed(), **_records(self._paths(), CELL_FIELDS)}.values())

    def frame(self) -> "pd.DataFrame":
        """A row a finished cell, in the order of `cells`. Columns: dataset, protocol, method (its name on the command
        line), shots, seed; `accuracy`, which reports show, and every other metric (see
        `experiments.sweep.metrics.metrics`); and each setting. What a method does not have or read is missing (NaN).

        Raises ResultsError where `folder` has no results."""
        import pandas as pd

        self.sweep()  # a misspelt folder is no empty table
        cells, fields = self.cells(), IDENTITY[1:-1]
        rows = [{**{name: c[name] for name in fields}, **c["metrics"], **c["settings"]} for c in cells]
        metrics = dict.fromkeys(["accuracy", *(name for cell in cells for name in cell["metrics"])])
        columns = dict.fromkeys([*fields, *metrics, *(name for row in rows for name in row)])
        return pd.DataFrame(rows, columns=[*columns]).astype(dict.fromkeys(metrics, float))

    def predictions(self, key: str) -> "pa.Table":
        """The stored predictions of a cell. Raises ResultsError where they cannot be read."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.folder / "predictions" / f"{key}.parquet"
        try:
            check_regular(path)
            return pq.read_table(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise ResultsError(f"{path} cannot be read; {RUN_AGAIN}") from error

    def failures(self) -> list[dict[str, Any]]:
        """What `fail` noted, in the order of data set, method, shots and seed."""
        finished = self.finished()
        left = (path for path in self._failed() if path.stem not in finished)
        return _in_order(_records(left, FAILURE_FIELDS).values())

    def failed_keys(self) -> set[str]:
        """The keys of the cells that `failures` lists; no file is read."""
        return {path.stem for path in self._failed()} - self.finished()

    def finished(self) -> set[str]:
        """The keys of the cells whose record and predictions are both there."""
        records = {path.stem for path in self._paths()} | self._packed().keys()
        return records & {path.stem for path in (self.folder / "predictions").glob("*.parquet")}

    def has_cells(self) -> bool:
        """Whether the folder has a record of a cell."""
        return any(self._paths()) or (self.folder / PACKED).exists()

    def has_predictions(self) -> bool:
        """Whether any are there; committed results leave all of them out."""
        return any((self.folder / "predictions").glob("*.parquet"))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder for writing, made if it is not there. Raises ResultsError where that cannot be."""
        there = self.folder.iterdir() if self.folder.is_dir() else ()
        visible = {path.name for path in there if not path.name.startswith(".")}
        if "sweep.json" not in visible and not visible <= {*FOLDERS, "failed"}:
            raise ResultsError(
                f"{self.folder} holds other things and no results; choose a new or empty folder with --out"
            )
        try:
            for part in FOLDERS:
                (self.folder / part).mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / ".lock", blocking=False)
            lock.acquire()
        except Timeout as error:
            raise ResultsError(f"{self.folder} is being written by another kshot; wait for it or use --out") from error
        except OSError as error:
            message = f"cannot write to {self.folder}: {error.strerror}; choose another folder with --out"
            raise ResultsError(message) from error
        try:
            for part in ("", *FOLDERS, "failed"):
                remove_unfinished(self.folder / part)
            yield
        finally:
            lock.release()

    def begin(self, sweep: Mapping[str, Any]) -> dict[str, Any]:
        """Write sweep.json, joined with the one that is there; returns the joined one. Data sets, methods, shots and
        seeds may grow; raises ResultsError, with the difference, for any other change, also of what is compared: a
        value that is new or left out is more likely a slip than a wish to go on for hours. A folder without a finished
        cell takes any sweep, and forgets the failures of the last one. Files of cells that are damaged are set aside:
        these cells are missing then."""
        joined = dict(sweep)
        if self.has_cells():
            old = self.sweep()
            self._check_same(old, sweep)
            joined.update({field: _union(old[field], sweep[field]) for field in GROWING})
            for field in ("protocols", "classes", "data", "most_shots", "views_per_class"):
                if both := {**old.get(field, {}), **sweep.get(field, {})}:
                    joined[field] = both
        else:
            for path in self._failed():
                path.unlink()
        self._set_damaged_aside()
        self._write_json("sweep.json", joined)
        return joined

    def add(self, record: Mapping[str, Any], predictions: "pa.Table") -> None:
        """Store a finished cell. Raises KshotError where the folder can no longer be written."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        buffer = pa.BufferOutputStream()
        pq.write_table(predictions, buffer)
        self._write(f"predictions/{record['key']}.parquet", buffer.getvalue().to_pybytes())
        self._write_json(f"cells/{record['key']}.json", record)
        (self.folder / "failed" / f"{record['key']}.json").unlink(missing_ok=True)

    def fail(self, record: Mapping[str, Any]) -> None:
        """Note why a cell has no result; a later `add` of it takes that back."""
        self._write_json(f"failed/{record['key']}.json", record)

    def recompute(self) -> int:
        """Compute the metrics of every finished cell again from its predictions, without a model; how many records were
        wrong and are rewritten, each where it is."""
        from experiments.sweep.metrics import metrics

        classes, wrong = self.sweep()["classes"], dict[str, dict[str, Any]]()
        for record in self.cells():
            correct = metrics(self.predictions(record["key"]), len(classes[record["dataset"]]))
            if correct != record["metrics"]:
                wrong[record["key"]] = {**record, "metrics": correct}
        for key in wrong.keys() & {path.stem for path in self._paths()}:
            self._write_json(f"cells/{key}.json", wrong[key])
        packed = self._packed()
        if wrong.keys() & packed.keys():
            self._write_packed([wrong.get(key, record) for key, record in packed.items()])
        return len(wrong)

    def pack(self) -> None:
        """Put the records of all cells into one file, cells.jsonl, in place of a file each."""
        self._write_packed(self.cells())
        for path in [*self._paths()]:
            path.unlink()
        if not any((self.folder / "cells").iterdir()):
            (self.folder / "cells").rmdir()

    def _paths(self) -> Iterator[Path]:
        return (self.folder / "cells").glob("*.json")

    def _failed(self) -> Iterator[Path]:
        return (self.folder / "failed").glob("*.json")

    def _set_damaged_aside(self) -> None:
        kinds: list[tuple[Iterable[Path], Callable[[Path], object]]] = [
            ((self.folder / "predictions").glob("*.parquet"), _check_parquet),
            (self._paths(), lambda path: _records([path], CELL_FIELDS)),
            (self._failed(), lambda path: _records([path], FAILURE_FIELDS)),
        ]
        for paths, check in kinds:
            for path in [*paths]:
                if _is_damaged(path, check):
                    set_damaged_aside(path)

    def _packed(self) -> dict[str, dict[str, Any]]:
        """The records of cells.jsonl by key; none where it is not there."""
        path = self.folder / PACKED
        if not path.exists():
            return {}
        lines = _read(path, f"the records are gone; {RUN_AGAIN}").removesuffix("\n").split("\n")
        way_out = f"delete the line and {RUN_AGAIN}"
        records = [_checked(text, f"{path}, line {n},", CELL_FIELDS, way_out) for n, text in enumerate(lines, 1)]
        return {record["key"]: record for record in records}

    def _write_packed(self, records: Iterable[Mapping[str, Any]]) -> None:
        lines = (json.dumps(record, ensure_ascii=False, allow_nan=False) for record in records)
        self._write(PACKED, "".join(f"{line}\n" for line in lines).encode())

    def _check_same(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        changed = _changes(*({**_LATER, **each["settings"]} for each in (old, new)))
        changed += _changes(*({f: each[f] for f in COMPUTED if f in old and f in new} for each in (old, new)))
        caps = [{f"most shots of {d}": k for d, k in each.get("most_shots", {}).items()} for each in (old, new)]
        changed += _changes(*({name: each[name] for name in caps[0].keys() & caps[1].keys()} for each in caps))
        common = old["protocols"].keys() & new["protocols"].keys()
        changed += _changes(*({f"images of {d}": each["protocols"][d] for d in common} for each in (old, new)))
        views = (each.get("views_per_class", {}) for each in (old, new))
        changed += _changes(*({f"views_per_class of {d}": each.get(d) for d in common} for each in views))
        if changed:
            differences = f"holds results of another configuration ({'; '.join(changed)})"
            raise ResultsError(f"{self.folder} {differences}; choose another folder with --out")

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        self._write(name, f"{text}\n".encode())

    def _write(self, name: str, content: bytes) -> None:
        try:
            (self.folder / name).parent.mkdir(exist_ok=True)
            write_file(self.folder / name, content)
        except OSError as error:  # it could be written when the sweep began
            reason = f"cannot write {self.folder / name}: {error.strerror}"
            raise KshotError(f"{reason}; make room, then the same command goes on from there") from error


def _in_order(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(records, key=lambda r: (r["dataset"], r["method"], r["shots"], r["seed"], r["key"]))


def _records(paths: Iterable[Path], fields: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The records of files by key."""
    gone, way_out = f"a record is gone; {RUN_AGAIN}", RUN_AGAIN
    return {path.stem: _checked(_read(path, gone), path, fields, way_out) for path in paths}


def _check_parquet(path: Path) -> None:
    """Raise OSError or ArrowException for a file without parquet's end: it is no file, empty, cut off or another."""
    import pyarrow.parquet as pq

    check_regular(path)
    pq.read_metadata(path)


def _is_damaged(path: Path, check: Callable[[Path], object]) -> bool:
    """Whether a check fails by what is there; not where the system refuses to read it, which may pass."""
    import pyarrow as pa

    try:
        check(path)
    except (OSError, pa.ArrowException, ResultsError) as error:
        reason = error.__cause__ if isinstance(error, ResultsError) else error
        return not isinstance(reason, OSError) or reason.errno in WRONG_FILE
    return False


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [f"{k} {old.get(k)!r} → {new.get(k)!r}" for k in sorted({*old, *new}) if old.get(k) != new.get(k)]


def _union(old: list[Any], new: list[Any]) -> list[Any]:
    both = list(dict.fromkeys([*old, *new]))
    return sorted(both) if all(isinstance(each, int) for each in both) else both


def _read(path: Path, missing: str) -> str:
    """The text of a file, of which `missing` says what it means where there is none."""
    try:
        return read_file(path).decode()
    except OSError as error:
        raise ResultsError(f"{missing} (no readable {path.name}: {error.strerror})") from error
    except ValueError as error:
        raise ResultsError(f"{path} is damaged ({error}); restore it") from error


def _checked(text: str, name: Path | str, fields: Sequence[str], way_out: str) -> dict[str, Any]:
    """The JSON object of a text. Raises ResultsError where it is none or lacks a field."""
    try:
        content: dict[str, Any] = parse_json(text)
    except ValueError as error:
        raise ResultsError(f"{name} is damaged ({error}); {way_out}") from error
    if absent := [field for field in fields if not isinstance(content, dict) or field not in content]:
        raise ResultsError(f"{name} is damaged (no {absent[0]!r}); {way_out}")
    return content
