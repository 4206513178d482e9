"""A results folder: complete files, one writer, growth, and what it refuses."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from experiments.sweep.metrics import metrics
from experiments.sweep.store import Results
from kshot.errors import KshotError, ResultsError
from kshot.untrusted import DAMAGED

SWEEP: dict[str, Any] = {
    **{"name": "x", "datasets": ["a"], "methods": ["m"], "shots": [2], "seeds": [1], "notes": ["about m"]},
    **{"settings": {"rank": 1}, "protocols": {"a": "p"}, "classes": {"a": ["one", "two"]}, "device": "cpu"},
}
TABLE = pa.table(
    {
        **{"key": ["x", "y"], "label": [0, 1], "prediction": [0, 0], "top5": [[0, 1], [0, 1]]},
        **{name: pa.nulls(2, pa.float32()) for name in ("label_log_prob", "answer_label")},
        **{"top5_log_probs": pa.nulls(2, pa.list_(pa.float32())), "answer": pa.nulls(2, pa.string())},
    }
)


def record(key: str = "k", **changes: Any) -> dict[str, Any]:
    identity = {"dataset": "a", "protocol": "p", "method": "m", "shots": 2, "seed": 1, "settings": {"rank": 1}}
    measured = {"test_images": 2, "metrics": metrics(TABLE, 2), "timings": {}, "versions": {}}
    return {"key": key, **identity, **measured, **changes}


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """A folder with one cell."""
    results = Results(tmp_path / "out")
    with results.writing():
        results.begin(SWEEP)
        results.add(record(), TABLE)
    return results


def test_what_is_stored_comes_back(results: Results) -> None:
    assert results.sweep() == SWEEP
    assert results.cells() == [record()]
    assert results.predictions("k").equals(TABLE)
    assert results.finished() == {"k"}
    assert not list(results.folder.rglob("*.tmp"))


def test_a_folder_grows(results: Results) -> None:
    more = {"datasets": ["b"], "methods": ["n", "m"], "shots": [1, 2], "seeds": [0], "notes": []}
    joined = results.begin({**SWEEP, **more, "protocols": {"b": "q"}, "classes": {"b": ["three"]}})
    assert (joined["datasets"], joined["methods"], joined["shots"], joined["seeds"]) == (
        *(["a", "b"], ["m", "n"]),
        *([1, 2], [0, 1]),
    )
    assert joined["notes"] == ["about m"]
    assert joined["classes"] == {"a": ["one", "two"], "b": ["three"]}
    assert results.sweep() == joined


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"settings": {"rank": 2}}, r"\(rank 1 → 2\)"),
        ({"settings": {"rank": 1, "eps": 0.5}}, r"\(eps None → 0.5\)"),
        ({"protocols": {"a": "q"}}, r"\(images of a 'p' → 'q'\)"),
        ({"device": "cuda"}, r"\(device 'cpu' → 'cuda'\)"),
    ],
)
def test_another_configuration_is_refused(results: Results, change: dict[str, Any], difference: str) -> None:
    before = (results.folder / "sweep.json").read_bytes()
    with pytest.raises(ResultsError, match=rf"out holds results of another configuration {difference}; .*--out"):
        results.begin({**SWEEP, **change})
    assert (results.folder / "sweep.json").read_bytes() == before


def test_a_folder_without_a_cell_takes_any_sweep(results: Results) -> None:
    (results.folder / "cells/k.json").unlink()
    assert results.begin({**SWEEP, "settings": {"rank": 2}})["settings"] == {"rank": 2}


def test_one_writer(results: Results) -> None:
    with results.writing(), pytest.raises(ResultsError, match=r"being written by another kshot"):
        Results(results.folder).writing().__enter__()
    with results.writing():
        pass


def test_what_a_killed_writer_left_is_removed(results: Results) -> None:
    left = [results.folder / part / ".x.json.123.tmp" for part in ("", "cells", "predictions", "figures")]
    for path in left:
        path.write_text("{")
    with results.writing():
        assert not any(path.exists() for path in left)
    assert results.cells() == [record()]


def test_a_cell_is_there_with_its_predictions_or_not_at_all(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(KshotError, match=r"predictions/new.parquet: No space left .* the same command") as raised:
        results.add(record("new"), TABLE)
    assert raised.value.exit_status == 1
    assert results.finished() == {"k"}


@pytest.mark.parametrize("path", ["file/below", "/proc/kshot"])
def test_a_folder_that_cannot_be_written(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ResultsError, match=r"cannot write to .*; choose another folder with --out"):
        Results(tmp_path / path).writing().__enter__()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "3"])
def test_a_damaged_file_is_named(results: Results, content: str) -> None:
    cell, sweep = results.folder / "cells/k.json", results.folder / "sweep.json"
    for path, read, way_out in ((cell, results.cells, "run the sweep again"), (sweep, results.sweep, "restore it or")):
        path.write_text(content)
        with pytest.raises(ResultsError, match=rf"{path} is damaged .*; {way_out}"):
            read()


def test_predictions_that_cannot_be_read(results: Results) -> None:
    (results.folder / "predictions/k.parquet").write_bytes(b"PAR1")
    with pytest.raises(ResultsError, match=r"k.parquet cannot be read; run the sweep again"):
        results.predictions("k")
    shutil.rmtree(results.folder / "predictions")
    with pytest.raises(ResultsError, match=r"k.parquet cannot be read; run the sweep again"):
        results.predictions("k")


@pytest.mark.parametrize("name", ["cells/k.json", "predictions/k.parquet", "failed/f.json"])
@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"[" * 100_000])
def test_a_damaged_cell_is_set_aside_when_a_sweep_begins(
    results: Results, name: str, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = results.folder / name
    results.add(record("other"), TABLE)
    results.fail({**record("f"), "error": "none", "exit_status": 1})
    path.write_bytes(content)
    with results.writing():
        results.begin(results.sweep())
    assert path.with_name(f"{path.name}{DAMAGED}").read_bytes() == content
    assert f"{path} is damaged; set aside" in caplog.text
    assert results.finished() == {"other", "k"} - {path.stem}
    assert [each["key"] for each in results.failures()] == (["f"] if path.stem == "k" else [])
    assert {each["key"] for each in results.cells()} == {"other", "k"} - ({"k"} if name.startswith("cells") else set())


def test_what_cannot_be_read_for_now_is_left(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("experiments.sweep.store.check_regular", refuse)
    with results.writing():
        results.begin(results.sweep())
    assert results.finished() == {"k"}
    monkeypatch.setattr("experiments.sweep.store.read_file", refuse)
    results._set_damaged_aside()
    assert results.finished() == {"k"}


def test_what_is_no_file_is_set_aside(results: Results) -> None:
    path = results.folder / "predictions/k.parquet"
    path.unlink()
    path.mkdir()
    results._set_damaged_aside()
    assert results.finished() == set()


def test_another_sweep_sets_nothing_aside(results: Results) -> None:
    (results.folder / "predictions/k.parquet").write_bytes(b"")
    with results.writing(), pytest.raises(ResultsError, match="another configuration"):
        results.begin({**SWEEP, "settings": {"rank": 2}})
    assert (results.folder / "predictions/k.parquet").exists()


def packed(results: Results) -> Results:
    """The same folder with a second cell, its records in one file."""
    results.add(record("w", metrics={**metrics(TABLE, 2), "accuracy": 1.0}), TABLE)
    results.pack()
    return results


def test_a_packed_folder_reads_as_before(results: Results) -> None:
    before = results.cells()
    results.pack()
    assert results.cells() == before
    assert results.finished() == {"k"}
    assert sorted(path.name for path in results.folder.rglob("*.json*")) == ["cells.jsonl", "sweep.json"]
    with pytest.raises(ResultsError, match="another configuration"):
        results.begin({**SWEEP, "settings": {"rank": 2}})


def test_a_cell_file_wins_over_a_line(results: Results) -> None:
    packed(results).add(record("w"), TABLE)
    assert results.cells() == [record(), record("w")]
    results.pack()
    assert [json.loads(line) for line in (results.folder / "cells.jsonl").read_text().splitlines()] == [
        record(),
        record("w"),
    ]


def test_metrics_are_corrected_where_they_are(results: Results) -> None:
    """Those of a line there, those of a file there; a file that is right is left alone."""
    packed(results).add(record("x", metrics={**metrics(TABLE, 2), "top5": 0.5}), TABLE)
    results.add(record("y"), TABLE)
    os.utime(results.folder / "cells/y.json", ns=(1, 1))
    assert results.recompute() == 2
    assert results.cells() == [record(), record("w"), record("x"), record("y")]
    files = {path.name: path.stat().st_mtime_ns == 1 for path in (results.folder / "cells").iterdir()}
    assert files == {"x.json": False, "y.json": True}
    assert results.recompute() == 0


def test_a_damaged_line_is_named(results: Results) -> None:
    with (packed(results).folder / "cells.jsonl").open("a") as file:
        file.write("{\n")
    with pytest.raises(ResultsError, match=r"cells.jsonl, line 3, is damaged .*; delete the line and run"):
        results.cells()


def test_a_table_has_a_row_a_cell(results: Results) -> None:
    results.add(record("z", method="n", settings={"prompt": "recipe"}), TABLE)
    frame = results.frame()
    assert [*frame][:6] == ["dataset", "protocol", "method", "shots", "seed", "accuracy"]
    assert frame[["method", "shots", "accuracy"]].to_numpy().tolist() == [["m", 2, 0.5], ["n", 2, 0.5]]
    assert [*frame][-2:] == ["rank", "prompt"]
    assert frame["nll"].isna().all()


def test_no_sweep(tmp_path: Path) -> None:
    for read in (Results.sweep, Results.frame):
        with pytest.raises(ResultsError, match=r"nowhere is no results folder; name one that kshot sweep wrote"):
            read(Results(tmp_path / "nowhere"))
