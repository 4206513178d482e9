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

from experiments.display import file_stem, name, without_paths
from experiments.plot import STYLES, figure, ordered, style
from experiments.report import headline, write_report
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
    assert "| VLM + LoRA | - | 32.0 ± 5.0 | **82.0 ± 5.0** |" in text
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
    assert "(one seed, so without an interval)" in headline(one, "icons")
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


def test_paired_differences_when_predictions_are_there(tmp_path):
    (tmp_path / "predictions").mkdir()
    label = np.arange(200) % 10
    for c in grid():
        right = np.arange(200) < 200 * c["metrics"]["accuracy"]
        columns = {"key": [str(i) for i in range(200)], "label": label, "prediction": np.where(right, label, 99)}
        parquet.write_table(pa.table(columns), tmp_path / "predictions" / f"{c['key']}.parquet")
    text, _ = written(tmp_path, SWEEP, grid())
    row = re.search(r"\| pixel kNN \| 0 \| \+40\.0 \| \+(\S+) to \+(\S+) \| &lt;0\.001 \|", text)
    assert row
    assert 30 < float(row[1]) < 40 < float(row[2]) < 50


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
    ],
    ids=["one seed", "zero-shot only", "unknown method", "gaps"],
)
def test_figure_of_little(tmp_path, cells):
    png, svg = figure(cells, "icons", tmp_path / "deep" / "er", n_classes=10)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in svg.read_text()


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
