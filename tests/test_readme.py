"""The README's code runs as it stands, and so do its commands, made small by options put behind them."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = {  # what is put behind a command
    "sweep": ["--limit-test", "20", "--set", "views_per_class=1"],
    "train": ["--set", "views_per_class=1"],
    "zero-shot": ["--limit-test", "20"],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    codes = blocks("python")
    assert len(codes) == 2
    exec(compile("\n".join(codes), "README.md", "exec"), {})  # noqa: S102 - the point of the test
    assert "loss:sum" in capsys.readouterr().out


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


def test_the_commands_run(tmp_path: Path, make_image: Callable[..., bytes]) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(make_image(0, 40, 30, format="JPEG"))
    ours = [words[1:] for words in commands() if words[0] == "kshot"]
    assert ["demo"] in ours
    assert ["data", "list"] in ours
    for words in ours:
        given = ["sweep", "demo"] if words == ["demo"] else words  # the demo is that sweep, and takes no such options
        small = [*given, *SMALL.get(given[0], [])]
        done = subprocess.run(
            [sys.executable, "-c", "from experiments.cli import main; main()", *small],
            cwd=tmp_path,
            env={**__import__("os").environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (small, done.stderr)
    assert (tmp_path / "runs/demo/report.html").exists()
    assert (tmp_path / "runs/digits/figures/digits.svg").exists()


def test_links_and_pictures_are_there() -> None:
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / target).exists(), target
