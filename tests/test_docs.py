"""README and manual: their code runs, their commands are commands, what they link to is there.

A comment `<!-- not run: REASON -->` above a block says why its code or its commands are not run; commands are checked
against the command line all the same.
"""

import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import typer
import yaml

from experiments.cli.main import app
from experiments.sweep.config import Settings, presets
from experiments.sweep.methods import METHODS
from tests.vlm.serving import command as serving
from tests.vlm.serving import served

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ALL = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "results" / "README.md"]
SMALL = {  # what is put behind a command
    "sweep": ["--limit-test", "20", "--set", "views_per_class=1", "--shots", "1", "--seeds", "0"],
    "train": ["--set", "views_per_class=1"],
    "zero-shot": ["--limit-test", "20"],
}
COMMAND: Any = typer.main.get_command(app)


class Block(NamedTuple):
    """Code of a page. reason: why it is not run; "" where it is."""

    page: str
    language: str
    code: str
    reason: str


def blocks(*languages: str) -> Iterator[Block]:
    for page in ALL:
        pattern = r"(?:<!-- not run[^:]*: ([^>]*) -->\n)?```(\w*)\n(.*?)```"
        for reason, language, code in re.findall(pattern, page.read_text(encoding="utf-8"), re.DOTALL):
            if language in languages:
                yield Block(page.relative_to(ROOT).as_posix(), language, code, reason)


def commands(*, ran: bool = False) -> list[tuple[str, list[str]]]:
    """The page and the words of every command; of those that are run where `ran`."""
    found = [(b.page, line[2:]) for b in blocks("console") if not (ran and b.reason) for line in b.code.splitlines()]
    return [(page, shlex.split(line)) for page, line in found if line.startswith(("kshot ", "make "))]


def test_every_code_block_has_a_language_that_is_checked() -> None:
    known = {"python", "console", "sh", "yaml", ""}
    assert {b.language for b in blocks(*known)} >= {"python", "console"}
    for page in PAGES:
        assert set(re.findall(r"^```(\w+)$", page.read_text(encoding="utf-8"), re.MULTILINE)) <= known, page
        assert all("$ " in b.code for b in blocks("console"))


@pytest.mark.parametrize("words", [words for _, words in commands() if words[0] == "kshot"], ids=shlex.join)
def test_a_command_is_one(words: list[str]) -> None:
    """Commands, options and the values that have names, without running anything."""
    command, given = COMMAND, words[1:]
    while hasattr(command, "commands"):
        command, given = command.commands[given[0]], given[1:]
    context = command.make_context("kshot", given, resilient_parsing=False)
    values = context.params
    for name in values.get("method") or () if isinstance(values.get("method"), list) else ():
        assert name in METHODS, words
    for text in values.get("settings") or ():
        assert text.partition("=")[0] in Settings.model_fields, words
    if preset := values.get("preset"):
        assert preset in presets() or (ROOT / preset).exists() or preset == "my.yaml", words


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in ALL:
        text = page.read_text(encoding="utf-8")
        named = re.findall(r"^\$ make ([a-z ]+?)\s*(?:#|$)", text, re.MULTILINE) + re.findall(
            r"`make ([a-z -]+)`", text
        )
        for target in " ".join(named).split():
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), (page, target)


def test_links_and_pictures_are_there() -> None:
    for page in ALL:
        for target in re.findall(r"\]\(((?!http)[^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page, target)


def test_links_to_headings_are_there() -> None:
    for page in ALL:
        for target, anchor in re.findall(r"\]\(((?!http)[^)#]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
            linked = page.parent / target if target else page
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, (page, anchor)


def test_the_manual_lists_its_pages() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"]({page.name})" in index, page


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """That of a page in one go. What the README says that its code prints, it prints."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.chdir(ROOT)
    codes = [b for b in blocks("python") if not b.reason]
    with served(tmp_path / "served") as server:
        for page in dict.fromkeys(b.page for b in codes):
            code = "\n".join(b.code for b in codes if b.page == page)
            code = code.replace("http://127.0.0.1:8000", server.address)
            exec(compile(code, page, "exec"), {})  # noqa: S102 - the point of the test
            printed = capsys.readouterr().out
            if page == "README.md":
                (expected,) = (b.code for b in blocks("") if b.page == page)
                assert printed == expected
            if page == "docs/api.md":
                assert "loss:sum" in printed
                assert "'light green': " in printed


@pytest.mark.usefixtures("ran")
def test_the_commands_run(
    tmp_path: Path, make_image: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch, kshot: Any
) -> None:
    images = [make_image(number, 40, 30, format="JPEG") for number in range(19)]
    (tmp_path / "new.jpg").write_bytes(images.pop())
    for number, image in enumerate(images):
        folder = tmp_path / "photos" / ("cat", "dog", "hen")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(image)
    monkeypatch.chdir(tmp_path)
    pages = ("docs/methods.md", "docs/photographs.md", "docs/data.md")
    ours = [words[1:] for page, words in commands(ran=True) if words[0] == "kshot" and page in pages]
    expected = {"sweep", "report", "zero-shot", "train", "predict", "export", "push", "data"}
    assert expected <= {words[0] for words in ours}
    for words in ours:
        ended = kshot(*words, *(SMALL.get(words[0], []) if "--method" not in words or words[0] != "train" else []))
        assert ended.status == 0, (words, ended.err)
    assert (tmp_path / "runs/digits/figures/digits.svg").exists()


def test_the_server_starts(tmp_path: Path) -> None:
    """That of the README; the others are simpler, or need GPUs or other models."""
    (arguments,) = (words[2:] for page, words in commands() if page == "README.md" and words[:2] == ["kshot", "serve"])
    with serving(tmp_path, *arguments) as server:
        assert httpx.get(f"{server.address}/api/v1/healthz").json() == {"status": "ok"}


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    notebook = json.loads((ROOT / "experiments/examples/first_steps.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    exec(compile("\n".join(cells), "first_steps.ipynb", "exec"), {})  # noqa: S102 - the point of the test
    first, *steps, last = capsys.readouterr().out.splitlines()
    assert first.startswith("20 images to learn from")
    assert float(steps[-1].split()[1]) < float(steps[0].split()[1])
    assert last.endswith("chance is 10%")


def test_the_container_copies_what_is_there() -> None:
    copied = re.findall(r"^COPY (.+)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    sources = {source for line in copied for source in line.split()[:-1]}
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    assert {package.partition(".")[0] for package in packages} <= sources
    assert all((ROOT / source).exists() for source in sources)


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_every_method_and_setting_is_in_the_manual() -> None:
    text = (ROOT / "docs/methods.md").read_text(encoding="utf-8") + (ROOT / "docs/data.md").read_text(encoding="utf-8")
    assert [name for name in METHODS if f"`{name}`" not in text] == []
    options = {name: f"--{name.replace('_', '-')}" for name in Settings.model_fields}
    assert [name for name, option in options.items() if f"`{name}`" not in text and option not in text] == []
