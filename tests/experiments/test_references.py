"""Published numbers: what the sources say, in the report of their data set, and marked as theirs."""

import html
import re

import pytest
from reported import SWEEP, Page, grid, written

from data.catalog import DATASETS
from experiments.report.references import ALL, published, published_table, references
from experiments.report.tables import NONE

# Typed again, apart from the table: lines of the log that Tip-Adapter's authors publish (16 shots first) ...
LOG = """
oxford_pets: 85.83
Tip     88.14   87.03   86.45   87.03   86.10
Tip-F   89.70   88.09   87.54   87.03   87.00
caltech101: 85.92
Tip     90.18   89.83   89.39   88.44   87.18
Tip-F   92.86   91.44   90.56   89.74   89.33
oxford_flowers: 66.02
Tip     89.89   87.98   83.80   79.13   73.12
Tip-F   94.80   91.51   88.83   82.30   79.98
stanford_cars: 55.74
Tip     66.77   62.93   61.45   57.93   57.54
Tip-F   75.74   69.25   64.57   61.50   58.86
"""
NAMES = {"oxford_pets": "pets", "oxford_flowers": "flowers", "stanford_cars": "cars", "caltech101": "caltech101"}
# ... and single numbers of the others.
CELLS = [
    *[("CLIP linear probe", "caltech101", 1, 70.62), ("CLIP linear probe", "caltech101", 16, 90.63)],
    *[("CLIP linear probe", "cars", 2, 36.53), ("CLIP linear probe", "flowers", 8, 92.0)],
    *[("CLIP linear probe", "pets", 4, 56.35), ("CLIP linear probe", "cars", 16, 70.08)],
    *[("CoOp", "caltech101", 1, 87.8), ("CoOp", "caltech101", 8, 90.1), ("CoOp", "cars", 4, 62.9)],
    *[("CoOp", "flowers", 2, 78.0), ("CoOp", "pets", 2, 82.03), ("CoOp", "pets", 16, 86.3)],
    *[("Qwen2-VL-2B, untuned", "cars", 0, 35.8), ("Qwen2-VL-2B, supervised", "flowers", 4, 96.9)],
    *[("Qwen2-VL-2B, RL with thinking", "pets", 4, 87.2), ("Qwen2-VL-2B, supervised", "caltech101", 4, 93.9)],
    *[("Qwen2-VL-2B, RL without thinking", "cars", 4, 92.5), ("Qwen2-VL-2B, RL without thinking", "pets", 4, 86.1)],
    *[("DINOv2 ViT-S/14", "cars", ALL, 81.6), ("DINOv2 ViT-S/14", "pets", ALL, 95.1)],
    *[("DINOv2 ViT-B/14", "caltech101", ALL, 96.1), ("DINOv2 ViT-B/14", "cars", ALL, 88.2)],
    *[("DINOv2 ViT-L/14", "flowers", ALL, 99.7), ("DINOv2 ViT-L/14", "cars", ALL, 90.1)],
    *[("DINOv2 ViT-g/14", "caltech101", ALL, 97.6), ("DINOv2 ViT-g/14", "pets", ALL, 96.7)],
]


def value(dataset: str, method: str, column: int | str) -> float:
    (row,) = [row for row in published(dataset) if row.method == method]
    return row.values[column]


def test_the_values_of_the_log() -> None:
    dataset = ""
    for line in LOG.split("\n"):
        name, *numbers = line.split() or [""]
        if name.endswith(":"):
            dataset = NAMES[name.rstrip(":")]
            assert value(dataset, "zero-shot CLIP", 0) == float(numbers[0])
        for shots, number in zip((16, 8, 4, 2, 1) if len(numbers) == 5 else (), numbers, strict=False):
            method = {"Tip": "Tip-Adapter", "Tip-F": "Tip-Adapter-F"}[name]
            assert value(dataset, method, shots) == float(number)


@pytest.mark.parametrize(("method", "dataset", "column", "number"), CELLS)
def test_single_values(method: str, dataset: str, column: int | str, number: float) -> None:
    assert value(dataset, method, column) == number


def test_each_set_has_each_method_and_each_method_its_marks() -> None:
    methods = dict.fromkeys(row.method for row in references())
    assert {row.dataset for row in references()} == {"caltech101", "cars", "flowers", "pets"} <= DATASETS.keys()
    assert len(references()) == 4 * len(methods) == len({(row.dataset, row.method) for row in references()})
    for row in references():
        clip, other = not row.method.startswith(("DINOv2", "Qwen2")), row.method.startswith("Qwen2")
        shots: set[int | str] = {0} if row.method in ("zero-shot CLIP", "Qwen2-VL-2B, untuned") else {1, 2, 4, 8, 16}
        assert set(row.values) == ((shots & {0, 4} if other else shots) if clip or other else {ALL})
        assert ("CLIP RN50" in row.protocol) == clip
        assert re.search(r"\b20\d\d\b", row.source)
        assert (row.marks == "another model; second-hand") == other
        assert other or row.marks == {
            "CLIP linear probe": "second-hand",
            "CoOp": "second-hand",
            "Tip-Adapter-F": "best epoch on test",
        }.get(row.method, "" if clip or row.dataset == "cars" else "mean per class")


def test_the_report_of_a_benchmark_shows_them_after_its_own_accuracies(tmp_path) -> None:
    text, page = written(tmp_path, SWEEP | {"datasets": ["caltech101"]}, grid("caltech101"))
    text = text.replace(NONE, "-")
    assert text.count("Published, not measured here: ") == 1
    assert "Protocols differ: the rows with CLIP follow CoOp's" in text
    assert text.index("Accuracy in percent by") < text.index("Published, not") < text.index("Answers in text")
    assert "| method | 0 | 1 | 2 | 4 | 8 | 16 | all | protocol | source |" in text
    setting = "CoOp's split, 100 classes; CLIP RN50"
    assert f"| zero-shot CLIP | 85.92 | - | - | - | - | - | - | {setting} | log published with Tip" in text
    assert f"| CoOp (second-hand) | - | 87.80 | 87.87 | 89.57 | 90.10 | 92.07 | - | {setting} | a third party" in text
    assert "| Tip-Adapter-F (best epoch on test) | - | 89.33 | 89.74 | 90.56 | 91.44 | 92.86 | - | " in text
    other = "CoOp's data | CLS-RL, 2025 (arXiv 2503.16188), table 2, read from a copy |"
    assert f"| Qwen2-VL-2B, supervised (another model; second-hand) | - | - | - | 93.9 | - | - | - | {other}" in text
    assert "Visual-RFT (ICCV 2025, arXiv 2503.01785)" in text
    assert "ReFine-RFT (CVPR 2026 Findings) has a mean of 86.5% at 4 shots." in text
    full = "frozen features, logistic regression | Oquab et al., 2023 (arXiv 2304.07193) |"
    assert f"| DINOv2 ViT-L/14 (mean per class) | - | - | - | - | - | - | 97.5 | {full}" in text
    assert not Page(page).open
    cells = [*re.findall(r"<th scope=\"row\">(.*?)</th>", html.unescape(page)), *re.findall(r"<td>(.*?)</td>", page)]
    assert {"CLIP linear probe (second-hand)", "70.62", "DINOv2 ViT-g/14 (mean per class)", "97.6"} <= set(cells)
    assert not re.search(r"\*\*\d\d\.\d\d\*\*", text)  # the best is marked among ours alone


def test_cars_are_no_mean_per_class(tmp_path) -> None:
    text, _ = written(tmp_path, SWEEP | {"datasets": ["cars"]}, grid("cars"))
    assert "| DINOv2 ViT-S/14 |" in text
    assert "(mean per class)" not in text


def test_other_sets_have_no_such_table(tmp_path) -> None:
    for dataset in ("icons", "digits", "folder:caltech101", "hub:dpdl-benchmark/caltech101"):
        assert published_table(dataset) is None
    for report in written(tmp_path, SWEEP | {"datasets": ["folder:caltech101"]}, grid("folder:caltech101")):
        assert "Published" not in report
        assert "CoOp" not in report
