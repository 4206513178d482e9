"""The report as a page: whole, safe, without paths, the same bytes twice, fit for a phone."""

import os
import re
import subprocess
from html import escape
from pathlib import Path

import pytest
from reported import NASTY, SWEEP, Page, grid, written

from experiments.report import write_report

CHROMIUM = Path("/usr/bin/chromium")


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
