"""The benchmark of the baseline on sizes small enough for a test: what it runs, what it writes, what it refuses."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest

from baselines import nano
from baselines.heads import HEADS
from experiments.bench import baseline
from experiments.bench.grid import SIZES, Cell, Size, cells, problem, run, write
from experiments.bench.harness import finish
from kshot.errors import KshotError

SMALL = {"pets": Size(classes=4, train=40, test=30, shots=(1, 2))}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid of eight cells that are run here, and eight photographs at one patch a side."""

    def here(job: Callable[[Cell], Any], jobs: Sequence[Cell]) -> Iterator[tuple[Cell, Any]]:
        yield from ((each, job(each)) for each in jobs)

    monkeypatch.setattr(baseline, "QUICK", SMALL)
    monkeypatch.setitem(baseline.SIZES, "pets", SMALL["pets"])
    monkeypatch.setattr(baseline.workers, "local", here)
    monkeypatch.setattr(baseline, "PIXELS", 56)


@pytest.mark.usefixtures("small")
def test_the_record_and_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problem.cache_clear()
    finish(baseline.measure(None, True, model=str(nano.HERE)), tmp_path / "baseline.json")
    problem.cache_clear()
    written = (tmp_path / "baseline.json").read_text()
    record = json.loads(written)
    rows, ratios = {row["name"]: row for row in record["rows"]}, record["ratios"]
    assert str(nano.HERE) not in written
    assert ratios.keys() == {"grid_seconds", "feature_rate_share", *(f"{head}_vs_sklearn" for head in HEADS)}
    assert rows["grid of heads"]["cells"] == 8
    assert ratios["grid_seconds"] == rows["grid of heads"]["median"]
    rates = [rows[f"forward, {n} at a time"]["values"] for n in baseline.BATCHES]
    shares = [ours / max(bare) for ours, *bare in zip(rows["photographs to features"]["values"], *rates, strict=True)]
    assert ratios["feature_rate_share"] == pytest.approx(median(shares))
    assert all(rows[f"{head}, kshot"]["agree"] >= 0.99 for head in HEADS)
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*rows, *ratios])


def test_the_grid_is_the_blogs_at_real_sizes(tmp_path: Path) -> None:
    grid = cells(tmp_path, SIZES, baseline.SEEDS)
    assert len(grid) == len(set(grid)) == 4 * 5 * 5 * 4
    assert (SIZES["cars"].train, SIZES["cars"].test, SIZES["cars"].classes) == (8144, 8041, 196)
    assert all(size.train >= size.classes * max(size.shots) for size in SIZES.values())


def test_cells_learn_from_their_shots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(baseline.SIZES, "pets", SMALL["pets"])
    write(tmp_path, SMALL)
    made = problem(tmp_path, "pets")
    train, labels = made.shots(2, seed=3)
    np.testing.assert_array_equal(np.bincount(labels), [2] * 4)
    assert len(np.unique(train, axis=0)) == 8
    head = HEADS["ridge"].fit(train, labels, 4)
    accuracy = (head.scores(made.test).argmax(axis=1) == made.test_labels).mean()
    assert run(Cell(tmp_path, "pets", 2, 3, "ridge"))[1] == accuracy


def test_a_head_that_disagrees_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(baseline.SIZES, "pets", SMALL["pets"])
    monkeypatch.setitem(baseline.PEERS, "ridge", lambda train, labels, test, chosen: np.zeros(len(test)))
    write(tmp_path, SMALL)
    with pytest.raises(KshotError, match=r"ridge: predictions .* are .* apart, more than 0.01: nothing to compare"):
        baseline.heads(tmp_path, quick=True)
