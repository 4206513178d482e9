"""The loss curves of the server's page, in a real browser: read by eye, keys, pointer and screen reader."""

import re

import pytest

from tests.vlm.browser import Tab, needs_chromium
from tests.vlm.overviews import NOW, PageServer, a_run, an_overview


@pytest.fixture
def server(page_server: PageServer) -> PageServer:
    """The page, and the overview that a test gives it."""
    return page_server


def pairs(tab: Tab, axis: str) -> list[list[float]]:
    """(value, coordinate) of the first run's axis numbers."""
    number = "Number(node.textContent.replaceAll(',', ''))"
    at = "Number(node.getAttribute('x'))" if axis == "x" else "Number(node.getAttribute('y')) - 4"
    return tab.js(
        f"[...document.querySelector('.chart').querySelectorAll('text.{axis}')].map((node) => [{number}, {at}])"
    )


def curve(tab: Tab) -> list[tuple[str, float, float]]:
    """The first run's curve: (M or L, x, y) for each point."""
    parts = re.findall(r"([ML])([-\d.]+) ([-\d.]+)", tab.js("document.querySelector('.curve').getAttribute('d')"))
    return [(move, float(x), float(y)) for move, x, y in parts]


@needs_chromium
@pytest.mark.parametrize("scale", [1.0, 1e-4, 3e7, -2.0])
def test_points_lie_where_the_axis_numbers_say(server, tab, scale):
    losses = [[step, NOW, scale * (0.3 + 1 / step)] for step in range(1, 40)]
    server.overview = an_overview(runs=[a_run(losses=losses)])
    tab.open(server.url, ".chart text.y")
    (x0, px0), *_, (x1, px1) = pairs(tab, "x")
    (y0, py0), *_, (y1, py1) = pairs(tab, "y")
    assert x0 < x1
    assert px0 < px1
    assert y0 < y1
    assert py0 > py1  # upwards on the screen
    assert len(pairs(tab, "y")) >= 3
    assert len(pairs(tab, "x")) >= 3
    dot = tab.js("['cx', 'cy'].map((name) => Number(document.querySelector('.dot').getAttribute(name)))")
    assert dot == pytest.approx(curve(tab)[-1][1:], abs=0.01)
    found = [
        (round(x0 + (px - px0) / (px1 - px0) * (x1 - x0), 2), y0 + (py - py0) / (py1 - py0) * (y1 - y0))
        for _, px, py in curve(tab)
    ]
    assert [x for x, _ in found] == pytest.approx([step for step, _, _ in losses], abs=0.02)
    assert [y for _, y in found] == pytest.approx([loss for _, _, loss in losses], abs=abs(y1 - y0) * 1e-3)


@needs_chromium
def test_a_curve_grows_in_place_by_itself(server, tab):
    first = a_run()
    server.overview = an_overview(runs=[first])
    tab.open(server.url, ".chart text.y")
    assert len(curve(tab)) == 3
    tab.js("document.querySelector('.chart').mark = document.querySelector('#runs li').mark = 'same'")
    height = tab.js("document.documentElement.scrollHeight")
    longer = a_run(losses=[*first["losses"], [4, NOW, 0.5], [5, NOW, 0.25]])
    server.overview = an_overview(runs=[longer])
    tab.pass_time(2.1)
    tab.until("document.querySelector('.readout').textContent.includes('step 5 · loss 0.25')")
    assert len(curve(tab)) == 5
    assert tab.js("[document.querySelector('.chart').mark, document.querySelector('#runs li').mark]") == ["same"] * 2
    assert tab.js("document.documentElement.scrollHeight") == height
    server.overview = an_overview(runs=[a_run(5, created=NOW), longer])
    tab.ask()
    tab.until("document.querySelectorAll('#runs li').length === 2")
    assert tab.js("[...document.querySelectorAll('#runs li')].map((node) => node.mark ?? 'new')") == ["new", "same"]
    server.overview = an_overview()
    tab.ask()
    tab.until("document.querySelectorAll('#runs li').length === 0")


@needs_chromium
def test_arrow_keys_and_pointer_read_the_points(server, tab):
    run = a_run()
    server.overview = an_overview(runs=[run])
    tab.open(server.url, ".chart text.y")
    tab.js("document.querySelector('.chart').focus()")
    assert tab.js("document.activeElement.getAttribute('class')") == "chart"
    said = []
    for key in ("ArrowLeft", "ArrowLeft", "ArrowLeft", "End", "Home", "ArrowRight"):
        tab.press(key)
        said.append(tab.text(".readout").split(" · ")[:2])
    one, two, three = ["step 1", "loss 2.5"], ["step 2", "loss 1.25"], ["step 3", "loss 0.7071"]
    assert said == [two, one, one, three, one, two]
    server.overview = an_overview(runs=[a_run(losses=[*run["losses"], [4, NOW, 9.5]])])
    tab.ask()
    tab.until("document.querySelectorAll('#runs dd')[0].textContent === '9.5'")
    assert tab.text(".readout").startswith("step 2 · loss 1.25")  # the point stays chosen, and the focus where it is
    assert tab.js("document.activeElement.getAttribute('aria-valuetext')").startswith("step 2, loss 1.25, ")
    tab.press("Escape")
    assert tab.text(".readout").startswith("last: step 4 · loss 9.5")
    tab.js("document.activeElement.blur()")
    box = tab.js("(({x, y, width}) => ({x, y, width}))(document.querySelector('.chart').getBoundingClientRect())")
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=box["x"] + 60, y=box["y"] + 50)
    tab.until("document.querySelector('.readout').textContent.startsWith('step 1 ·')")
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=box["x"] + box["width"] / 2, y=box["y"] - 60)
    tab.until("document.querySelector('.readout').textContent.startsWith('last: step 4')")


@needs_chromium
def test_a_screen_reader_hears_what_the_curve_is(server, tab):
    server.overview = an_overview(runs=[a_run()])
    tab.open(server.url, ".chart text.y")
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
    (slider,) = [node for node in nodes if node.get("role", {}).get("value") == "slider"]
    assert slider["name"]["value"] == "Loss over steps: run 0"
    assert slider["description"]["value"].startswith(
        "3 values: 2.5 at step 1, 0.7071 at step 3, lowest 0.7071 at step 3"
    )
    assert slider["value"]["value"] == 3
    assert tab.value_text(slider).startswith("step 3, loss 0.7071, ")


@needs_chromium
@pytest.mark.parametrize(
    ("losses", "moves", "last"),
    [
        ([2.0, None, 1.0, 0.5, None], "MML", "last: step 5 · loss not a number"),
        ([None, None], "", "last: step 2 · loss not a number"),
        ([1.5], "M", "last: step 1 · loss 1.5"),
        ([0.0, 0.0], "ML", "last: step 2 · loss 0 "),
        ([1.0, 1.0 + 1e-15], "ML", "last: step 2 · loss 1 "),
    ],
)
def test_odd_curves(server, tab, losses, moves, last):
    server.overview = an_overview(runs=[a_run(losses=[[step, NOW, loss] for step, loss in enumerate(losses, 1)])])
    tab.open(server.url, ".chart text")
    assert "".join(move for move, _, _ in curve(tab)) == moves
    assert tab.text(".readout").startswith(last)
    inked = "(x, y) => document.querySelector('.curve').isPointInStroke(new DOMPoint(x, y))"
    assert all(0 <= y <= 160 and tab.js(f"({inked})({x}, {y})") for _, x, y in curve(tab))  # a lone point is seen too
    assert (tab.js("document.querySelector('.dot').getAttribute('visibility')") == "visible") == (
        bool(losses) and losses[-1] is not None
    )
