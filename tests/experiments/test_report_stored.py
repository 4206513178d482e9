"""What a report says of stored predictions: paired differences and confusions."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from reported import SWEEP, cell, grid, written
from sklearn.metrics import confusion_matrix

from experiments.tables import NONE
from kshot_errors import ResultsError


def stored(folder: Path, cells: list[dict], classes: int = 10) -> None:
    """Predictions of 200 images: right from the first on as often as the record says, else the next class."""
    (folder / "predictions").mkdir()
    label = np.arange(200) % classes
    for c in cells:
        right = np.arange(200) < round(200 * c["metrics"]["accuracy"])
        wrong = (label + 1 + (np.arange(200) % 3 > 0)) % classes
        columns = {"key": [str(i) for i in range(200)], "label": label, "prediction": np.where(right, label, wrong)}
        parquet.write_table(pa.table(columns), folder / "predictions" / f"{c['key']}.parquet")


def test_paired_differences_when_predictions_are_there(tmp_path):
    stored(tmp_path, grid())
    text, _ = written(tmp_path, SWEEP, grid())
    assert "(pixel kNN at 1, VLM + LoRA at 4) minus each other" in text
    assert re.search(r"\| VLM \+ LoRA \| 1 \| 3 \| \+1.0 \| ", text)
    row = re.search(r"\| pixel kNN \| 4 \| 3 \| \+40\.0 \| \+(\S+) to \+(\S+) \| &lt;0\.001 \|", text)
    assert row
    assert 30 < float(row[1]) < 40 < float(row[2]) < 50


def test_paired_differences_count_the_common_seeds(tmp_path):
    cells = [c for c in grid() if c["method"] != "vlm-zero-shot" and (c["method"], c["seed"]) != ("pixel-knn", 1)]
    stored(tmp_path, cells)
    assert "| pixel kNN | 4 | 2 | +40.0 |" in written(tmp_path, SWEEP, cells)[0]
    apart = [c for c in cells if (c["method"] == "pixel-knn") == (c["seed"] == 2)]
    text, _ = written(tmp_path, SWEEP, apart)
    assert f"| pixel kNN | 4 | 0 | {NONE} | {NONE} | {NONE} |" in text


def test_confusions_have_names_and_counts(tmp_path):
    names = [f"kind {n}" for n in range(10)]
    sweep = SWEEP | {"classes": {"icons": names}}
    stored(tmp_path, grid())
    text, _ = written(tmp_path, sweep, grid())
    assert text.count("the most frequent confusions") == 1  # the VLM is the best
    runs = [parquet.read_table(tmp_path / "predictions" / f"vlm-lora-4-{seed}.parquet") for seed in range(3)]
    label, guess = (np.concatenate([run[name] for run in runs]) for name in ("label", "prediction"))
    matrix = confusion_matrix(label, guess)
    worst = sorted((-matrix[a, b], a, b) for a in range(10) for b in range(10) if a != b)[:10]
    rows = [f"| kind {a} | kind {b} | {-n} | {100 * -n / 60:.1f} |" for n, a, b in worst]
    assert "| class | taken for | images | % of the class |\n| --- | ---: | ---: | ---: |\n" + "\n".join(rows) in text
    knn = [c for c in grid() if c["method"] != "vlm-lora" or c["shots"] == 1]
    both, _ = written(tmp_path, sweep, knn)
    assert re.findall(r"(.*) at k = 4: the most frequent confusions", both) == ["pixel kNN"]
    better = [c | {"metrics": c["metrics"] | {"accuracy": 0.1}} if c["method"] == "vlm-lora" else c for c in grid()]
    both, _ = written(tmp_path, sweep, better)
    assert re.findall(r"(.*) at k = 4: the most frequent confusions", both) == ["pixel kNN", "VLM + LoRA"]


def test_no_confusions_without_predictions_names_or_mistakes(tmp_path):
    sweep = SWEEP | {"classes": {"icons": [f"kind {n}" for n in range(10)]}}
    assert "confusions" not in written(tmp_path, sweep, grid())[0]
    perfect = [cell("vlm-lora", 4, seed, 1.0) for seed in range(3)]
    stored(tmp_path, perfect)
    assert "confusions" not in written(tmp_path, sweep, perfect)[0]
    assert "confusions" not in written(tmp_path, SWEEP, perfect)[0]


def test_confusions_refuse_a_class_without_a_name(tmp_path):
    stored(tmp_path, grid())
    with pytest.raises(ResultsError, match="there are 3 class names"):
        written(tmp_path, SWEEP | {"classes": {"icons": ["a", "b", "c"]}}, grid())
