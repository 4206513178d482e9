"""The report in Markdown: the right numbers, in words and in tables."""

import csv
import re

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from reported import SWEEP, Page, cell, grid, store_predictions, written
from scipy import stats

from experiments.report.report import write_report
from experiments.report.summary import headline
from experiments.report.tables import NONE


def test_files(tmp_path):
    paths = write_report(tmp_path, SWEEP, grid(), {"icons": 120})
    expected = ["figures/icons.png", "figures/icons.svg", "report.md", "report.html", "results.csv"]
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == expected
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()) == sorted(expected)


def test_several_data_sets_have_a_figure_together_and_first(tmp_path):
    sweep = SWEEP | {"datasets": ["icons", "together", "pets"]}
    cells = [*grid(), *grid("together")]  # nothing of pets
    paths = write_report(tmp_path, sweep, cells, {})
    names = [path.relative_to(tmp_path).as_posix() for path in paths]
    assert names[:4] == ["figures/together.png", "figures/together.svg", "figures/icons.png", "figures/icons.svg"]
    assert len(set(names)) == len(names) == 9
    text = (tmp_path / "report.md").read_text()
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert pictures == [names[0], names[2], names[4]]
    assert text.index("3 methods were compared") < text.index("Run it again") < text.index(names[0])
    assert "on icons, together; numbers" in text
    one, _ = written(tmp_path / "one", SWEEP, grid())
    assert "together" not in one


def test_markdown_has_the_numbers(tmp_path):
    text, _ = written(tmp_path, SWEEP, grid(), n_classes={"icons": 40})
    text = text.replace(NONE, "-")
    # Half-width: t(0.975, 2) * 0.02 / sqrt(3) = 0.0497
    assert "| method | 0 | 1 | 4 |\n| --- | ---: | ---: | ---: |" in text
    assert "| VLM + LoRA | 25.0 | 32.0 ± 5.0 | **82.0 ± 5.0** |" in text  # begins where the model is not tuned yet
    assert "| pixel kNN | - | **33.0 ± 5.0** | 42.0 ± 5.0 |" in text
    assert "| VLM zero-shot | 25.0 | - | - |" in text
    assert "| icons | 40 | 120 | 3 | 13 |" in text
    assert "| VLM + LoRA | 3.00 | 0.50 |" in text
    assert "| adam.betas | 0.9, 0.95 |" in text
    assert "> **Note.** The nano models have &lt;random&gt; weights." in text
    assert "Missing cells" not in text  # none is
    assert "```sh\nkshot sweep demo --root …/data --shots 1,4\n```" in text


def said(folder, cells) -> str:
    return headline(folder, cells, "icons").replace("\N{NO-BREAK SPACE}", " ")


def test_the_first_paragraph_says_what_the_paired_tests_say(tmp_path):
    """Intervals over seeds overlap at 1, where the test is sure nevertheless."""
    opening = "3 methods were compared on icons with 1 to 4 labelled examples per class (3 seeds). "
    ending = " With no example at all, VLM zero-shot reaches 25.0 %."
    bare = "At 1 per class, pixel kNN is best with 33.0 %. At 4 per class, VLM + LoRA is best with 82.0 %."
    assert said(tmp_path, grid()) == opening + bare + ending
    store_predictions(tmp_path, grid())
    text = said(tmp_path, grid())
    assert "pixel kNN is best with 33.0 %, ahead of the other by 1.0 points or more (paired test, p ≤ 0.0" in text
    assert (
        "At 4 per class, VLM + LoRA is best with 82.0 %, ahead of the other by 40.0 points or more "
        "(paired test, p < 0.001)." in text
    )
    assert "overlap" not in text


def test_the_first_paragraph_does_not_choose_where_the_test_does_not(tmp_path):
    """Two methods that are right on other images: half a point on 200 images is nothing."""
    shares = {"vlm-lora": 0.5, "pixel-knn": 0.505}
    cells = [cell(method, 4, 0, share) for method, share in shares.items()]
    store_predictions(tmp_path, cells)
    path = tmp_path / "predictions" / "pixel-knn-4-0.parquet"
    table = parquet.read_table(path)
    label = table["label"].to_numpy()
    right = np.arange(200) >= 200 - 101
    prediction = pa.array(np.where(right, label, (label + 1) % 10))
    parquet.write_table(table.set_column(2, "prediction", prediction), path)
    text = said(tmp_path, cells)
    assert (
        "At 4 per class, pixel kNN is best with 50.5 %; the paired test does not tell it from VLM + LoRA (p ≥ 0."
        in text
    )


@pytest.mark.parametrize(
    ("seeds", "ending"),
    [
        ({"vlm-lora": (0.5, 0.9, 0.9), "pixel-knn": (0.65,)}, ", but on the seeds that both have pixel kNN is ahead."),
        (
            {"vlm-lora": (None, 0.9, 0.9), "dinov2-lora": (None, 0.5), "pixel-knn": (0.85,)},
            "; there is no paired test with pixel kNN.",
        ),
    ],
)
def test_the_first_paragraph_knows_that_methods_lack_seeds(tmp_path, seeds, ending):
    """The mean of the leader is of seeds that the other does not have."""
    found = ((method, seed, share) for method, shares in seeds.items() for seed, share in enumerate(shares) if share)
    cells = [cell(method, 4, seed, share) for method, seed, share in found]
    store_predictions(tmp_path, cells)
    assert re.search(rf"At 4 per class, VLM \+ LoRA is best with \d\d.\d %{ending}", said(tmp_path, cells))


def test_the_first_paragraph_on_the_two_tuned_models(tmp_path):
    cells = [cell(m, 4, s, share) for m, share in (("vlm-lora", 0.8), ("dinov2-lora", 0.6)) for s in (0, 1)]
    store_predictions(tmp_path, cells)
    text = said(tmp_path, cells)
    assert "Of the two tuned models, VLM + LoRA is 20.0 points ahead of DINOv2 + LoRA at 4 (p < 0.001)." in text


def test_the_first_paragraph_of_one_method_and_of_none_that_learns(tmp_path):
    one = [c for c in grid() if c["seed"] == 0 and c["shots"] == 4]
    assert said(tmp_path, one[:1]).startswith("1 method was compared on icons with 4 labelled examples per class")
    zero = [c for c in grid() if c["shots"] == 0]
    assert "with no labelled examples per class (1 seed). With no example at all, VLM" in said(tmp_path, zero)


def test_missing_cells_are_listed_and_thin_means_marked(tmp_path):
    cells = [c for c in grid() if (c["method"], c["shots"], c["seed"]) != ("vlm-lora", 4, 1)]
    sweep = SWEEP | {"datasets": ["icons", "pets"], "methods": ["vlm-zero-shot", "vlm-lora"]}
    text, _ = written(tmp_path, sweep, cells)
    assert "Cells not run yet: 8." in text
    assert "| icons | VLM + LoRA | 1 | 4 |" in text
    assert "| pets | VLM zero-shot | 0 | 0 |" in text
    assert "| pets | VLM + LoRA | 2 | 1, 4 |" in text
    assert "(n=2)" in text


def test_no_cells_at_all(tmp_path):
    text, page = written(tmp_path, SWEEP, [])
    assert "Cells not run yet: 13." in text
    Page(page)


def test_a_curve_begins_at_nothing_only_where_that_was_run(tmp_path):
    text, _ = written(tmp_path, SWEEP, [c for c in grid() if c["shots"]])
    assert "| method | 1 | 4 |" in text
    assert "| VLM + LoRA | 32.0 ± 5.0 | **82.0 ± 5.0** |" in text
    assert "before it is tuned" not in text


def test_answers_in_text_at_every_shots(tmp_path):
    text, _ = written(tmp_path, SWEEP, grid())
    assert "| method | k | constrained % | strict % | unparseable % |" in text
    assert "| VLM + LoRA | 0 | 25.0 | 12.5 | 5.0 |\n| VLM + LoRA | 1 | 32.0 ± 5.0 | 16.0 ± 2.5 | 5.0 ± 0.0 |" in text
    assert "VLM + LoRA at 0 is VLM zero-shot: the model before it is tuned." in text
    assert "| VLM zero-shot | 0 |" not in text  # one row is enough
    assert "exact posterior, ties" in text
    calibrated, _ = written(tmp_path, SWEEP, [c | {"settings": {"calibration": "pmi"}} for c in grid()])
    assert "exact posterior as calibrated, ties" in calibrated
    alone, _ = written(tmp_path, SWEEP, [c for c in grid() if c["method"] != "vlm-lora"])
    assert "| VLM zero-shot | 0 | 25.0 | 12.5 | 5.0 |" in alone
    none, _ = written(tmp_path, SWEEP, [c for c in grid() if c["method"] == "pixel-knn"])
    assert "Answers in text" not in none


def test_intervals_hold_seeds_and_images_where_their_number_is_known(tmp_path):
    cells = [c | {"test_images": 120} for c in grid()]
    text, _ = written(tmp_path, SWEEP, cells)
    low, high = stats.binomtest(30, 120).proportion_ci(method="wilson")
    interval = f"25.0 \\[{100 * low:.1f}, {100 * high:.1f}\\]"
    assert f"| VLM zero-shot | {interval} |" in text
    tuned = re.search(rf"\| VLM \+ LoRA \| {re.escape(interval)} \| 32\.0 \\\[(\S+), (\S+)\\\] \|", text)
    assert tuned
    assert float(tuned[1]) < 32.0 - 5.0 < 32.0 + 5.0 < float(tuned[2])  # wider than over seeds alone
    assert text.count("95% Wilson score interval") == 2
    assert "95% interval over seeds and test images" in text
    plain, _ = written(tmp_path, SWEEP, grid())
    assert "Wilson" not in plain


def test_a_column_that_repeats_another_is_left_out(tmp_path):
    text, _ = written(tmp_path, SWEEP, grid())
    (header,) = re.findall(r"\| method \| accuracy % \|.*", text)
    assert "constrained" not in header  # the accuracy of the methods that answer in text
    assert "mean per class" not in header  # as it is made here
    assert "strict %" in header


def test_the_table_of_all_cells(tmp_path):
    written(tmp_path, SWEEP, [c | {"settings": {"model": "/home/ada/model"}} for c in grid()])
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert len(rows) == len(grid())
    found = {(r["method"], int(r["shots"]), int(r["seed"])): float(r["accuracy"]) for r in rows}
    assert found == {(c["method"], c["shots"], c["seed"]): c["metrics"]["accuracy"] for c in grid()}
    assert {r["setting.model"] for r in rows} == {"…/model"}
