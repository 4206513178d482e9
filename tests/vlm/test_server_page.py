"""The server's page in a real browser, on an overview that each test writes. Its curves: test_server_curves.py.

How Chromium is driven, and what a tab must end without, is in tests/vlm/browser.py.
"""

import re

import httpx
import pytest
from tinker import types

import vlm
from kshot.errors import KshotError
from tests.vlm.browser import needs_chromium, wait
from tests.vlm.overviews import HOSTILE, NOW, PageServer, a_checkpoint, a_run, an_overview
from tests.vlm.services import step
from tests.vlm.serving import served
from vlm import nano
from vlm.server import page

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@pytest.fixture
def server(page_server: PageServer) -> PageServer:
    """The page, and the overview that a test gives it."""
    return page_server


# Files and headers


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html"),
        ("/page/page.css", "text/css"),
        ("/page/page.js", "text/javascript"),
        ("/page/try.js", "text/javascript"),
        ("/docs", "text/html"),
        ("/page/docs.js", "text/javascript"),
    ],
)
def test_each_file_comes_with_the_policy(server, path, kind):
    got, head = httpx.get(server.url + path), httpx.head(server.url + path)
    assert got.status_code == head.status_code == 200
    assert got.headers["content-type"] == f"{kind}; charset=utf-8"
    assert got.headers["content-security-policy"] == POLICY
    assert got.headers["x-content-type-options"] == "nosniff"
    assert got.headers["referrer-policy"] == "no-referrer"
    assert got.headers["cache-control"] == "no-store"
    assert head.headers["content-length"] == str(len(got.content))
    assert "http://" not in re.sub(r"http://www\.w3\.org/2000/svg", "", got.text)
    assert "https://" not in got.text


def test_a_file_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(page, "HERE", tmp_path)
    with pytest.raises(KshotError, match=r"the server's page\.html cannot be read .*; install kshot again"):
        page.routes()


@needs_chromium
def test_the_policy_holds_in_the_browser_and_the_console_tells(server, tab):
    tab.expected = ["Content Security Policy"]
    tab.open(server.url)
    tab.js("document.body.insertAdjacentHTML('beforeend', '<img src=data:, onerror=hacked=1>')")
    wait(lambda: any("Content Security Policy" in each for each in tab.errors()), "a violation in the console")
    assert tab.js("typeof hacked") == "undefined"


# What it shows


@needs_chromium
def test_an_empty_server_says_how_to_connect(server, tab):
    tab.open(server.url)
    seen = tab.text("body")
    for words in ("has no model", "No training run yet", "No checkpoint yet", 'kshot.connect("http://127.0.0.1:8000")'):
        assert words in seen
    assert 'tinker.ServiceClient(base_url="http://127.0.0.1:8000", api_key="tml-local")' in seen
    assert 'OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="tml-local")' in seen
    assert set(server.keys_seen) == {"tml-local"}
    assert not tab.js("document.querySelector('#ask').checkVisibility()")


@needs_chromium
def test_models_runs_checkpoints_and_queue_are_shown(server, tab):
    models = [{"name": "kshot/nano-qwen3-vl", "context": 4096, "loaded": True, "threads": 2}]
    path = "tinker://00000000-aaaa:train:0/sampler_weights/old"
    old = a_checkpoint("old", 7200, kind="sampler_weights", path=path, size_bytes=999, expires=NOW + 3 * 86400)
    run = a_run(user_metadata={"name": "flowers", "seed": 3})
    checkpoints = [old, a_checkpoint("new", 120), a_checkpoint("gone", 90000, expires=NOW - 1)]
    server.overview = an_overview(models=models, runs=[run], checkpoints=checkpoints)
    tab.open(server.url)
    assert tab.text("header p") == "http://127.0.0.1:8000 version 0.1.0"
    facts = ["1 h 1 min", "40 %", "3 jobs", "5", "20", "123,456", "2.5 MB of 4.0 GB (queues 2.5 MB, answers 999 B)"]
    assert tab.texts("#facts dd") == facts
    assert tab.texts("#models li") == ["kshot/nano-qwen3-vl context 4,096 tokens · loaded · 2 threads"]
    card = tab.text("#runs li")
    for words in ("flowers", "active", run["id"], "seed: 3", "0.7071", "last: step 3 · loss 0.7071", "1 min ago"):
        assert words in card
    assert tab.texts("#runs dd") == ["0.7071", "3", "1 min ago", "7 s ago", "32", "kshot/nano-qwen3-vl"]
    assert [path.rpartition("/")[2] for path in tab.texts("#checkpoints code")] == ["new", "old", "gone"]
    assert tab.texts("#try-model option") == ["kshot/nano-qwen3-vl", "old of 00000000-aaaa:train:0"]
    assert tab.texts("#checkpoints p") == [
        "weights · 1.2 MB · 2 min ago · does not expire",
        "sampler_weights · 999 B · 2 h ago · expires in 3 d",
        "weights · 1.2 MB · 1 d ago · expired",
    ]


@needs_chromium
def test_only_the_newest_are_shown_and_counted(server, tab):
    server.overview = an_overview(runs=[a_run(n) for n in reversed(range(60))])
    tab.open(server.url)
    assert tab.texts("#runs h3") == [f"run {n}" for n in range(50)]  # run 0 was created last
    assert tab.text("#runs-count") == "the newest 50 of 60"


@needs_chromium
def test_names_stay_text(server, tab):
    run = a_run(0, id=HOSTILE, base_model=HOSTILE, state=HOSTILE, user_metadata={"name": HOSTILE, HOSTILE: [HOSTILE]})
    odd = a_run(1, user_metadata={"name": {"no": "string"}})
    models = [{"name": HOSTILE, "context": 1, "loaded": False}]
    checkpoints = [a_checkpoint("x", 1, path=HOSTILE, kind=HOSTILE)]
    server.overview = an_overview(runs=[run, odd], models=models, checkpoints=checkpoints, address=HOSTILE, version="1")
    tab.open(server.url)
    assert tab.texts("#runs h3") == [HOSTILE, '{"no":"string"}']
    for selector in ("#address", "#models strong", "#runs .state", "#runs code", "#checkpoints code"):
        assert tab.texts(selector)[0] == HOSTILE
    assert tab.texts("#runs dd")[5] == HOSTILE
    assert tab.js("document.querySelectorAll('img, body script').length") == 0
    assert tab.js("typeof hacked") == "undefined"


@needs_chromium
def test_runs_are_named_by_their_metadata_and_said_to_be_active_or_idle(server, tab):
    runs = [
        a_run(0, user_metadata={"wandb_name": "by wandb", "seed": 1}),
        a_run(1, user_metadata={"log_path": "~/logs/pets-8b/"}, last_request=NOW - 300),
        a_run(2, losses=[], user_metadata={}, state="finished"),
        a_run(3, losses=[], user_metadata=None, state="lost"),
    ]
    server.overview = an_overview(runs=runs)
    tab.open(server.url, ".chart text.y")
    titles = tab.texts("#runs h3")
    assert titles[:2] == ["by wandb", "pets-8b"]
    assert all(re.fullmatch(r"Run of \d\d:\d\d:\d\d", title) for title in titles[2:])
    assert tab.texts("#runs .state") == ["active", "idle for 5 min", "finished", "lost"]
    assert "no step yet · kshot/nano-qwen3-vl" in tab.text("#runs > li:nth-child(3)")
    shown = tab.js("[...document.querySelectorAll('#runs .chart')].map((it) => it.checkVisibility())")
    assert shown == [True, True, False, False]
    assert tab.texts("#runs > li:nth-child(3) dd") == []


# Trying an image, and the description


@needs_chromium
def test_an_image_is_tried_on_a_model(tmp_path, tab, make_image):
    picture = tmp_path / "red.png"
    picture.write_bytes(make_image(1, 64, 64))
    with served(tmp_path / "state") as server:
        tab.open(server.address, "#try:not([hidden])")
        assert tab.texts("#try-model option") == [nano.NAME]
        document = tab.call("DOM.getDocument")["root"]["nodeId"]
        field = tab.call("DOM.querySelector", nodeId=document, selector="#try-image")["nodeId"]
        tab.call("DOM.setFileInputFiles", files=[str(picture)], nodeId=field)
        tab.js("document.querySelector('#try-classes').value = 'red, green, light green'")
        tab.js("document.querySelector('#try').requestSubmit()")
        tab.until("document.querySelectorAll('.bars li').length === 3")
        shares = [float(text.removesuffix(" %")) for text in tab.texts(".bars .soft")]
        assert sum(shares) == pytest.approx(100, abs=0.2)
        assert shares == sorted(shares, reverse=True)
        assert tab.texts("#try-answer p") == tab.texts(".bars li:first-child span:first-child")
        tab.js("document.querySelector('#try-classes').value = 'red, red'")
        tab.expected = ["400"]
        tab.js("document.querySelector('#try').requestSubmit()")
        tab.until("document.querySelector('#try-answer').innerText.startsWith('No answer: ')")
        tab.open(f"{server.address}/docs", "#groups section")
        seen = tab.text("body")
        for words in ("POST /v1/chat/completions", "POST /api/v1/forward_backward", "GET /metrics"):
            assert words in seen


# How it lives


@needs_chromium
@pytest.mark.parametrize(
    ("status", "overview", "offline", "why", "logged"),
    [
        (500, {}, False, "it answers with status 500", ["500"]),
        (200, "no object", False, "this page does not understand what it says; load it again", ["TypeError"]),
        (200, None, False, "what it says is not JSON", []),
        (200, {}, True, "the server cannot be reached", ["ERR_INTERNET_DISCONNECTED"]),
    ],
)
def test_a_silent_server_is_told_and_asked_again(server, tab, status, overview, offline, why, logged):
    known = server.overview = an_overview(models=[{"name": "m", "context": 8, "loaded": True}])
    tab.expected = logged
    tab.open(server.url)
    server.status, server.overview = status, overview
    tab.call("Network.enable")
    network = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    tab.call("Network.emulateNetworkConditions", offline=offline, **network)
    tab.ask()
    tab.until("document.querySelector('#trouble').textContent !== ''")
    said = re.fullmatch(r"No answer since \d\d:\d\d:\d\d: (.*)\. Still asking\.", tab.text("#trouble"))
    assert said[1] == why
    assert tab.texts("#models strong") == ["m"]  # what was known stays
    server.status, server.overview = 200, known
    tab.call("Network.emulateNetworkConditions", offline=False, **network)
    tab.pass_time(2.1)
    tab.until("document.querySelector('#trouble').textContent === ''")


@needs_chromium
def test_a_hidden_tab_does_not_ask(server, tab):
    tab.open(server.url)
    asked = len(server.keys_seen)
    hide = "Object.defineProperty(document, 'hidden', {value: true, configurable: true})"
    front = "document.dispatchEvent(new Event('visibilitychange'))"
    tab.js(f"{front}; {hide}; {front}")  # hidden while a question is under way
    wait(lambda: len(server.keys_seen) == asked + 1, "that question")
    tab.pass_time(60)
    asked += 1
    assert len(server.keys_seen) == asked
    tab.js("void delete document.hidden")
    tab.ask()
    wait(lambda: len(server.keys_seen) > asked, "a question of the tab that is in front again")


@needs_chromium
def test_a_key_is_asked_for_and_kept(server, tab):
    server.key = "tml-a-secret-of-mine"
    server.overview = an_overview(models=[{"name": "m", "context": 8, "loaded": True}])
    tab.expected = ["401"]
    tab.open(server.url, "#ask:not([hidden])")
    assert tab.js("document.activeElement.id") == "key"
    tab.pass_time(60)
    assert server.keys_seen == ["tml-local"]  # it waits for a key
    tab.call("Input.insertText", text="wrong")
    tab.press("Enter")
    tab.until("document.querySelector('#why').textContent.includes('does not accept that key')")
    # The right key while a question with the wrong one is under way.
    tab.call("Input.insertText", text=server.key)
    tab.js("document.dispatchEvent(new Event('visibilitychange')); document.querySelector('#ask').requestSubmit()")
    tab.until("document.querySelector('#version').textContent === 'version 0.1.0'")
    assert server.keys_seen[:4] == ["tml-local", "wrong", "wrong", server.key]
    assert not tab.js("document.querySelector('#ask').checkVisibility()")
    assert 'api_key="YOUR-KEY"' in tab.text("#with-kshot")
    assert server.key not in tab.js("document.documentElement.outerHTML")
    assert tab.js("localStorage.length") == 0
    tab.call("Page.reload")  # the same tab again: no question
    tab.pass_time(1)
    tab.until("document.querySelector('#version')?.textContent === 'version 0.1.0'")
    assert set(server.keys_seen[3:]) == {server.key}


@needs_chromium
@pytest.mark.parametrize("secure", [True, False])
def test_a_path_is_copied_or_selected(server, tab, secure):
    server.overview = an_overview(checkpoints=[a_checkpoint("final", 5)])
    tab.open(server.url)
    if not secure:  # where a page has no clipboard: plain http from another machine
        tab.js("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    tab.browser.call(
        "Browser.grantPermissions", origin=server.url, permissions=["clipboardReadWrite", "clipboardSanitizedWrite"]
    )
    tab.js("document.querySelector('#checkpoints button').click()")
    tab.until(f"document.querySelector('#checkpoints button').textContent === '{'Copied' if secure else 'Ctrl+C'}'")
    path = server.overview["checkpoints"][0]["path"]
    assert tab.js("getSelection().toString()") == path
    if secure:
        assert tab.js("navigator.clipboard.readText()") == path


@needs_chromium
@pytest.mark.parametrize(("scheme", "paper"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 23, 27)")])
def test_a_phone_shows_it_without_scrolling_sideways(server, tab, scheme, paper):
    long = "x" * 200
    run = a_run(base_model=long, user_metadata={"name": long, long: long})
    models = [{"name": long, "context": 10**9, "loaded": False}]
    server.overview = an_overview(runs=[run], models=models, checkpoints=[a_checkpoint(long, 9)], address=long)
    tab.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
    tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    tab.open(server.url, ".chart text.y")
    assert tab.js("[innerWidth, document.documentElement.scrollWidth, document.body.scrollWidth]") == [360] * 3
    # Nor is anything cut off: all that is seen ends within the page, save what scrolls in its own box.
    outside = "(node) => !node.closest('pre') && node.getBoundingClientRect().right > 360"
    assert tab.js(f"[...document.querySelectorAll('body *')].filter({outside}).map((node) => node.outerHTML)") == []
    assert tab.js("getComputedStyle(document.body).backgroundColor") == paper


@needs_chromium
def test_the_page_of_a_real_server_follows_a_training(tmp_path, mixed, tab):
    with served(tmp_path) as server:
        tab.open(server.address)
        assert nano.NAME in tab.text("body")
        client = vlm.connect(server.address).create_lora_training_client(
            nano.NAME, rank=4, seed=0, user_metadata={"name": "<b>pets</b>"}
        )
        training = client.result()
        losses, adam = list[float](), types.AdamParams(learning_rate=1e-3)
        for steps in (2, 3):
            losses += [step(training, mixed, adam) / len(mixed) for _ in range(steps)]
            tab.ask()
            tab.until(f"document.querySelector('.readout')?.textContent.includes('step {len(losses)} · loss')")
            assert f"{losses[-1]:.3g}" in tab.text(".readout")
        path = training.save_state("here").result().path
        tab.ask()
        tab.until(f"document.body.innerText.includes({path!r})")
        assert "<b>pets</b>" in tab.text("#runs")
