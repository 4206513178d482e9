"""The README's code runs as it stands, and so do its commands, made small by options put behind them."""

import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from experiments.cli import main
from experiments.sweep import workers
from tests.vlm.serving import command, served

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


def in_this_process(
    run: Callable[[Any], Any], jobs: Sequence[Any], _: int | None = None, *, first: Sequence[Any] = (), **__: Any
) -> Iterator[Any]:
    """In place of worker processes, each of which would import everything anew."""
    return ((job, run(job)) for job in (*first, *jobs))


def test_the_commands_run(
    tmp_path: Path,
    make_image: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(make_image(0, 40, 30, format="JPEG"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(workers, "local", in_this_process)
    ours = [words[1:] for words in commands() if words[0] == "kshot" and words[1] != "serve"]
    assert ["demo"] in ours
    assert ["data", "list"] in ours
    for words in ours:
        given = ["sweep", "demo"] if words == ["demo"] else words  # the demo is that sweep, and takes no such options
        small = SMALL.get(given[0], [])
        if given[1].startswith("blog"):  # needs a GPU and the hub: it is planned alone
            given, small = [*given[:2], "--plan"], []
        monkeypatch.setattr(sys, "argv", ["kshot", *given, *small])
        with pytest.raises(SystemExit) as ended:
            main.main()
        assert ended.value.code == 0, (words, capsys.readouterr().err)
    assert (tmp_path / "runs/demo/report.html").exists()
    assert (tmp_path / "runs/digits/figures/digits.svg").exists()


def test_the_server_starts(tmp_path: Path) -> None:
    (given,) = (words[2:] for words in commands() if words[:2] == ["kshot", "serve"])
    with command(tmp_path, *given) as server:
        assert httpx.get(f"{server.address}/api/v1/healthz").json() == {"status": "ok"}


def test_links_and_pictures_are_there() -> None:
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / target).exists(), target
