"""A results folder: sweep.json, cells/<key>.json, predictions/<key>.parquet, and failed/<key>.json where a cell failed.

Knows no method and draws nothing. Every file is written to a temporary name and renamed, predictions before their cell:
a cell that exists is complete.
One writer a folder, held by a lock that dies with its process.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from kshot.errors import KshotError, ResultsError
from kshot.files import remove_unfinished, write_file

if TYPE_CHECKING:
    import pyarrow as pa

GROWING = ("datasets", "methods", "shots", "seeds", "notes")  # what a folder may gain from one run to the next
COMPUTED = ("service", "device")  # who computed the numbers, and on what kind of device
SWEEP_FIELDS = (*GROWING, "name", "settings", "protocols", "classes")
IDENTITY = ("key", "dataset", "protocol", "method", "shots", "seed", "settings")
CELL_FIELDS = (*IDENTITY, "test_images", "metrics", "timings", "versions")


class Results:
    """The results of one sweep, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder for writing, made if it is not there. Raises ResultsError where that cannot be."""
        if self._is_foreign():
            raise ResultsError(
                f"{self.folder} holds other things and no results; choose a new or empty folder with --out"
            )
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
            for part in ("", "cells", "predictions", "figures", "failed"):
                remove_unfinished(self.folder / part)
            yield
        finally:
            lock.release()

    def _is_foreign(self) -> bool:
        """Whether the folder is somebody's: it has visible things in it that no sweep made."""
        if not self.folder.is_dir() or (self.folder / "sweep.json").exists():
            return False
        visible = {path.name for path in self.folder.iterdir() if not path.name.startswith(".")}
        return not visible <= {"cells", "predictions", "figures", "failed"}

    def begin(self, sweep: Mapping[str, Any]) -> dict[str, Any]:
        """Write sweep.json, joined with the one that is there; returns the joined one.

        Data sets, methods, shots and seeds may grow; raises ResultsError, with the difference, for any other change,
        also of what is compared: a value that is new or forgotten is more likely a slip than a wish to go on for hours.
        A folder without a finished cell takes any sweep.
        """
        joined = dict(sweep)
        if any((self.folder / "cells").glob("*.json")):
            old = self.sweep()
            self._check_same(old, sweep)
            joined.update({field: _union(old[field], sweep[field]) for field in GROWING})
            joined.update(
                {field: {**old.get(field, {}), **sweep.get(field, {})} for field in ("protocols", "classes", "data")}
            )
            if caps := {**old.get("most_shots", {}), **sweep.get("most_shots", {})}:
                joined["most_shots"] = caps
        else:
            self._forget_failures()
        self._write_json("sweep.json", joined)
        return joined

    def _forget_failures(self) -> None:
        """Without a finished cell the folder takes any sweep: those of the last one are not this one's."""
        for path in (self.folder / "failed").glob("*.json"):
            path.unlink()

    def sweep(self) -> dict[str, Any]:
        """The content of sweep.json. Raises ResultsError where there is none."""
        missing = f"{self.folder} is no results folder; name one that kshot sweep wrote, or a new one with --out"
        return _read_json(self.folder / "sweep.json", SWEEP_FIELDS, missing, "restore it or use another --out")

    def has(self, key: str) -> bool:
        """Whether a cell is finished: its record and its predictions are there."""
        files = self.folder / "cells" / f"{key}.json", self.folder / "predictions" / f"{key}.parquet"
        return all(file.exists() for file in files)

    def has_predictions(self) -> bool:
        """Whether any are there; committed results leave all of them out."""
        return any((self.folder / "predictions").glob("*.parquet"))

    def add(self, record: Mapping[str, Any], predictions: "pa.Table") -> None:
        """Store a finished cell. Raises KshotError where the folder can no longer be written."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        buffer = pa.BufferOutputStream()
        pq.write_table(predictions, buffer)
        self._write(f"predictions/{record['key']}.parquet", buffer.getvalue().to_pybytes())
        self._write_json(f"cells/{record['key']}.json", record)
        (self.folder / "failed" / f"{record['key']}.json").unlink(missing_ok=True)

    def fail(self, key: str, identity: Mapping[str, Any], error: str, exit_status: int, trace: str) -> None:
        """Note why a cell has no result; a later `add` of it takes that back."""
        (self.folder / "failed").mkdir(exist_ok=True)
        self._write_json(
            f"failed/{key}.json", {"key": key, **identity, "error": error, "exit_status": exit_status, "trace": trace}
        )

    def failures(self) -> list[dict[str, Any]]:
        """What `fail` noted, in the order of data set, method, shots and seed."""
        again, fields = "delete it and run the sweep again", (*IDENTITY, "error", "exit_status")
        paths = [path for path in (self.folder / "failed").glob("*.json") if not self.has(path.stem)]
        records = [_read_json(path, fields, f"a record is gone; {again}", again) for path in paths]
        return sorted(records, key=lambda r: (r["dataset"], r["method"], r["shots"], r["seed"], r["key"]))

    def cell(self, key: str) -> dict[str, Any]:
        """The record of one finished cell."""
        again = "run the sweep again"
        path = self.folder / "cells" / f"{key}.json"
        return _read_json(path, CELL_FIELDS, f"a record is gone; {again}", f"delete it and {again}")

    def cells(self) -> list[dict[str, Any]]:
        """The records of all finished cells, in the order of data set, method, shots and seed."""
        paths = (self.folder / "cells").glob("*.json")
        records = [self.cell(path.stem) for path in paths]
        return sorted(records, key=lambda r: (r["dataset"], r["method"], r["shots"], r["seed"], r["key"]))

    def recompute(self) -> int:
        """Compute the metrics of every finished cell anew from its predictions; how many records were wrong and are
        rewritten. Loads no model."""
        from experiments.sweep.metrics import metrics

        wrong, classes = 0, self.sweep()["classes"]
        for record in self.cells():
            found = metrics(self.predictions(record["key"]), len(classes[record["dataset"]]))
            if found != record["metrics"]:
                self._write_json(f"cells/{record['key']}.json", {**record, "metrics": found})
                wrong += 1
        return wrong

    def predictions(self, key: str) -> "pa.Table":
        """The stored predictions of a cell. Raises ResultsError where they cannot be read."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.folder / "predictions" / f"{key}.parquet"
        try:
            return pq.read_table(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise ResultsError(f"{path} cannot be read; delete cells/{key}.json and run the sweep again") from error

    def _check_same(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        changed = _changes(old["settings"], new["settings"])
        changed += _changes(*({f: each[f] for f in COMPUTED if f in old and f in new} for each in (old, new)))
        caps = [{f"most shots of {d}": k for d, k in each.get("most_shots", {}).items()} for each in (old, new)]
        changed += _changes(*({name: each[name] for name in caps[0].keys() & caps[1].keys()} for each in caps))
        common = old["protocols"].keys() & new["protocols"].keys()
        changed += _changes(*({f"images of {d}": each["protocols"][d] for d in common} for each in (old, new)))
        if changed:
            differences = f"holds results of another configuration ({'; '.join(changed)})"
            raise ResultsError(f"{self.folder} {differences}; choose another folder with --out")

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        self._write(name, f"{text}\n".encode())

    def _write(self, name: str, content: bytes) -> None:
        try:
            write_file(self.folder / name, content)
        except OSError as error:  # it could be written when the sweep began
            reason = f"cannot write {self.folder / name}: {error.strerror}"
            raise KshotError(f"{reason}; make room, then the same command goes on from there") from error


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [f"{k} {old.get(k)!r} → {new.get(k)!r}" for k in sorted({*old, *new}) if old.get(k) != new.get(k)]


def _union(old: list[Any], new: list[Any]) -> list[Any]:
    both = list(dict.fromkeys([*old, *new]))
    return sorted(both) if all(isinstance(each, int) for each in both) else both


def _read_json(path: Path, fields: Sequence[str], missing: str, way_out: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"{missing} (no readable {path.name}: {error.strerror})") from error
    except ValueError as error:
        raise ResultsError(f"{path} is damaged ({error}); {way_out}") from error
    if absent := [field for field in fields if not isinstance(content, dict) or field not in content]:
        raise ResultsError(f"{path} is damaged (no {absent[0]!r}); {way_out}")
    return content
