"""Ranks that torchrun starts: those that do not come, those that are gone, and all of them once again."""

import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import closing
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist
from tinker import types

import vlm
from kshot.errors import EngineLostError, KshotError
from tests.vlm.serving import KEY
from vlm import nano
from vlm.local.ranks import torchrun
from vlm.local.ranks.group import LOOPBACK, Member, Ranks, Seat, serve
from vlm.local.ranks.rank import torchrun_store

pytestmark = pytest.mark.ranks
PATIENCE = 300.0


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two processes, as torchrun tells the first one; its store is here."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    values = {"LOCAL_RANK": 0, "RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    return store


def silent(channel: Connection, seat: Seat, options: Any) -> None:
    """In the place of a rank."""


def closed_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        return int(listening.getsockname()[1])


def test_ranks_that_do_not_come_are_not_waited_for(two: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchrun, "WAIT", timedelta(seconds=0.5))
    monkeypatch.setattr(torchrun.rank, "run", silent)
    with pytest.raises(KshotError, match="1 of 2 processes of torchrun have come"):
        torchrun.joined(None, "cpu", 1)
    with pytest.raises(EngineLostError, match="the ranks that torchrun has started are gone"):
        torchrun.joined(None, "cpu", 1)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(KshotError, match="1 of 2 processes of torchrun have come"):
        torchrun.joined(None, "cpu", 1)


def test_a_first_process_that_is_gone_is_named(two: Any) -> None:
    torchrun_store().set(torchrun.KEY, f"{closed_port()} {'00' * 16}")
    with pytest.raises(KshotError, match=r"the first process of torchrun does not answer at 127.0.0.1 .*refused"):
        torchrun.follow("cpu", 1)


@pytest.mark.parametrize("told", [True, False])
def test_one_that_follows_knows_whether_it_was_told_to_end(told: bool) -> None:
    ours, theirs = Pipe()
    ranks = Ranks([Member(Seat(1, 2, "cpu", 1), ours)])
    ranks.end("" if told else "rank 0 died")
    assert serve(theirs, print, lambda: None) is told
    theirs.close()


class Torchrun:
    """`kshot serve` over two processes, which is started again once."""

    def __init__(self, state: Path) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "kshot", "serve", "--port", "0"]
        self.process = subprocess.Popen(
            [*command, "--state", str(state)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "TINKER_API_KEY": KEY, "COLUMNS": "200", "GLOO_SOCKET_IFNAME": LOOPBACK},
        )
        self.said = ""

    def address(self) -> str:
        """Where it listens, once it says so."""
        for line in self.process.stdout or ():
            self.said += line
            if found := re.search(r"at (http://\S+)", line):
                return found[1]
        raise AssertionError(self.said)

    def rank_0(self) -> psutil.Process:
        """The first process's own rank, which it has forked."""
        (first,) = [each for each in psutil.Process(self.process.pid).children() if each.environ()["RANK"] == "0"]
        forked = [each for each in first.children(recursive=True) if each.ppid() != first.pid]
        (rank,) = forked
        return rank

    def end(self) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.communicate(timeout=60)
        finally:
            self.process.kill()


@pytest.mark.slow
def test_torchrun_starts_all_again(tmp_path: Path) -> None:
    started = Torchrun(tmp_path)
    try:
        before = started.address()
        started.rank_0().kill()
        again = started.address()
        assert again != before
        client = vlm.connect(again).create_sampling_client(base_model=nano.NAME).result(PATIENCE)
        prompt = types.ModelInput.from_ints([5, 6, 7])
        assert client.sample(prompt, 1, types.SamplingParams(max_tokens=2)).result(PATIENCE).sequences
        assert "rank 0 of 2 (cpu) died (SIGKILL), and the engine ended with it; torchrun ends" in started.said
    finally:
        started.end()
