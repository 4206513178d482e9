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

KILLS, LONGEST = 20, 30.0  # seconds from a start to a kill, at most; starting takes a dozen
COMMAND = [sys.executable, "-c", "from experiments.cli import main; main()", "demo", "--workers", "2", "--out"]


def demo(out: Path, cache: Path) -> subprocess.Popen[bytes]:
    """In a session of its own, so that nothing but its parent's death ends a worker."""
    told = {**os.environ, "KSHOT_CACHE": str(cache)}
    return subprocess.Popen([*COMMAND, str(out)], env=told, start_new_session=True, stdout=subprocess.DEVNULL)


def killed(process: subprocess.Popen[bytes], after: float) -> int:
    """How many workers it had when it was killed; all of them are gone then. -1: it had finished."""
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not alive
        return len(workers)
    return -1


@pytest.mark.slow
def test_a_sweep_killed_again_and_again(tmp_path: Path) -> None:
    rng, out = np.random.default_rng(9), tmp_path / "out"
    assert demo(tmp_path / "whole", tmp_path / "cache1").wait() == 0
    kept: dict[str, tuple[int, bytes]] = {}
    finished = []
    for _ in range(KILLS):
        killed(demo(out, tmp_path / "cache2"), rng.uniform(0.5, LONGEST))
        there = {name: at for name, at in files(out).items() if name.startswith(("cells", "predictions"))}
        assert there.items() >= kept.items()  # what was stored is neither lost nor written again
        complete = {Path(name).stem for name in there if name.startswith("cells") and name.endswith(".json")}
        kept = {name: at for name, at in there.items() if Path(name).stem in complete}
        finished.append(len(complete))
    start = time.monotonic()
    assert demo(out, tmp_path / "cache2").wait() == 0
    print(f"\ncells after each kill: {finished}; the last run took {time.monotonic() - start:.0f} s")
    assert files(out).items() >= kept.items()
    assert numbers(out) == numbers(tmp_path / "whole")
    assert not list(out.rglob("*.tmp"))
