"""Headless Chromium to test pages in, driven through its debugging pipe: one process, a tab for each test.

Fixtures: `browser`, `tab`. A tab must end without an error in its console, what the content security policy blocks
included, save those that its test names.
"""

import fcntl
import json
import os
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = Path("/usr/bin/chromium")
needs_chromium = pytest.mark.skipif(not CHROMIUM.exists(), reason="/usr/bin/chromium is not installed")
PATIENCE = 120  # seconds for anything to come true


def high_pipe() -> list[int]:
    """A pipe on descriptors beyond 9, so that neither is 3 or 4."""
    low = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in low]
    for end in low:
        os.close(end)
    return high


class Browser:
    """Headless Chromium, spoken to in its DevTools protocol: JSON that ends in NUL, on file descriptors 3 and 4."""

    def __init__(self, home: Path) -> None:
        (reads, self.to), (self.source, writes) = high_pipe(), high_pipe()
        flags = ["--headless", "--no-sandbox", "--remote-debugging-pipe", f"--user-data-dir={home / 'profile'}"]
        with_pipes = ["/bin/bash", "-c", f'exec "$@" 3<&{reads} 4>&{writes}', "bash", CHROMIUM, *flags, "about:blank"]
        env = os.environ | {"HOME": str(home)}
        self.process = subprocess.Popen(with_pipes, pass_fds=(reads, writes), stderr=subprocess.DEVNULL, env=env)
        os.close(reads)
        os.close(writes)
        self.buffer, self.sent, self.events = b"", 0, list[dict[str, Any]]()

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": parameters}
        os.write(self.to, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while (answer := self._next()).get("id") != self.sent:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            assert select.select([self.source], [], [], PATIENCE)[0], "Chromium says nothing"
            more = os.read(self.source, 1 << 16)
            assert more, "Chromium has ended"
            self.buffer += more
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def close(self) -> None:
        try:
            self.call("Browser.close")
            self.process.wait(PATIENCE)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self.to)
            os.close(self.source)


class Tab:
    """One page. expected: parts of the console's errors that a test provokes."""

    def __init__(self, browser: Browser) -> None:
        self.browser, self.expected = browser, list[str]()
        self.target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=self.target, flatten=True)["sessionId"]
        for domain in ("Page", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **parameters)

    def open(self, url: str, until: str = "#version:not(:empty)") -> None:
        self.call("Page.navigate", url=url)
        self.until(f"document.querySelector('{until}') !== null")

    def js(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, expression: str) -> None:
        wait(lambda: self.js(expression), f"{expression} in a tab")

    def text(self, selector: str) -> str:
        return self.js(f"document.querySelector({json.dumps(selector)}).innerText")

    def texts(self, selector: str) -> list[str]:
        return self.js(f"[...document.querySelectorAll({json.dumps(selector)})].map((node) => node.textContent)")

    def ask(self) -> None:
        """Let the page ask now: it does when its tab comes to the front."""
        self.js("void document.dispatchEvent(new Event('visibilitychange'))")

    def pass_time(self, seconds: float) -> None:
        """Let the page's clock run that far, which takes it less, and stand still then."""
        before = len(self.browser.events)
        self.call("Emulation.setVirtualTimePolicy", policy="pauseIfNetworkFetchesPending", budget=1000 * seconds)

        def over() -> bool:
            self.js("0")
            return any("virtualTimeBudgetExpired" in each["method"] for each in self.browser.events[before:])

        wait(over, "the page's clock")

    def press(self, key: str) -> None:
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=CODES[key], **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=CODES[key])

    def value_text(self, node: dict[str, Any]) -> str:
        """What a screen reader says instead of a slider's number (WAI-ARIA, aria-valuetext): as the accessibility tree
        has it or, since Chromium 156 leaves it empty there, as the element behind the node has it."""
        (in_tree,) = [each["value"]["value"] for each in node["properties"] if each["name"] == "valuetext"]
        if in_tree:
            return in_tree
        element = self.call("DOM.resolveNode", backendNodeId=node["backendDOMNodeId"])["object"]["objectId"]
        function = "function () { return this.ariaValueText }"
        return self.call("Runtime.callFunctionOn", objectId=element, functionDeclaration=function)["result"]["value"]

    def errors(self) -> list[str]:
        self.js("0")  # events that came before it are in the list
        mine = [event for event in self.browser.events if event.get("sessionId") == self.session]
        kinds = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
        return [json.dumps(event["params"]) for event in mine if event["method"] in kinds]

    def close(self) -> None:
        left = [each for each in self.errors() if not any(part in each for part in self.expected)]
        self.browser.call("Target.closeTarget", targetId=self.target)
        assert left == []


CODES = {"Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}


def wait(holds: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, f"in vain waited for {what}"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    tab = Tab(browser)
    yield tab
    tab.close()
