"""Tracking: what the tools are given, a package that is missing, a tool that fails. The tools themselves are tried
where they are installed; nothing leaves this machine."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from unittest.mock import Mock

import pytest

from experiments.sweep.tracking import TRACKERS, Tracker
from kshot.errors import InputError

SWEEP = {
    "name": "two",
    "datasets": ["icons", "digits"],
    "methods": ["vlm-lora", "pixel-knn"],
    "shots": [1, 4],
    "seeds": [0, 1],
    "prompts": ["recipe", "{image}What? => A {label}"],
    "settings": {"rank": 4, "prompt": ["recipe", "{image}What? => A {label}"]},
    "classes": {"icons": ["star", "secret"]},
}


def cell(dataset: str, method: str, shots: int, seed: int, accuracy: float, prompt: str = "recipe") -> dict[str, Any]:
    settings = {"rank": 4, "prompt": prompt} if method == "vlm-lora" else {"max_side": 480}
    cell = {"key": "0", "dataset": dataset, "protocol": "p", "method": method, "shots": shots, "seed": seed}
    measured = {"metrics": {"accuracy": accuracy, "accuracy_strict": None}, "timings": {"fit_seconds": 2.5}}
    return {**cell, "settings": settings, "test_images": 5, "versions": {"kshot": "0.1.0"}, **measured}


CELLS = [
    cell("icons", "vlm-lora", 4, 0, 0.5),
    cell("icons", "vlm-lora", 1, 0, 0.25),
    cell("digits", "vlm-lora", 1, 0, 0.75),
    cell("icons", "vlm-lora", 1, 0, 0.125, prompt="{image}What? => A {label}"),
    cell("icons", "pixel-knn", 1, 1, 1.0),
]
# run → {data set/accuracy: {shots: value}}
EXPECTED = {
    "vlm-lora, prompt 1, seed 0": {"icons/accuracy": {1: 0.25, 4: 0.5}, "digits/accuracy": {1: 0.75}},
    "vlm-lora, prompt 2, seed 0": {"icons/accuracy": {1: 0.125}},
    "pixel-knn, seed 1": {"icons/accuracy": {1: 1.0}},
}


def follow(tracking: Tracker, folder: Path, cells: list[dict[str, Any]] = CELLS) -> None:
    tracking.start(SWEEP, folder)
    for done, record in enumerate(cells, 1):
        tracking.cell(record, done, len(CELLS))
    tracking.finish()


def accuracies(rows: list[tuple[str, int, dict[str, Any]]]) -> dict[str, dict[str, dict[int, float]]]:
    """(run, shots, what was logged) → as EXPECTED."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for run, shots, logged in rows:
        for name, value in logged.items():
            if name.endswith("/accuracy"):
                found.setdefault(run, {}).setdefault(name, {})[shots] = value
    return found


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """The part of wandb that is called, offline."""
    fake = Mock()
    fake.setup.return_value.settings.mode = "offline"
    fake.init.side_effect = lambda **_: Mock()
    fake.Settings = Mock(model_fields=("console", "disable_git"), side_effect=dict)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return fake


def calls(wandb: Mock) -> list[str]:
    return [name for name, *_ in wandb.mock_calls if name in ("setup", "login", "init")]


def test_what_wandb_is_told(wandb: Mock, tmp_path: Path) -> None:
    runs: list[Mock] = []
    wandb.init.side_effect = lambda **_: runs.append(Mock()) or runs[-1]
    follow(Tracker("wandb"), tmp_path)
    assert calls(wandb) == ["setup", "init", "init", "init"]  # offline nobody is asked for a key
    options = [call.kwargs for call in wandb.init.call_args_list]
    logged = [[call.args[0] for call in run.log.call_args_list] for run in runs]
    rows = [(each["name"], row["shots"], row) for each, lines in zip(options, logged, strict=True) for row in lines]
    assert accuracies(rows) == {f"two: {run}": values for run, values in EXPECTED.items()}
    row = {"shots": 4, "icons/accuracy": 0.5, "icons/fit_seconds": 2.5, "cells": 1, "cells of": 5}
    assert logged[0][0] == row
    runs[0].define_metric.assert_called_once_with("*", step_metric="shots")
    runs[0].finish.assert_called_once_with()
    config = options[0].pop("config")
    assert config["settings"] == CELLS[0]["settings"]
    assert config["sweep"] == {key: value for key, value in SWEEP.items() if key != "classes"}
    assert options[0] == {  # no mode: WANDB_MODE decides
        **{"project": "kshot", "group": "two: vlm-lora, prompt 1", "job_type": "vlm-lora", "dir": tmp_path},
        **{"tags": ["two", "vlm-lora", "icons", "digits"], "reinit": "create_new"},
        **{"name": "two: vlm-lora, prompt 1, seed 0", "settings": {"console": "off", "disable_git": True}},
    }


def test_wandb_asks_for_a_key_before_anything_runs_and_takes_the_users_project(
    wandb: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    wandb.setup.return_value.settings.mode = "online"
    tracking = Tracker("wandb")
    tracking.start(SWEEP, tmp_path)
    assert calls(wandb) == ["setup", "login"]
    tracking.cell(CELLS[0], 1, 5)
    assert wandb.init.call_args.kwargs["project"] == "mine"


@pytest.mark.parametrize("fails", ["setup", "init"])
def test_a_failure_is_one_line_and_the_tracker_is_left_alone(
    wandb: Mock, tmp_path: Path, capsys: pytest.CaptureFixture[str], fails: str
) -> None:
    getattr(wandb, fails).side_effect = RuntimeError(f"{fails}:\nno")
    follow(Tracker("wandb"), tmp_path)
    assert calls(wandb) == ["setup", *(["init"] if fails == "init" else [])]
    failed = "kshot: tracking with wandb failed and ends here, the sweep goes on"
    assert capsys.readouterr() == ("", f"{failed} (RuntimeError: {fails}: no)\n")


def test_ctrl_c_is_no_failure(wandb: Mock, tmp_path: Path) -> None:
    wandb.setup.side_effect = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        Tracker("wandb").start(SWEEP, tmp_path)


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_says_how_to_install_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, TRACKERS[name].modules[0], None)
    with pytest.raises(InputError) as raised:
        Tracker(name)
    text = str(raised.value)
    assert text.startswith(f"tracking with {name} needs the package {name}, which cannot be imported (")
    assert text.endswith(f"; pip install 'kshot[tracking]', or: pip install {name}")
    assert "\n" not in text


def test_nothing_is_imported_before_a_tool_is_chosen() -> None:
    packages = {"wandb", "trackio", "tensorboard", "torch"}
    code = f"import sys, experiments.sweep.tracking; print(*{packages} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_real_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    real = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    follow(Tracker("wandb"), tmp_path)
    real.teardown()
    assert capsys.readouterr().err == ""
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    rows = [row for file in files for row in wandb_history(file)]
    assert accuracies(rows) == {f"two: {run}": values for run, values in EXPECTED.items()}
    whole = b"".join(file.read_bytes() for file in files)
    assert b"create_new" not in whole
    assert str(Path(__file__).parents[2]).encode() not in whole  # neither code nor command line
    assert not list((tmp_path / "wandb").rglob("requirements.txt"))


def wandb_history(file: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(run, shots, what was logged) from the file that `wandb sync` would send."""
    from wandb.proto.wandb_internal_pb2 import Record

    name = ""
    for data in records(file.read_bytes()):
        record = Record.FromString(data)
        name = record.run.display_name or name
        logged = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        if "shots" in logged:
            yield name, logged["shots"], logged


def records(log: bytes) -> Iterator[bytes]:
    """Those of a log in LevelDB's format behind a header of 7 bytes: blocks of 32 KiB, in them checksum (4 bytes),
    length (2) and kind (1: whole, 2: first, 3: middle, 4: last) of each piece, and the piece."""
    at, whole = 7, b""
    while at < len(log):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        size, kind = int.from_bytes(log[at + 4 : at + 6], "little"), log[at + 6]
        whole, at = whole + log[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):
            yield whole
            whole = b""


class _Counting(BaseHTTPRequestHandler):
    """Somebody who must not be asked."""

    def do_GET(self) -> None:
        self.server.requests.append(self.path)  # type: ignore[attr-defined]
        self.send_error(500)

    do_POST = do_GET  # noqa: N815 - the library's name

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: `requests` has it."""


TRACKIO = """
import sys
sys.path.insert(0, "tests/experiments")
import huggingface_hub
from pathlib import Path
from test_tracking import CELLS, follow
from experiments.sweep.tracking import Tracker
folder = Path(sys.argv[1])
for some in (CELLS[:2], CELLS[2:]):  # stopped, and continued in its folder
    follow(Tracker("trackio"), folder, some)
follow(Tracker("trackio"), folder / "another", CELLS[:1])
import json, trackio
from trackio.sqlite_storage import SQLiteStorage
print(json.dumps({run: SQLiteStorage.get_logs("two", run) for run in SQLiteStorage.get_runs("two")}))
"""


def test_real_trackio_keeps_all_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed")
    with ThreadingHTTPServer(("127.0.0.1", 0), _Counting) as hub:
        hub.requests = []  # type: ignore[attr-defined]
        thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        url = f"http://127.0.0.1:{hub.server_port}"
        own = {"TRACKIO_DIR": str(tmp_path / "kept"), "HF_TOKEN": "hf_x", "HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0"}
        ours = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRACKIO_"))}
        command = [sys.executable, "-c", TRACKIO, str(tmp_path / "results")]
        done = subprocess.run(command, cwd=Path(__file__).parents[2], env=ours | own, capture_output=True, text=True)
        hub.shutdown()
        thread.join()
    assert (done.returncode, done.stderr) == (0, "")
    assert hub.requests == []  # type: ignore[attr-defined]
    runs = json.loads(done.stdout)  # and nothing else was printed
    rows = [(run.rpartition(" (")[0], row["step"], row) for run, logged in runs.items() for row in logged]
    assert accuracies(rows) == EXPECTED
    assert len(runs) == len(EXPECTED) + 1  # the sweep in another folder has a run of its own


def test_real_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    follow(Tracker("tensorboard"), tmp_path, CELLS[:2])
    follow(Tracker("tensorboard"), tmp_path, CELLS[2:])  # continued
    read = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "tensorboard")).Reload()
    found: dict[str, dict[str, dict[int, float]]] = {}
    for run, tags in read.Runs().items():
        for tag in (tag for tag in tags["scalars"] if tag.endswith("/accuracy")):
            found.setdefault(run, {})[tag] = {each.step: each.value for each in read.Scalars(run, tag)}
    assert found["pixel-knn/seed-1"] == EXPECTED["pixel-knn, seed 1"]
    values, expected = ([json.dumps(each, sort_keys=True) for each in some.values()] for some in (found, EXPECTED))
    assert sorted(values) == sorted(expected)
    (text,) = (each.tensor_proto.string_val[0].decode() for each in read.Tensors(".", "two/text_summary")[:1])
    assert '"rank": 4' in text
