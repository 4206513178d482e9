"""Figures and reports: right numbers, safe text, the same bytes twice, fit for a phone."""

import os
import re
import subprocess
import sys
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from scipy import stats
from sklearn.metrics import confusion_matrix

from experiments.display import file_stem, name, without_paths
from experiments.plot import figure
from experiments.report import headline, write_report
from experiments.styles import STYLES, ordered, style
from experiments.tables import NONE
from kshot_errors import ResultsError

CHROMIUM = Path("/usr/bin/chromium")
NASTY = f"folder:/home/lovelace/<script>alert(1)|{'x' * 90}"
SWEEP = {
    "name": "demo",
    "datasets": ["icons"],
    "methods": ["vlm-zero-shot", "vlm-lora", "pixel-knn"],
    "shots": [1, 4],
    "seeds": [0, 1, 2],
    "settings": {"root": "/home/lovelace/my data", "adam": {"lr": 1e-4, "betas": [0.9, 0.95]}},
    "notes": ["The nano models have <random> weights."],
    "command": "kshot sweep demo --root /home/lovelace/data --shots 1,4",
}
ACCURACY = {
    ("vlm-zero-shot", 0): [0.25],
    ("vlm-lora", 1): [0.30, 0.32, 0.34],
    ("vlm-lora", 4): [0.80, 0.82, 0.84],
    ("pixel-knn", 1): [0.31, 0.33, 0.35],
    ("pixel-knn", 4): [0.40, 0.42, 0.44],
}


class Page(HTMLParser):
    """Tags in order with attributes; complains when they do not nest."""

    EMPTY = frozenset({"meta", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.tags if found == tag]


def cell(method: str, shots: int, seed: int, accuracy: float, dataset: str = "icons") -> dict:
    answers = method in ("vlm-lora", "vlm-zero-shot")
    return {
        "key": f"{method}-{shots}-{seed}",
        "dataset": dataset,
        "protocol": "kshot",
        "method": method,
        "shots": shots,
        "seed": seed,
        "settings": {},
        "metrics": {
            "accuracy": accuracy,
            "accuracy_strict": accuracy / 2 if answers else None,
            "accuracy_constrained": accuracy if answers else None,
            "top5": 0.9,
            "mean_per_class": accuracy,
            "nll": 1.5 if answers else None,
            "ece": 0.1 if answers else None,
            "unparseable": 0.05 if answers else None,
        },
        "timings": {"fit_seconds": 2.0 + seed, "predict_seconds": 0.5},
        "versions": {"python": "3.11.2", "torch": "2.15.0"},
    }


def grid(dataset: str = "icons") -> list[dict]:
    return [cell(m, k, seed, a, dataset) for (m, k), row in ACCURACY.items() for seed, a in enumerate(row)]


def written(folder: Path, sweep: dict, cells: list[dict], **more) -> tuple[str, str]:
    write_report(folder, sweep, cells, {"icons": 120}, **more)
    return (folder / "report.md").read_text(), (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def nasty(tmp_path_factory) -> tuple[str, str]:
    """A report in which every name tries something."""
    sweep = SWEEP | {
        "datasets": [NASTY],
        "notes": ["n" * 90],
        "command": "c" * 90,
        "methods": ["vlm-lora", "<b>new|er"],
        "name": "<i>/home/lovelace/x",
    }
    cells = [c | {"method": c["method"].replace("pixel-knn", "<b>new|er")} for c in grid(NASTY)]
    return written(tmp_path_factory.mktemp("nasty"), sweep, cells)


def test_files(tmp_path):
    paths = write_report(tmp_path, SWEEP, grid(), {"icons": 120})
    expected = ["figures/icons.png", "figures/icons.svg", "report.md", "report.html"]
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == expected
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()) == sorted(expected)


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
    assert "every planned cell has been run" in text
    assert "```sh\nkshot sweep demo --root …/data --shots 1,4\n```" in text


def test_headline_says_the_best_and_doubts_what_overlaps():
    assert headline(grid(), "icons").replace("\N{NO-BREAK SPACE}", " ") == (
        "3 methods were compared on icons with 1 to 4 labelled examples per class (3 seeds): at 1 per class, pixel kNN "
        "is best with 33.0 ± 5.0 %, but the 95% interval overlaps with that of VLM + LoRA; at 4 per class, VLM + LoRA "
        "is best with 82.0 ± 5.0 %, with a 95% interval above all others; with no example at all, VLM zero-shot "
        "reaches 25.0 %."
    )


def test_headline_of_one_seed_and_of_one_method():
    one = [c for c in grid() if c["seed"] == 0 and c["shots"] == 4]
    assert "(one seed, so without an interval over seeds)" in headline(one, "icons")
    assert headline(one[:1], "icons").startswith("1 method was compared on icons with 4 labelled examples per class")
    zero = [c for c in grid() if c["shots"] == 0]
    assert "with no labelled examples per class (1 seed): with no example at all, VLM" in headline(zero, "icons")


def test_missing_cells_are_listed_and_thin_means_marked(tmp_path):
    cells = [c for c in grid() if (c["method"], c["shots"], c["seed"]) != ("vlm-lora", 4, 1)]
    sweep = SWEEP | {"datasets": ["icons", "pets"], "methods": ["vlm-zero-shot", "vlm-lora"]}
    text, _ = written(tmp_path, sweep, cells)
    assert "Cells not run yet: 8." in text
    assert "| icons | VLM + LoRA | 1 | 4 |" in text
    assert "| pets | VLM zero-shot | 0 | 0 |" in text
    assert "| pets | VLM + LoRA | 2 | 1, 4 |" in text
    assert "(n=2)" in text


def test_planned_replaces_the_full_grid(tmp_path):
    text, _ = written(tmp_path, SWEEP, grid(), planned=[("icons", "vlm-lora", 8, 0)])
    assert "Cells not run yet: 1." in text


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


def test_a_single_run_has_its_interval_over_images(tmp_path):
    cells = [c | {"test_images": 120} for c in grid()]
    text, _ = written(tmp_path, SWEEP, cells)
    low, high = stats.binomtest(30, 120).proportion_ci(method="wilson")
    interval = f"25.0 \\[{100 * low:.1f}, {100 * high:.1f}\\]"
    assert f"| VLM zero-shot | {interval} |" in text
    assert f"| VLM + LoRA | {interval} | 32.0 ± 5.0 | **82.0 ± 5.0** |" in text
    assert text.count("95% Wilson score interval") == 2
    assert "±" in text.partition("Wilson")[0]
    assert headline(cells, "icons") == headline(grid(), "icons")
    plain, _ = written(tmp_path, SWEEP, grid())
    assert "Wilson" not in plain


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


def test_html_is_whole_and_asks_for_nothing(tmp_path):
    _, text = written(tmp_path, SWEEP, grid())
    page = Page(text)
    assert not page.open
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "a")]
    assert [img["src"][:26] for img in page.named("img")] == ["data:image/svg+xml;base64,"]
    assert all(img["alt"] for img in page.named("img"))
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text
    assert [tag for tag, _ in page.tags].count("h1") == 1
    assert {th.get("scope") for th in page.named("th")} == {"col", "row"}


def test_names_are_escaped(nasty):
    text, page = nasty
    for report in nasty:
        assert "<script>" not in report
        assert "<b>" not in report
        assert "<i>" not in report
    assert not Page(page).open
    assert "&lt;b&gt;new\\|er" in text
    rows = [line for line in text.splitlines() if line.startswith("| &lt;b&gt;") and "±" in line]
    assert len(re.findall(r"(?<!\\)\|", rows[0])) == 5  # method, 0, 1, 4


def test_no_absolute_paths(nasty, tmp_path):
    for report in (*nasty, *written(tmp_path, SWEEP, grid())):
        assert "/home" not in report
        assert "lovelace" not in re.sub(r"base64,[^\"]*", "", report)
        assert str(tmp_path) not in report


def test_second_write_gives_the_same_bytes(tmp_path):
    first = [path.read_bytes() for path in write_report(tmp_path / "a", SWEEP, grid(), {"icons": 120})]
    second = [path.read_bytes() for path in write_report(tmp_path / "b", SWEEP, grid()[::-1], {"icons": 120})]
    assert first == second


@pytest.mark.parametrize(
    "cells",
    [
        [cell("vlm-lora", 4, 0, 0.5)],
        [cell("vlm-zero-shot", 0, 0, 1.0)],
        [cell("made-up", 1, s, 0.0) for s in (0, 1)],
        [c for c in grid() if c["method"] != "vlm-lora" or c["shots"] == 1],
        [cell("vlm-zero-shot", 0, 0, a) | {"test_images": 10} for a in (0.0, 1.0)],
        [cell("vlm-lora", 1, 0, a) | {"test_images": 3} for a in (0.0,)],
    ],
    ids=["one seed", "zero-shot only", "unknown method", "gaps", "two zero-shot runs", "none right"],
)
def test_figure_of_little(tmp_path, cells):
    png, svg = figure(cells, "icons", tmp_path / "deep" / "er", n_classes=10)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in svg.read_text()


def test_a_curve_is_drawn_from_the_model_untuned_on(tmp_path):
    """The lines of the SVG in the colour of VLM + LoRA: from 0 to the gap, and from the gap to 1."""
    colour = style("vlm-lora").colour.lower()
    counts = []
    for number, cells in enumerate((grid(), [c for c in grid() if c["shots"]])):
        _, svg = figure(cells, "icons", tmp_path / str(number))
        counts.append(
            len(re.findall(rf'<path d="[^"]*" clip-path="[^"]*" style="fill: none; stroke: {colour}', svg.read_text()))
        )
    assert counts[0] - counts[1] == 2


def test_figure_of_a_name_in_another_script_and_of_nothing(tmp_path):
    assert figure([cell("vlm-lora", 1, 0, 0.5, "$\\frac$ 猫")], "$\\frac$ 猫", tmp_path)
    with pytest.raises(ResultsError, match="no cell of data set 'pets'"):
        figure(grid(), "pets", tmp_path)


def test_styles_can_be_told_apart():
    assert len({look.colour for look in STYLES.values()}) == len({look.marker for look in STYLES.values()}) == 9
    assert style("made-up").title == "made-up"
    assert ordered(["zz", "pixel-knn", "aa", "vlm-lora"]) == ["vlm-lora", "pixel-knn", "aa", "zz"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("--root /home/lovelace/data --k 1", "--root …/data --k 1"),
        ("--out=/tmp/x", "--out=…/x"),
        ("Qwen/Qwen3-VL at http://localhost:8000/v1 is n/a, 1/40", None),
        ("./runs/x ../y ~/z", None),
        ("file:///home/lovelace/x", "file://…/x"),
        (r"C:\Users\ada\x", "…/x"),
        ('"/home/lovelace/x"', '"…/x"'),
    ],
)
def test_without_paths(text, shown):
    shown = shown or text
    assert without_paths(text) == shown
    assert without_paths(shown) == shown


def test_names_with_spaces_and_file_stems():
    assert name("folder:/home/lovelace/my photos") == "folder:…/my photos"
    assert name("folder:my/photos") == "folder:my/photos"
    assert file_stem("oxford_flowers102") == "oxford_flowers102"
    stems = {file_stem(d) for d in ("folder:my/photos", "folder:my-photos", "folder:/a/my/photos", "..", "猫", "Icons")}
    assert len(stems) == 6
    assert all(re.fullmatch(r"[a-z0-9_-]+", stem) for stem in stems)


def test_no_torch():
    code = "import sys, experiments.report, experiments.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(not CHROMIUM.exists(), reason="/usr/bin/chromium is not installed")
def test_page_does_not_overflow_a_phone(nasty, tmp_path):
    # The page sits in a frame of 390 px: a headless window has a minimum width of its own.
    page = escape(nasty[1])
    probe = "document.title = [d.documentElement.scrollWidth, d.body.scrollWidth, d.images[0].naturalWidth > 0].join()"
    (tmp_path / "frame.html").write_text(
        f'<iframe width="390" height="800" style="border:0" srcdoc="{page}" '
        f'onload="const d = this.contentDocument; {probe}"></iframe>'
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}"]
    found = subprocess.run(
        [*command, "--dump-dom", (tmp_path / "frame.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=os.environ | {"HOME": str(tmp_path)},
    )
    assert "<title>390,390,true</title>" in found.stdout
