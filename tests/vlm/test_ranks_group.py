"""The processes of an engine, without a model: which of them is named, and what they leave behind."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from kshot.errors import EngineLostError
from vlm import nano
from vlm.local.ranks.group import DONE, FAILED, Ranks, Seat, receive, send, serve

pytestmark = pytest.mark.ranks
LIMIT = 0.5


def slow_second(channel: Connection, seat: Seat) -> None:
    """A rank that answers, but for the second one."""
    if seat.rank == 0:
        send(channel, (DONE, None))
    time.sleep(60)


def test_a_rank_that_hangs_is_named() -> None:
    ranks = Ranks.start(slow_second, ["cpu", "cpu"], 1, limit=LIMIT)
    with pytest.raises(EngineLostError, match=r"rank 1 of 2 \(cpu\) gave no answer"):
        ranks.answers()
    with pytest.raises(EngineLostError, match="rank 1 of 2"):
        ranks.call([("facts", (), False)] * 2)


def test_a_rank_that_takes_no_command_is_named() -> None:
    ranks = Ranks.start(slow_second, ["cpu", "cpu"], 1, limit=LIMIT)
    with pytest.raises(EngineLostError, match=r"rank 1 of 2 \(cpu\) took no command"):
        ranks.call([("none",), (bytes(4 << 20),)])


def second_does_not_come(channel: Connection, seat: Seat) -> None:
    """The first one waits for the second, as long as a rank waits."""
    receive(channel)
    if seat.rank == 0:
        time.sleep(1.5 * LIMIT)
        send(channel, (FAILED, "RuntimeError: [gloo/unbound_buffer.cc:84] Timed out waiting 500ms for recv"))
    time.sleep(60)


def test_not_the_rank_that_waited_is_named() -> None:
    ranks = Ranks.start(second_does_not_come, ["cpu", "cpu"], 1, limit=LIMIT)
    with pytest.raises(EngineLostError, match=r"rank 1 of 2 \(cpu\) did not meet the others"):
        ranks.call([("none",)] * 2)


def raises(channel: Connection, seat: Seat) -> None:
    def perform(text: str) -> None:
        raise RuntimeError(text)

    serve(channel, perform, lambda: None)


@pytest.mark.parametrize("text", ["what went wrong\n\nand a hint: )", ""])
def test_a_rank_says_what_its_error_begins_with(text: str) -> None:
    ranks = Ranks.start(raises, ["cpu"], 1)
    said = ": ".join(["RuntimeError", *text.splitlines()[:1]])
    with pytest.raises(EngineLostError) as caught:
        ranks.call([(text,)])
    assert str(caught.value) == f"rank 0 of 1 (cpu) failed ({said}), and the engine ended with it"


def test_a_start_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(Exception, match="pickle"):
        Ranks.start(slow_second, ["cpu"], 1, lambda: None)
    assert [*tmp_path.iterdir()] == []


SCRIPT = f"""
import os, signal
from vlm.service import connect
service = connect("local", device="cpu:2")
print(service.create_sampling_client(base_model={nano.NAME!r}).result().get_base_model(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def short_folder() -> Iterator[str]:
    """One whose path leaves room for the name of a socket, which has 107 characters at most."""
    with tempfile.TemporaryDirectory(prefix="k") as folder:
        yield folder


@pytest.mark.slow
def test_a_script_without_a_guard_has_ranks_and_leaves_nothing_when_it_is_killed(
    tmp_path: Path, short_folder: str
) -> None:
    script, own = tmp_path / "script.py", Path(short_folder)
    script.write_text(SCRIPT)
    environment = {**os.environ, "TMPDIR": str(own), "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.stdout.split() == [nano.NAME], done.stderr
    until = time.monotonic() + 20
    while (left := [*own.glob("kshot-ranks-*")]) and time.monotonic() < until:
        time.sleep(0.1)
    assert not left
