"""Models by hub id, against a stand-in on the loopback. The hub's library reads its settings when it is imported: so
the loads run in processes of their own, several in each."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kshot.hub import TRIES
from tests.data.hub_server import CUT, RESET, HubRepo, serve
from tests.vlm.checkpoints import sharded
from vlm import models

ROOT = Path(__file__).parents[2]
BIG = "model-00002-of-00004.safetensors"
DRIVER = """
import json, sys, time
from huggingface_hub import constants
time.sleep = lambda seconds: None  # it waits before it tries again
constants.DOWNLOAD_CHUNK_SIZE = 1 << 16  # bytes; as it is, a small file is one piece and nothing is kept of a part
from kshot.errors import KshotError
from vlm import models

def answer(what, name):
    try:
        return {"folder": getattr(models, what)(name)} if what != "load" else loaded(name)
    except KshotError as error:
        return {"error": type(error).__name__, "text": str(error)}

def loaded(name):
    from transformers import AutoTokenizer
    from vlm.inputs import ImageRule
    from vlm.local.model.load import load
    tokenizer = AutoTokenizer.from_pretrained(models.source(name))
    model, tiles = load(name), ImageRule.from_pretrained(name).tokens(64, 64)
    text, total = tokenizer.decode(tokenizer.encode("star")), float(model.lm_head.weight.double().sum())
    return {"sum": total, "text": text, "tiles": tiles}

print(json.dumps([answer(*request) for request in json.loads(sys.argv[1])]))
"""

Answers = list[dict[str, Any]]


@dataclass
class Story:
    """What each process answered, and what it asked of the hub: the files, and everything."""

    small: Answers
    small_files: list[str]
    first: Answers
    first_files: list[str]
    requests: list[str]
    ranges: list[str]
    offline: Answers
    second: Answers
    second_files: list[str]
    unreachable: Answers


def ask(url: str, home: Path, *requests: tuple[str, str], offline: str = "0", bars: bool = False) -> Answers:
    """bars: where weights are fetched, the hub's library shows its progress."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    env = {**ours, "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": offline, "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-W", "error", "-c", DRIVER, json.dumps(requests)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert bars == ("Fetching" in done.stderr)
    assert bars or done.stderr == ""  # no warning either
    return json.loads(done.stdout)


def repos(folder: Path) -> dict[str, HubRepo]:
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    config = {"config.json": whole["config.json"]}
    others = {
        "README.md": b"# A model",
        "modeling.py": b"raise SystemExit('a script was run')",
        "pytorch_model.bin": b"a pickle",
        "onnx/config.json": b"{}",
        "onnx/model.safetensors": b"another one",
    }
    return {
        "o/nano": HubRepo(whole | others, drops={BIG: [CUT]}),
        "o/dropped": HubRepo(whole, drops={BIG: [RESET] * TRIES}),
        "o/gated": HubRepo(whole, gated=True),
        "o/bare": HubRepo({"README.md": b"# Nothing"}),
        "o/pickle": HubRepo(config | {"pytorch_model.bin": b"a pickle"}),
        "o/bert": HubRepo({**whole, "config.json": b'{"model_type": "bert"}'}),
    }


REFUSED = {
    "o/none": ["no model o/none", "private", "hf auth login"],
    "o/gated": ["gated", "https://huggingface.co/o/gated", "HF_TOKEN", "hf auth login"],
    "o/nano@v9": ["no revision 'v9'", "https://huggingface.co/o/nano/commits"],
    "o/-x-": ["'o/-x-' cannot be the name"],
    "o/bare": ["no config.json"],
    "o/pickle": ["no weights as safetensors"],
    "o/bert": ["'bert'"],
    "o/dropped": ["cannot be reached", "HF_ENDPOINT"],
}
LOAD, WEIGHTS = ("load", "o/nano"), ("weights", "o/nano")
NONE, DROPPED = ("source", "o/none"), ("weights", "o/dropped")


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    home = tmp_path_factory.mktemp("hub")
    with serve(repos(sharded(tmp_path_factory.mktemp("sharded")))) as hub:
        small, small_files = ask(hub.url, home, ("source", "o/nano")), hub.downloads()
        hub.requests.clear()
        refused = [("weights" if name == "o/dropped" else "load", name) for name in REFUSED]
        first = ask(hub.url, home, LOAD, ("load", f"o/nano@{hub.repos['o/nano'].commit}"), *refused, bars=True)
        first_files, requests = hub.downloads(), [path for _, path, _ in hub.requests]
        ranges = [asked for _, path, asked in hub.requests if asked and "o/nano" in path]
        offline = ask(hub.url, home, LOAD, NONE, DROPPED, offline="1")
        hub.requests.clear()
        second, second_files = ask(hub.url, home, WEIGHTS, DROPPED, bars=True), hub.downloads()
    unreachable = ask(hub.url, home, WEIGHTS, NONE)
    return Story(small, small_files, first, first_files, requests, ranges, offline, second, second_files, unreachable)


def test_the_small_files_come_without_the_weights(story: Story) -> None:
    assert Path(story.small[0]["folder"]).is_dir()
    assert {"config.json", "tokenizer.json", "preprocessor_config.json"} <= set(story.small_files)
    assert not [name for name in story.small_files if name.endswith((".safetensors", ".bin", ".py", ".md"))]


def test_loading_fetches_the_weights_once_and_no_code(story: Story, stock: Any) -> None:
    found = story.first[0]
    assert found["sum"] == pytest.approx(float(stock.lm_head.weight.detach().double().sum()))
    assert (found["tiles"], found["text"]) == (16, "star")
    of_nano = [path for path in story.requests if "o/nano/resolve" in path and "/v9/" not in path]
    assert {path.rsplit("/", 1)[1] for path in of_nano} == {f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)}
    assert story.first_files.count("model-00001-of-00004.safetensors") == 2  # of o/nano and of o/dropped
    assert not [name for name in story.first_files if name.endswith((".bin", ".py", ".md")) or "/" in name]


def test_a_process_asks_once_what_the_present_commit_is(story: Story) -> None:
    assert len([path for path in story.requests if re.fullmatch(r".*/o/nano(/revision/main)?", path)]) == 1


def test_a_revision_may_be_named(story: Story) -> None:
    assert story.first[1] == story.first[0]


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_is_one_line_that_names_the_model_and_the_way_out(story: Story, name: str) -> None:
    answer = story.first[2 + list(REFUSED).index(name)]
    assert answer["error"] == "ModelError", answer
    assert "\n" not in answer["text"]
    assert all(word in answer["text"] for word in [name.partition("@")[0], *REFUSED[name]]), answer


def test_offline_the_cache_answers(story: Story) -> None:
    assert story.offline[0] == story.first[0]
    assert story.unreachable[0] == story.second[0] == story.small[0]


@pytest.mark.parametrize(
    ("answers", "n", "why"),
    [("offline", 1, "HF_HUB_OFFLINE"), ("offline", 2, "HF_HUB_OFFLINE"), ("unreachable", 1, "ConnectError")],
)
def test_what_the_cache_lacks_says_how_to_go_on(story: Story, answers: str, n: int, why: str) -> None:
    answer = getattr(story, answers)[n]
    assert answer["error"] == "ModelError"
    assert all(word in answer["text"] for word in (why, "its cache lacks files", "HF_ENDPOINT", "a folder")), answer


def test_a_connection_that_drops_goes_on_where_it_broke_off(story: Story) -> None:
    (asked,) = story.ranges
    assert int(asked.removeprefix("bytes=").rstrip("-")) > 0


def test_an_interrupted_download_goes_on_with_what_is_missing(story: Story) -> None:
    assert "error" in story.first[2 + list(REFUSED).index("o/dropped")]
    assert (Path(story.second[1]["folder"]) / BIG).is_file()
    assert story.second_files == [BIG]


def test_a_cache_that_cannot_be_written_is_said() -> None:
    one_line = r"model o/x cannot be stored: OSError: .*No space left.*; HF_HOME"
    assert re.match(one_line, str(models.hub_error("o/x", OSError(28, "No space left on device"))))
