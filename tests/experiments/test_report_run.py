"""What a report says of how it was run: costs, data, models, machines, and why cells are missing."""

import re

import numpy as np
from reported import SWEEP, Page, cell, grid, written

from experiments.report.runs import cost_table
from experiments.report.tables import NONE

FINGERPRINT = "16173827d4a2d8dad71a8630fa04c24a"
PROVEN = SWEEP | {
    "settings": {
        "model": "kshot/nano-qwen3-vl",
        "model_revision": "a420ec0309b3",
        "backbone": ["vit_small", "/home/lovelace/weights.onnx"],
        "backbone_revision": [None, "efafe3656276fb3e"],
        "prompt": "recipe",
    },
    "methods": ["vlm-zero-shot", "vlm-lora", "dinov2-logreg"],
    "protocols": {"icons": "official-0"},
    "data": {"icons": {"source": "archive", "md5": {"x.tgz": "ec87"}, "content": FINGERPRINT, "ignored": []}},
}


def rows(table) -> dict[str, list[str]]:
    return {row[0]: [*row[1:]] for row in table.rows}


def test_costs_add_up() -> None:
    rng = np.random.default_rng(0)
    cells = grid()
    for each in cells:
        each["timings"] = {f"{phase}_seconds": float(rng.uniform(100, 5000)) for phase in ("fit", "predict", "answer")}
        each["work"] = {"vision_forwards": int(rng.integers(9999)), "train_tokens": int(rng.integers(9999))}
    costs = rows(cost_table(cells))
    assert [*costs] == ["VLM zero-shot", "VLM + LoRA", "pixel kNN", "the whole sweep"]
    groups = {"VLM zero-shot": "vlm-zero-shot", "VLM + LoRA": "vlm-lora", "pixel kNN": "pixel-knn"}
    for title, fields in costs.items():
        group = [c for c in cells if title not in groups or c["method"] == groups[title]]
        seconds = np.array([[c["timings"][f"{p}_seconds"] for p in ("fit", "predict", "answer")] for c in group])
        numbers = [float(field.replace(",", "")) for field in fields]
        work = [[c["work"][kind] for c in group] for kind in ("vision_forwards", "train_tokens")]
        expected = [len(group), *seconds.sum(axis=0), seconds.sum(), seconds.sum() / len(group), seconds.sum() / 3600]
        np.testing.assert_allclose(numbers[:5], expected[:5], atol=0.051)
        np.testing.assert_allclose(numbers[5:7], expected[5:], atol=0.0051)
        assert numbers[7:] == np.sum(work, axis=1).tolist()


def test_costs_of_records_that_say_less(tmp_path) -> None:
    text, _ = written(tmp_path, SWEEP, grid())
    header = "| method | cells | fit | predict | answer | all seconds | per cell | core-hours |"
    assert header in text
    assert f"| VLM + LoRA | 6 | 18.0 | 3.0 | {NONE} | 21.0 | 3.50 | 0.006 |" in text
    assert "| the whole sweep | 13 | 38.0 | 6.5 |" in text  # fit: 2 + s for six and six of seeds 0 to 2, and 2
    some = [c | ({"work": {"vision_forwards": 1200}} if c["method"] == "vlm-lora" else {}) for c in grid()]
    counted, _ = written(tmp_path, SWEEP, some)
    assert f"{header[:-2]} | vision forwards |" in counted
    assert "| 0.006 | 7,200 |" in counted
    assert re.search(rf"\| pixel kNN \| 6 \|.*\| {NONE} \|\n\| the whole sweep \|.* 7,200 \|", counted)
    bare, _ = written(tmp_path, SWEEP, [c | {"timings": {}} for c in grid()])
    assert f"| pixel kNN | 6 | {' | '.join([NONE] * 6)} |" in bare


def test_data_models_and_machines(tmp_path) -> None:
    cells = [c for c in grid() if c["method"] != "pixel-knn"]
    for n, each in enumerate(cells):
        each["versions"] = each["versions"] | {"machine": f"Linux x86_64 {'cuda' if n else 'cpu'}", "service": "local"}
    cells.append(cell("dinov2-logreg", 1, 0, 0.5))
    text, page = written(tmp_path, PROVEN, cells)
    assert f"| icons | official-0 | source: archive; md5.x.tgz: ec87; content: {FINGERPRINT} |" in text
    assert "| model | kshot/nano-qwen3-vl | a420ec0309b3 |" in text
    assert f"| backbone | vit_small | {NONE} |\n| backbone | …/weights.onnx | efafe3656276fb3e |" in text
    machines = (
        f"| Linux x86_64 cpu | local | 1 |\n| Linux x86_64 cuda | local | {len(cells) - 2} |\n| {NONE} | {NONE} | 1 |"
    )
    assert machines in text
    assert not Page(page).open
    # A model that no method reads made no number.
    alone, _ = written(tmp_path, PROVEN | {"methods": ["pixel-knn"]}, [c for c in grid() if c["method"] == "pixel-knn"])
    assert "Models:" not in alone
    assert "| model | kshot/nano-qwen3-vl |" in alone  # among the settings


def test_failed_cells_say_why(tmp_path) -> None:
    cells = [c for c in grid() if c["method"] != "vlm-lora" or c["seed"] == 0]
    why = "ModelError: /home/lovelace/model is <broken>;\n  give another | with --model"
    failures = {
        ("icons", "vlm-lora", 4, 1): why,
        ("icons", "vlm-lora", 1, 2): "out of memory",
        ("icons", "vlm-lora", 4, 2): "out of memory",
        ("icons", "vlm-lora", 1, 0): "an error of before: the cell is there now",
    }
    text, page = written(tmp_path, SWEEP, cells, failures=failures)
    assert f"Cells not run yet: 4. Of them 3 failed, with the error that is shown; {NONE}: not tried." in text
    assert "| data set | method | seed | shots | error |" in text
    assert f"| icons | VLM + LoRA | 1 | 1 | {NONE} |" in text
    shown = "ModelError: …/model is &lt;broken&gt;; give another \\| with --model"
    assert f"| icons | VLM + LoRA | 1 | 4 | {shown} |" in text
    assert "| icons | VLM + LoRA | 2 | 1, 4 | out of memory |" in text
    assert "an error of before" not in text
    assert "<broken>" not in page
    assert not Page(page).open
    assert written(tmp_path, SWEEP, cells, failures={}) == written(tmp_path, SWEEP, cells)
    assert "failed" not in written(tmp_path, SWEEP, cells)[0]


def test_failures_of_a_method_are_those_of_its_series(tmp_path) -> None:
    compared = SWEEP | {"methods": ["dinov2-knn"], "compare": {"readout": ["cls", "last4"]}, "seeds": [0]}
    there = cell("dinov2-knn", 1, 0, 0.5) | {"settings": {"readout": "cls"}}
    text, _ = written(tmp_path, compared, [there], failures={("icons", "dinov2-knn", 4, 0): "broken"})
    assert "| icons | DINOv2 + kNN (cls) | 0 | 4 | broken |" in text
    assert f"| icons | DINOv2 + kNN (last4) | 0 | 1 | {NONE} |" in text
    assert "| icons | DINOv2 + kNN (last4) | 0 | 4 | broken |" in text
