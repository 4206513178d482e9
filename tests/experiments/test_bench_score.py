"""The benchmark of scoring on a case small enough for a test: what it measures, what it refuses, and what it writes."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import pytest

from data.benchmarks.layouts import CARS
from data.dataset import clean_name
from experiments.bench import score
from experiments.bench.case import Plan, new_case, write_vocabulary
from experiments.bench.harness import finish
from experiments.bench.score import CACHED, CAR_NAMES, HUNDRED, LISTS, NEW, RATIOS, Ours, cut
from kshot.errors import KshotError, ModelError
from vlm import nano

TINY = Plan(classes=2, shots=1, batch=2, epochs=80, rounds=2, few=2, labels=10)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of seconds, and the first names of each list."""
    monkeypatch.setattr(score, "QUICK", TINY)
    for names, count in ((HUNDRED, 12), (CAR_NAMES, 8)):
        monkeypatch.setitem(LISTS, names, LISTS[names][:count])


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_the_record_and_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finish(score.measure(None, True, str(nano.folder())), tmp_path / "score.json")
    written = (tmp_path / "score.json").read_text()
    record = json.loads(written)
    rows = {row["name"]: row for row in record["rows"]}
    assert str(nano.folder()) not in written
    assert record["ratios"].keys() == RATIOS.keys()
    for name, (over, under) in RATIOS.items():
        pairs = zip(rows[over]["values"], rows[under]["values"], strict=True)
        assert record["ratios"][name] == pytest.approx(median(a / b for a, b in pairs))
    timed = {name: row for name, row in rows.items() if row["unit"] == "s/image"}
    assert {len(row["values"]) for row in timed.values()} == {TINY.rounds}
    assert timed.keys() >= {what + kind for what in (score.HUNDRED_SCORED, "prefill") for kind in (NEW, CACHED)}
    apart = [row["median"] for name, row in rows.items() if name.startswith("apart, ")]
    assert len(apart) == 6
    assert max(apart) < 1e-4
    own, peer = (rows[f"answer, generate ({who})"] for who in ("kshot", "transformers"))
    assert own["values"] == peer["values"]
    assert peer["same"] == 1.0
    assert rows["vocabulary"]["median"] == 4096
    assert rows[f"extra, {CAR_NAMES}"]["median"] > rows[f"extra, {HUNDRED}"]["median"] > 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*rows, *RATIOS])


def test_other_scores_are_noticed() -> None:
    ours = np.zeros((1, 3), np.float32)
    same, other = (ours, ours + 5e-5), (ours, np.array([[0, 0.5, 0]]))
    (row,) = score.agreement({"tree and rows": same}, exact=True)
    assert row["median"] == pytest.approx(5e-5)
    with pytest.raises(KshotError, match=r"tree and rows: scores 0.5 apart, more than 0.0001: nothing to compare"):
        score.agreement({"tree and rows": other}, exact=True)
    assert score.agreement({"tree and rows": other}, exact=False)[0]["median"] == 0.5
    with pytest.raises(KshotError, match="scores nan apart"):
        score.agreement({"tree and rows": (ours, ours + np.nan)}, exact=True)


def test_an_answer_that_never_ends_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "FIRST", 1)
    monkeypatch.setattr(score, "STEPS", 1)
    case = new_case(nano.NAME, "cpu", replace(TINY, epochs=1), None, tmp_path)
    with pytest.raises(KshotError, match="after 1 steps fewer than 95% of the answers end"):
        Ours(case, LISTS)


def test_the_names() -> None:
    assert [len(names) for names in LISTS.values()] == [100, 196]
    assert len(CARS) == len({clean_name(name) for name in CARS}) == 196
    assert all(name[-4:].isdigit() for name in CARS)


def test_an_answer_ends_with_its_end() -> None:
    assert cut([5, 6, 2, 0, 0], end=2) == [5, 6, 2]
    assert cut([5, 6, 7], end=2) == [5, 6, 7]


def test_a_tokenizer_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"has no tokenizer_config.json; give --tokenizer a folder or model with both"):
        write_vocabulary(tmp_path / "one", str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"the tokenizer .* (cannot be loaded|lacks).*give --tokenizer"):
        write_vocabulary(tmp_path / "two", str(tmp_path))
