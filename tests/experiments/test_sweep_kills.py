"""The demo, killed (kill -9) at 20 random moments: the results are those of an uninterrupted run, bit for bit.

Ten minutes: marked slow. `pytest -m slow -s tests/experiments/test_sweep_kills.py` prints what happened.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from stored import files, numbers

KILLS = 20
STARTING, WORKING = 20.0, 4.0  # seconds, at most: until a kill that comes before a cell, and after some cells
MOST = 3  # a run is killed after fewer new cells than this, and those of the seconds above
COMMAND = [sys.executable, "-c", "from experiments.cli.main import main; main()", "demo", "--workers", "2", "--out"]


def demo(out: Path, cache: Path) -> subprocess.Popen[bytes]:
    """In a session of its own, so that nothing but its parent's death ends a worker."""
    env = {**os.environ, "KSHOT_CACHE": str(cache)}
    return subprocess.Popen([*COMMAND, str(out)], env=env, start_new_session=True, stdout=subprocess.DEVNULL)


def wait_for(process: subprocess.Popen[bytes], out: Path, rng: np.random.Generator) -> None:
    """Until a random moment: while it starts and encodes, or after some new cells."""
    start, before, more = time.monotonic(), stored(out), int(rng.integers(0, MOST))
    while more and stored(out) < before + more and process.poll() is None:
        time.sleep(0.01)
    end = (time.monotonic() if more else start) + rng.uniform(0.5, WORKING if more else STARTING)
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.01)


def stored(out: Path) -> int:
    return len([*out.glob("cells/*.json")])


def kill(process: subprocess.Popen[bytes]) -> None:
    """All of its workers end with it. It may have finished."""
    if process.poll() is None:
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not alive


@pytest.mark.slow
def test_a_sweep_killed_again_and_again(tmp_path: Path) -> None:
    rng, out = np.random.default_rng(9), tmp_path / "out"
    assert demo(tmp_path / "whole", tmp_path / "cache1").wait() == 0
    kept: dict[str, tuple[int, bytes]] = {}
    finished = []
    for _ in range(KILLS):
        process = demo(out, tmp_path / "cache2")
        wait_for(process, out, rng)
        kill(process)
        there = {name: at for name, at in files(out).items() if name.startswith(("cells", "predictions"))}
        assert there.items() >= kept.items()  # what was stored is neither lost nor written again
        complete = {Path(name).stem for name in there if name.startswith("cells") and name.endswith(".json")}
        kept = {name: at for name, at in there.items() if Path(name).stem in complete}
        finished.append(len(complete))
    start = time.monotonic()
    assert demo(out, tmp_path / "cache2").wait() == 0
    print(f"\ncells after each kill: {finished}; the last run took {time.monotonic() - start:.0f} s")
    assert files(out).items() >= kept.items()
    assert 0 < finished[KILLS // 2] < finished[-1] < 61  # they came while cells were being stored
    assert numbers(out) == numbers(tmp_path / "whole")
    assert not list(out.rglob("*.tmp"))
