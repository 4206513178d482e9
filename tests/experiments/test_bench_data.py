"""The benchmark of the data path, on images small enough for a test, and what all benchmarks share."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.bench import data, harness
from experiments.bench.case import encoded
from kshot.errors import DatasetError, ImageError, ResultsError

RATIOS = {
    "photographs_vs_plain",
    "jpeg_12mp_vs_plain",
    "jpeg_12mp_vs_plain_one_thread",
    "jpeg_12mp_grainy_vs_plain",
    "jpeg_12mp_grainy_vs_plain_one_thread",
}


WITHOUT_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "LARGE", (400, 300))
    monkeypatch.setattr(data, "MAX_SIDE", 48)
    monkeypatch.setattr(data, "THREADS", 2)


@pytest.mark.usefixtures("small")
def test_the_record_and_the_table(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    harness.finish(data.measure(photos, True), tmp_path / "new" / "data.json")
    record = json.loads((tmp_path / "new" / "data.json").read_text())
    assert set(record) == {"machine", "versions", "rows", "ratios"}
    assert set(record["ratios"]) == RATIOS
    assert all(ratio > 0 for ratio in record["ratios"].values())
    assert record["versions"].keys() == {"python", "numpy", "pillow"}
    assert record["rows"][0]["images"] == 30
    for measured in record["rows"]:
        assert measured["unit"] in ("images/s", "ms/image")
        assert measured["median"] == np.median(measured["values"]) > 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in RATIOS | {row["name"] for row in record["rows"]})


@pytest.mark.usefixtures("small")
def test_without_a_folder_it_makes_photographs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "encoded", lambda rng, _, grain: encoded(rng, (64, 48), grain))
    assert data.measure(None, True)["rows"][0]["images"] == 128


def test_a_folder_without_photographs(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(DatasetError, match=f"^{folder} has no .*; name a folder of photographs"):
            data.measure(folder, True)


@pytest.mark.usefixtures("small")
def test_a_broken_photograph(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("a letter")
    with pytest.raises(ImageError, match=r"/a\.jpg: not an image"):
        data.measure(tmp_path, True)


def test_made_photographs_are_compressed_like_photographs() -> None:
    one, again = (encoded(np.random.default_rng(3), (800, 600), 5.0) for _ in range(2))
    assert one == again
    assert Image.open(io.BytesIO(one)).size == (800, 600)
    assert 1 < 8 * len(one) / (800 * 600) < 3  # bits a pixel


def test_tasks_take_turns() -> None:
    calls: list[str] = []
    tasks: dict[str, Callable[[], object]] = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds, results = harness.in_turn(tasks, 3)
    assert "".join(calls) == "ab" * 4  # the first round does not count
    assert [len(spent) for spent in seconds.values()] == [3, 3]
    assert results == {"a": None, "b": None}


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match=r"x\.json cannot be written \(.*\); name another with --json"):
        harness.finish(harness.record([], {}, []), tmp_path / "file" / "x.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("baseline --quick --backbone nowhere", "nowhere"),
        ("baseline --quick --root nowhere", "nowhere has 0 of the 8 folders"),
        ("score --quick --device tpu", "unknown device 'tpu'"),
        ("score --quick --tokenizer nowhere", "unknown model 'nowhere'"),
        ("score --quick --root nowhere", "nowhere has 0 of the 8 folders of at least 2 photographs"),
        ("train --shape 3B", "unknown shape '3B'"),
        ("train --device tpu", "unknown device 'tpu'"),
        ("train --shape 2B", "--shape 2B would take hours on a CPU"),
        pytest.param("baseline --quick --device cuda", "not available", marks=WITHOUT_CUDA),
        pytest.param("score --device cuda", "sees no CUDA device", marks=WITHOUT_CUDA),
        pytest.param("train --device cuda", "sees no CUDA device", marks=WITHOUT_CUDA),
    ],
)
def test_what_cannot_be_measured(kshot: Callable[..., Any], arguments: str, message: str) -> None:
    ended = kshot("bench", *arguments.split())
    assert ended.status == 2
    assert message in ended.err
