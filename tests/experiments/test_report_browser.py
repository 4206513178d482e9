"""The report's page in headless Chromium: by keyboard, on a phone, in the dark, with images and without script."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from reported import NASTY, SWEEP, grid, store_predictions, written

from experiments.report.comparisons import ImageSources
from tests.vlm.browser import Tab, needs_chromium, wait

pytestmark = needs_chromium
FOCUSED = """(() => {
  const it = document.activeElement, seen = getComputedStyle(it), box = it.getBoundingClientRect();
  return {tag: it.tagName, href: it.getAttribute('href'), place: [...document.querySelectorAll('*')].indexOf(it),
          outline: seen.outlineStyle != 'none' && parseFloat(seen.outlineWidth) >= 2,
          visible: box.bottom > 0 && box.top < innerHeight && box.right > 0 && box.left < innerWidth};
})()"""
# Everything that can be scrolled sideways, as places in the document.
SCROLLED = """[...document.querySelectorAll('*')].map((it, n) => [it, n]).filter(([it]) =>
  ['auto', 'scroll'].includes(getComputedStyle(it).overflowX) && it.scrollWidth > it.clientWidth).map(([, n]) => n)"""
# The contrast of every text with what is behind it (WCAG 2.2, 1.4.3), the lowest of all.
CONTRAST = """(() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, n) => sum + v * [0.2126, 0.7152, 0.0722][n], 0);
  const behind = (it) => {
    for (; it; it = it.parentElement) {
      const colour = rgb(getComputedStyle(it).backgroundColor);
      if (colour.length == 3 || colour[3] == 1) return colour;
    }
    return [255, 255, 255];
  };
  return Math.min(...[...document.body.querySelectorAll('*')]
    .filter((it) => [...it.childNodes].some((node) => node.nodeType == 3 && node.data.trim())).map((it) => {
      const [a, b] = [light(rgb(getComputedStyle(it).color)), light(behind(it))].sort((x, y) => y - x);
      return (a + 0.05) / (b + 0.05);
    }));
})()"""


def image(_: str, key: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (300, 200), (10 * int(key), 90, 90)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every kind of block, two data sets, images, and names that try something."""
    folder = tmp_path_factory.mktemp("report")
    cells = [*grid("cars"), *grid(NASTY)]
    for n, each in enumerate(cells):
        each["key"] = f"cell-{n}"
    store_predictions(folder, cells, images=20, classes=4)
    names = ["<b>one", "two" * 30, "three", "four"]
    sweep = SWEEP | {
        "datasets": ["cars", NASTY],
        "notes": ["n" * 90],
        "command": f"kshot sweep --most-shots flowers=10 --cap-shots {'c' * 90}",
        "classes": {"cars": names, NASTY: names},
        "protocols": {"cars": "official-0", NASTY: "p" * 90},
        "data": {"cars": {"content": "f" * 64}},
    }
    gone = ("cars", "vlm-lora", 4, 2)
    cells = [c for c in cells if (c["dataset"], c["method"], c["shots"], c["seed"]) != gone]
    images = ImageSources(image, lambda *_: image("", "3"))
    written(folder, sweep, cells, drawn=True, failures={gone: "e" * 300}, images=images)
    return folder / "report.html"


def opened(tab: Tab, report: Path, width: int, *, dark: bool = False) -> None:
    tab.call("Emulation.setDeviceMetricsOverride", width=width, height=700, deviceScaleFactor=1, mobile=width < 600)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    tab.call("Emulation.setEmulatedMedia", features=[scheme])
    tab.open(report.as_uri(), until="#content")
    tab.until("document.readyState == 'complete'")  # else what comes later may not be there yet


def tabbed(tab: Tab, limit: int = 300) -> list[dict]:
    """What the Tab key reaches, in order, until it leaves the page."""
    reached: list[dict] = []
    for _ in range(limit):
        tab.press("Tab")
        focused = tab.js(FOCUSED)
        if focused["tag"] == "BODY" or (reached and focused["place"] == reached[0]["place"]):
            return reached
        reached.append(focused)
    raise AssertionError(f"after {limit} times Tab still in the page")


@pytest.mark.parametrize("width", [360, 1200])
def test_the_keyboard_reaches_every_link_and_everything_that_scrolls(tab: Tab, report: Path, width: int) -> None:
    opened(tab, report, width)
    reached = tabbed(tab)
    places = [each["place"] for each in reached]
    assert places == sorted(places)
    links = tab.js("[...document.querySelectorAll('a')].map((it) => it.getAttribute('href'))")
    assert [each["href"] for each in reached if each["tag"] == "A"] == links
    assert links[0] == "#content"
    assert len(links) == 1 + 1 + 2 + 3  # skip; all sets; each; how, missing, again
    scrolled = tab.js(SCROLLED)
    assert len(scrolled) >= 10 if width == 360 else scrolled == []
    assert set(scrolled) <= set(places)
    assert all(each["outline"] and each["visible"] for each in reached)
    named = "(it) => (it.getAttribute('aria-label') || '').trim() && it.getAttribute('role')"
    assert tab.js(f"[...document.querySelectorAll('[tabindex=\"0\"]')].every({named})")


def test_the_first_link_skips_the_contents_and_the_others_lead_to_their_chapter(tab: Tab, report: Path) -> None:
    opened(tab, report, 360)
    tab.press("Tab")
    assert tab.text("a.skip") == "Skip to the results"
    tab.press("Enter")
    tab.until("location.hash == '#content'")
    tab.press("Tab")
    assert tab.js("document.querySelector('main').contains(document.activeElement)")
    opened(tab, report, 360)
    for _ in range(4):
        tab.press("Tab")
    tab.press("Enter")
    tab.until("location.hash != '' && location.hash != '#content'")
    # The third of the contents: all data sets, cars, then the other.
    tab.until("Math.abs(document.querySelectorAll('h2')[2].getBoundingClientRect().top) < 3")


def test_a_region_scrolls_by_arrow_keys(tab: Tab, report: Path) -> None:
    opened(tab, report, 360)
    wide = "[...document.querySelectorAll('.scroll')].find((it) => it.scrollWidth > it.clientWidth)"

    def scrolls() -> bool:  # a page that is still being laid out loses the focus, and the key
        if tab.js(f"{wide} === undefined"):
            return False
        tab.js(f"{wide}.focus()")
        tab.press("ArrowRight")
        return bool(tab.js(f"{wide}.scrollLeft > 0"))

    wait(scrolls, "a region that scrolls by a key")


def test_the_page_never_scrolls_sideways(tab: Tab, report: Path) -> None:
    beyond = "[...document.querySelectorAll('h1, h2, h3, p, nav, .gallery, .gallery *, caption span')]"
    beyond += ".filter((it) => it.getBoundingClientRect().right > innerWidth + 1).map((it) => it.outerHTML)"
    for width in (360, 390, 768):
        opened(tab, report, width)
        assert tab.js("innerWidth") == width  # a phone's grows with what does not fit
        assert tab.js("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
        assert tab.js(beyond) == []


def test_words_stand_to_the_left_and_commands_break_between_words(tab: Tab, report: Path) -> None:
    opened(tab, report, 360)
    words = "[...document.querySelectorAll('.again code span')]"
    heights = tab.js(f"{words}.map((it) => Math.round(it.getBoundingClientRect().height))")
    assert len({*heights[:-1]}) == 1  # a line each
    assert heights[-1] > heights[0]
    assert tab.js(f"new Set({words}.map((it) => Math.round(it.getBoundingClientRect().top))).size") > 2
    aligned = "(text) => getComputedStyle([...document.querySelectorAll('td')].find((it) => it.textContent == text))"
    for text, side in (("official-0", "left"), ("CoOp's split; CLIP RN50", "left"), ("55.74", "right")):
        assert tab.js(f"({aligned})({json.dumps(text)}).textAlign") == side, text


def test_every_image_is_shown(tab: Tab, report: Path) -> None:
    opened(tab, report, 360)
    tab.until("[...document.images].every((it) => it.complete)")
    sizes = tab.js("[...document.images].map((it) => [it.src.slice(0, 15), it.naturalWidth, it.clientWidth])")
    assert [natural for kind, natural, _ in sizes if kind == "data:image/jpeg"].count(96) >= 8
    assert len([1 for kind, *_ in sizes if kind == "data:image/svg+"]) == 3
    assert all(natural > 0 and shown > 0 for _, natural, shown in sizes)


def test_text_can_be_read_in_the_light_and_in_the_dark(tab: Tab, report: Path) -> None:
    for dark in (False, True):
        opened(tab, report, 1200, dark=dark)
        ground = tab.js("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
        assert (max(ground) < 60) if dark else (min(ground) > 200)
        assert tab.js(CONTRAST) >= 4.5
