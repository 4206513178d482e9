"""The README's code runs as it stands, and so do its commands, made small by options put behind them."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.vlm.serving import command as serving
from tests.vlm.serving import served

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = {  # what is put behind a command
    "sweep": ["--limit-test", "20", "--set", "views_per_class=1", "--shots", "1", "--seeds", "0"],
    "train": ["--set", "views_per_class=1"],
    "zero-shot": ["--limit-test", "20"],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    codes = blocks("python")
    assert len(codes) == 3
    with served(tmp_path / "served") as server:
        code = "\n".join(codes).replace("http://127.0.0.1:8000", server.address)
        exec(compile(code, "README.md", "exec"), {})  # noqa: S102 - the point of the test
    printed = capsys.readouterr().out
    assert "loss:sum" in printed
    assert "'light green': " in printed


def commands() -> list[list[str]]:
    lines = [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    return [shlex.split(line) for line in lines]


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for text in (README, (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        named = re.findall(r"^\$ make ([a-z ]+?)\s*(?:#|$)", text, re.MULTILINE) + re.findall(r"`make ([a-z ]+)`", text)
        assert named
        for target in " ".join(named).split():
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.usefixtures("ran")
def test_the_commands_run(
    tmp_path: Path, make_image: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch, kshot: Any
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(make_image(0, 40, 30, format="JPEG"))
    monkeypatch.chdir(tmp_path)
    ours = [words[1:] for words in commands() if words[0] == "kshot" and words[1] != "serve"]
    assert ["demo"] in ours
    assert ["data", "list"] in ours
    for words in ours:
        command = ["sweep", "demo"] if words == ["demo"] else words  # the demo is that sweep, and takes no such options
        command = [*command, *SMALL.get(command[0], [])]
        if command[1].startswith("blog"):  # needs a GPU and the hub: it is planned alone
            command = [*command[:2], "--plan"]
        ended = kshot(*command)
        assert ended.status == 0, (words, ended.err)
    assert (tmp_path / "runs/demo/report.html").exists()
    assert (tmp_path / "runs/digits/figures/digits.svg").exists()


def test_the_server_starts(tmp_path: Path) -> None:
    (arguments,) = (words[2:] for words in commands() if words[:2] == ["kshot", "serve"])
    with serving(tmp_path, *arguments) as server:
        assert httpx.get(f"{server.address}/api/v1/healthz").json() == {"status": "ok"}


def test_links_and_pictures_are_there() -> None:
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / target).exists(), target
