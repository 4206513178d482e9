"""Adapters and results offered to the hub: a dry run asks nothing; what is sent is what belongs to the folder, through
huggingface_hub, to a stand-in on the loopback. The hub's library reads its settings when it is imported: so the
uploads run in a process of their own."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stored import files, rewrite
from trained import TRAINING

from experiments.adapters import hub
from experiments.adapters.folder import FILES
from kshot.errors import InputError
from tests.data.hub_server import TOKEN, Hub, HubRepo, serve

ROOT = Path(__file__).parents[2]
OF_THE_LIBRARY = "Use 'content=<...>' to upload raw bytes"  # httpx says so of how huggingface_hub sends weights
DRIVER = """
import json, sys
from pathlib import Path
from experiments.cli.adapters import push
from kshot.errors import KshotError

def answer(folder, repo, yes, public):
    try:
        return push(Path(folder), repo, yes, public)
    except KshotError as error:
        return {"error": str(error), "status": error.exit_status}

print(json.dumps([answer(*request) for request in json.loads(sys.argv[1])]))
"""


def ask(url: str, *requests: tuple[Path, str, bool, bool], **env: str) -> tuple[list[str], list[Any]]:
    """What was printed to stdout, and what each (folder, repo, yes, public) raised, or null."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    hub_of = {"HF_ENDPOINT": url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    strict = ["-W", "error", "-W", f"ignore:{OF_THE_LIBRARY}:DeprecationWarning"]
    command = [sys.executable, *strict, "-c", DRIVER, json.dumps(requests, default=str)]
    done = subprocess.run(command, cwd=ROOT, env=ours | hub_of | env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    return lines, json.loads(last)


CELL = "{}\n"


@pytest.fixture
def there() -> Iterator[Hub]:
    with serve({"o/private": HubRepo(private=True), "o/public": HubRepo()}) as hub:
        yield hub


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """The committed results of the demo, two cells in files of their own, and what a run also leaves there."""
    folder = Path(shutil.copytree(ROOT / "results/demo", tmp_path / "demo"))
    (folder / "cells").mkdir()
    for name in "ab":
        (folder / f"cells/{name}.json").write_text(CELL)
    for name in ("predictions/a.parquet", "figures/photo.jpg", "figures/other.png", "wandb/log", ".lock", "mine.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("stays")
    return folder


def plain(folder: Path, names: set[str] | list[str]) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


def test_a_dry_run_says_all_and_asks_nothing(there: Hub, adapter: Path, results: Path) -> None:
    lines, raised = ask(there.url, (adapter, "o/new", False, False), (results, "o/r", False, True), HF_TOKEN="")
    assert raised == [None, None]
    assert there.requests == []
    assert lines[0] == "o/new: a model repository of the hub, made private unless it is there"
    sizes = {name: (adapter / name).stat().st_size for name in sorted(FILES["adapter"])}
    assert [line.split() for line in lines[1:6]] == [[f"{size:,}", name] for name, size in sizes.items()]
    assert lines[6].split() == [f"{sum(sizes.values()):,}", "bytes", "in", "5", "files"]
    assert lines[7] == "the base model's folder on this machine is named in adapter_config.json"
    assert lines[8] == f"nothing was sent; this sends it: kshot push {adapter} o/new --yes"
    assert lines[9] == "o/r: a dataset repository of the hub, made public unless it is there"
    assert f"{(results / 'cells.jsonl').stat().st_size:>13,}  cells.jsonl" in lines
    assert f"{2 * len(CELL):>13,}  cells/, 2 records" in lines
    assert lines[-2] == "stays here: mine.txt, predictions, wandb"
    assert lines[-1] == f"nothing was sent; this sends it: kshot push {results} o/r --public --yes"


def test_what_belongs_to_an_adapter_and_to_results_is_sent_each_in_one_commit(
    there: Hub, adapter: Path, results: Path
) -> None:
    before = files(adapter)
    lines, raised = ask(there.url, (results, "o/r", True, True), (adapter, "o/new", True, False))
    assert raised == [None, None]
    repo = there.repos["o/new"]
    assert (repo.kind, repo.private, repo.files) == ("model", True, plain(adapter, FILES["adapter"]))
    assert repo.commits == [("A trained model of kshot", sorted(FILES["adapter"]))]
    assert ("GET", "/api/models/o/new", "") in there.requests  # whether it is private
    assert ("POST", "/api/validate-yaml", "") in there.requests  # of the model card
    assert lines[-1] == f"sent: {there.url}/o/new/commit/{'a' * 40}"
    assert len(there.objects) == 1  # the weights, by LFS
    assert files(adapter) == before
    repo = there.repos["o/r"]
    assert (repo.kind, repo.private, len(repo.commits)) == ("dataset", False, 1)
    names = ["report.html", "report.md", "results.csv", "sweep.json", "figures/icons.png", "figures/icons.svg"]
    assert repo.files == plain(results, [*names, "cells.jsonl", "cells/a.json", "cells/b.json"])


def test_a_repository_that_is_there_keeps_its_doors(there: Hub, adapter: Path) -> None:
    wanted = [("o/public", False), ("o/public", True), ("o/private", False)]
    _, raised = ask(there.url, *((adapter, repo, True, public) for repo, public in wanted))
    refused = "o/public is there and public; give --public, or the name of another repository"
    assert raised == [{"error": refused, "status": 2}, None, None]
    assert [repo.files.keys() == FILES["adapter"] for repo in there.repos.values()] == [True, True]
    assert [len(repo.commits) for repo in there.repos.values()] == [1, 1]


def test_what_keeps_the_hub_away_is_one_line(there: Hub, adapter: Path, tmp_path: Path) -> None:
    new = (adapter, "o/new", True, False)
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{taken.getsockname()[1]}"
        unreachable = ask(closed, new)
    answers = [
        ask(there.url, new, HF_TOKEN="", HF_HOME=str(tmp_path)),
        ask(there.url, new, HF_TOKEN=f"{TOKEN}_2"),
        ask(there.url, (adapter, "forbidden/x", True, False)),
        ask(there.url, new, HF_HUB_OFFLINE="1"),
        unreachable,
    ]
    expected = [
        (2, ["nothing can be sent to o/new without a token", "set HF_TOKEN or run `hf auth login`"]),
        (1, ["does not let this user write to o/new (401)", "HF_TOKEN"]),
        (1, ["does not let this user write to forbidden/x (403)", "a token that may write"]),
        (1, ["nothing was sent to o/new: HF_HUB_OFFLINE is set"]),
        (1, ["the hub cannot be reached and o/new is unchanged", "ConnectError", "HF_ENDPOINT"]),
    ]
    for (lines, (answer,)), (status, parts) in zip(answers, expected, strict=True):
        assert (lines, answer["status"], "\n" in answer["error"]) == ([], status, False), answer
        assert all(part in answer["error"] for part in parts), answer
    assert not any(repo.files for repo in there.repos.values())


def send(folder: Path) -> hub.Upload:
    return hub.push(folder, "o/x", private=True)


def test_what_is_no_whole_adapter_and_no_results_is_refused(adapter: Path, results: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "photos").mkdir(parents=True)
    for folder in (other, tmp_path / "none"):
        with pytest.raises(InputError, match=r"neither a trained model of kshot nor a results folder"):
            send(folder)
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    (copy / "notes.txt").write_text("mine")
    assert send(copy).skipped == ("notes.txt",)
    (copy / "README.md").unlink()
    with pytest.raises(InputError, match=r"has no README\.md: it is not whole; train it again"):
        send(copy)
    (copy / "README.md").symlink_to(other)
    with pytest.raises(InputError, match=r"README\.md is no plain file"):
        send(copy)
    (copy / "classifier.json").write_text("{")
    with pytest.raises(InputError, match=r"classifier\.json is damaged"):
        send(copy)
    (results / "report.md").unlink()
    with pytest.raises(InputError, match=r"has no report\.md; kshot report .* writes it"):
        send(results)


def test_a_report_with_photographs_is_refused(results: Path) -> None:
    page = results / "report.html"
    page.write_text(page.read_text().replace("</main>", '<img src="data:image/jpeg;base64,AAAA"></main>'))
    assert "image/jpeg" in page.read_text()
    with pytest.raises(InputError, match=r"shows images of a data set, which are not sent; .* writes it without"):
        send(results)


def test_files_that_name_a_folder_of_this_machine_are_said(adapter: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    for name in ("classifier.json", "kshot.json"):
        rewrite(copy / name, base_model="/home/me/model")
    assert send(copy).leaks == ("classifier.json", "kshot.json")
    assert send(adapter).leaks == ("adapter_config.json",)  # where PEFT finds the nano model, which is on no hub


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--push-to-hub", "icons"], "'icons' does not say whose the repository is; write it as OWNER/icons"),
        (["--push-to-hub", "a b/c"], "'a b/c' cannot be the name of a repository"),
        (["--push-to-hub", "o/x", "--yes"], "nothing can be sent to o/x without a token"),
        (["--yes"], "--yes is for --push-to-hub REPO; leave it out"),
        (["--public"], "--public is for --push-to-hub REPO; leave it out"),
    ],
)
def test_train_says_so_before_it_trains(
    photos: Path, tmp_path: Path, refused: Any, monkeypatch: pytest.MonkeyPatch, options: list[str], text: str
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    line = refused("train", "--dataset", f"folder:{photos}", "--out", tmp_path / "a", *TRAINING, *options)
    assert line.startswith(f"kshot: {text}")
    assert list(tmp_path.iterdir()) == []
