"""What a report says of stored predictions: paired differences and confusions."""

import re
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet
from reported import SWEEP, cell, grid, store_predictions, written
from sklearn.metrics import confusion_matrix

from experiments.cli.report import print_summary
from experiments.report.tables import NONE
from experiments.sweep.store import Results
from kshot.errors import ResultsError


def test_paired_differences_when_predictions_are_there(tmp_path):
    store_predictions(tmp_path, grid())
    text, _ = written(tmp_path, SWEEP, grid())
    assert "(pixel kNN at 1, VLM + LoRA at 4) minus each other" in text
    assert re.search(r"\| VLM \+ LoRA \| 1 \| 3 \| \+1.0 \| ", text)
    row = re.search(r"\| pixel kNN \| 4 \| 3 \| \+40\.0 \| \+(\S+) to \+(\S+) \| &lt;0\.001 \|", text)
    assert row
    assert 30 < float(row[1]) < 40 < float(row[2]) < 50


def test_paired_differences_count_the_common_seeds(tmp_path):
    cells = [c for c in grid() if c["method"] != "vlm-zero-shot" and (c["method"], c["seed"]) != ("pixel-knn", 1)]
    store_predictions(tmp_path, cells)
    assert "| pixel kNN | 4 | 2 | +40.0 |" in written(tmp_path, SWEEP, cells)[0]
    apart = [c for c in cells if (c["method"] == "pixel-knn") == (c["seed"] == 2)]
    text, _ = written(tmp_path, SWEEP, apart)
    assert f"| pixel kNN | 4 | 0 | {NONE} | {NONE} | {NONE} |" in text


def test_the_two_tuned_models_are_paired_at_every_k(tmp_path):
    shares = {"vlm-lora": {1: 0.3, 4: 0.8, 16: 0.9}, "dinov2-lora": {1: 0.4, 4: 0.6, 16: 0.9}, "pixel-knn": {1: 0.1}}
    cells = [cell(m, k, s, share) for m, row in shares.items() for k, share in row.items() for s in (0, 1)]
    store_predictions(tmp_path, cells)
    text, _ = written(tmp_path, SWEEP | {"methods": [*shares]}, cells)
    rows = re.findall(
        r"\| VLM \+ LoRA minus DINOv2 \+ LoRA \| (\d+) \| (\d) \| (\S+) \| (\S+) to (\S+) \| (\S+) \|", text
    )
    assert [row[:3] for row in rows] == [("1", "2", "-10.0"), ("4", "2", "+20.0"), ("16", "2", "+0.0")]
    for k, row in zip((1, 4, 16), rows, strict=True):
        right = {m: np.arange(200) < round(200 * shares[m][k]) for m in ("vlm-lora", "dinov2-lora")}
        gain = right["vlm-lora"].astype(int) - right["dinov2-lora"]
        drawn = np.random.default_rng(7).choice(gain, (10_000, 200)).mean(axis=1)
        assert [float(row[3]), float(row[4])] == pytest.approx(100 * np.quantile(drawn, [0.025, 0.975]), abs=0.7)
    assert "the rows are not corrected for their number" in text
    assert text.count(" minus each other, in points") == 1  # the best against all others, as before
    alone = [c for c in cells if c["method"] != "dinov2-lora"]
    assert "two tuned models" not in written(tmp_path, SWEEP, alone)[0]


def test_confusions_have_names_and_counts(tmp_path):
    names = [f"kind {n}" for n in range(10)]
    sweep = SWEEP | {"classes": {"icons": names}}
    store_predictions(tmp_path, grid())
    text, _ = written(tmp_path, sweep, grid())
    assert text.count("the most frequent confusions") == 1  # the VLM is the best
    runs = [parquet.read_table(tmp_path / "predictions" / f"vlm-lora-4-{seed}.parquet") for seed in range(3)]
    label, guess = (np.concatenate([run[name] for run in runs]) for name in ("label", "prediction"))
    matrix = confusion_matrix(label, guess)
    worst = sorted((-matrix[a, b], a, b) for a in range(10) for b in range(10) if a != b)[:10]
    rows = [f"| kind {a} | kind {b} | {-n} | {100 * -n / 60:.1f} |" for n, a, b in worst]
    assert "| class | taken for | images | % of the class |\n| --- | --- | ---: | ---: |\n" + "\n".join(rows) in text
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
    store_predictions(tmp_path, perfect)
    assert "confusions" not in written(tmp_path, sweep, perfect)[0]
    assert "confusions" not in written(tmp_path, SWEEP, perfect)[0]


def test_confusions_refuse_a_class_without_a_name(tmp_path):
    store_predictions(tmp_path, grid())
    with pytest.raises(ResultsError, match="there are 3 class names"):
        written(tmp_path, SWEEP | {"classes": {"icons": ["a", "b", "c"]}}, grid())


FOLDERS = sorted(path.parent for path in (Path(__file__).parents[2] / "results").glob("*/cells.jsonl"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_committed_results_have_a_summary(folder, capsys):
    """Also of a method that reads none of the settings that are compared."""
    results = Results(folder)
    print_summary(results.sweep(), results.cells())
    printed = capsys.readouterr().out
    assert all(method in printed for method in results.sweep()["methods"])
