"""The report as a page: whole, safe, without paths, the same bytes twice. In a browser: `test_report_browser`."""

import base64
import hashlib
import re
from itertools import pairwise

import pytest
from reported import NASTY, SWEEP, Page, grid, written

from experiments.report.report import write_report


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
    return written(tmp_path_factory.mktemp("nasty"), sweep, cells, drawn=True)


@pytest.fixture(scope="module")
def harmless(tmp_path_factory) -> tuple[str, str]:
    return written(tmp_path_factory.mktemp("harmless"), SWEEP, grid(), drawn=True)


def test_html_is_whole_and_asks_for_nothing(harmless):
    _, text = harmless
    page = Page(text)
    assert not page.open
    assert [tag for tag, _ in page.tags if tag in ("script", "link", "iframe")] == ["script"]
    (script,) = re.findall(r'<script type="module">(.*?)</script>', text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'\"" in text  # and no other script
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {link["href"] for link in page.named("a")} <= {f"#{each}" for each in ids}  # nowhere but into the page
    assert [img["src"][:26] for img in page.named("img")] == ["data:image/svg+xml;base64,"]
    assert [each["media"] for each in page.named("source")] == ["(prefers-color-scheme: dark)"]
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


def test_no_absolute_paths(nasty, harmless, tmp_path_factory):
    for report in (*nasty, *harmless):
        assert "/home" not in report
        assert "lovelace" not in re.sub(r"base64,[^\"]*", "", report)
        assert str(tmp_path_factory.getbasetemp()) not in report


def test_second_write_gives_the_same_bytes(tmp_path):
    """With figures of one data set and of all, and with published rows."""
    sweep, cells = SWEEP | {"datasets": ["icons", "cars"]}, [*grid(), *grid("cars")]
    first = [path.read_bytes() for path in write_report(tmp_path / "a", sweep, cells, {"icons": 120})]
    second = [path.read_bytes() for path in write_report(tmp_path / "b", sweep, cells[::-1], {"icons": 120})]
    assert first == second
    assert len(set(first)) == 9


def test_headings_are_in_order_and_the_contents_name_the_chapters(nasty, tmp_path):
    sweep = SWEEP | {"datasets": ["icons", "cars"]}
    for _, text in (nasty, written(tmp_path, sweep, [*grid(), *grid("cars")])):
        levels = [int(tag[1]) for tag, _ in Page(text).tags if re.fullmatch(r"h\d", tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))
        chapters = re.findall(r'<h2 id="(.*?)">(.*?)</h2>', text)
        assert re.findall(r'<li><a href="#(.*?)">(.*?)</a></li>', text) == chapters
    assert [name for _, name in chapters] == ["Run it again", "All data sets", "icons", "cars", "How it was run"]
