"""The official vlm_classifier recipe, unmodified, in an environment of its own, against the server: `make test-recipe`.

Real photographs of Caltech-101 and a random model: only that everything runs, that the loss falls and that a killed
training goes on mean anything.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vlm.recipes import MARKS, MINUTES, MODEL, RUNNER, prepared, recipe
from tests.vlm.serving import Command, command

pytestmark = MARKS


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory)


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start(work: Path, port: int) -> Any:
    return command(work / "state", "--port", str(port), "--model", f"{MODEL}={work / MODEL}", "--image-log-probs", "0")


def begun(work: Path, server: Command, *arguments: str) -> "subprocess.Popen[bytes]":
    """The training as a group of processes, so that all of them can be killed."""
    given = [sys.executable, RUNNER, "train", "--work", work, "--base-url", server.address, *arguments]
    return subprocess.Popen(given, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def lines(work: Path, name: str) -> list[dict[str, Any]]:
    """The rows of the training's log, in order."""
    found = [*work.glob(f"runs/*/{name}")]
    return [json.loads(line) for file in found for line in file.read_text().splitlines()]


def eventually(found: Any, minutes: float = 5) -> Iterator[Any]:
    """What `found` gives, as soon as it gives anything."""
    end = time.monotonic() + minutes * MINUTES
    while not (value := found()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.2)
    return value


def test_train_kill_resume_and_eval(work: Path, port: int) -> None:
    with start(work, port) as server:
        training = begun(work, server, "num_epochs=4")
        eventually(lambda: [row for row in lines(work, "checkpoints.jsonl") if row.get("batch", 0) >= 2])
        os.killpg(training.pid, signal.SIGKILL)
        training.wait(30)
        server.kill()
    before = lines(work, "metrics.jsonl")
    saved = lines(work, "checkpoints.jsonl")
    with start(work, port) as server:
        arguments = "--base-url", server.address, "num_epochs=4", "behavior_if_log_dir_exists=resume"
        printed = recipe("train", work, *arguments)
        rows = lines(work, "metrics.jsonl")
        end = lines(work, "checkpoints.jsonl")[-1]
        answered = recipe("eval", work, "--base-url", server.address, "--model-path", end["sampler_path"])
    assert saved[-1]["state_path"] in printed, "it did not go on from what was saved"
    losses = {row["step"]: row["train_mean_nll"] for row in rows if "train_mean_nll" in row}
    assert max(losses) > max(row["step"] for row in before)
    assert sorted(losses) == [*range(max(losses) + 1)], "a step is missing"
    assert min([*losses.values()][-3:]) < losses[0] - 0.1
    tests = [row["test/nll"] for row in rows if "test/nll" in row]
    assert tests[-1] < tests[0] - 0.1
    assert "accuracy" in answered
    print(json.dumps({"train_mean_nll": losses, "test/nll": tests}))
