"""Bytes put aside on disk: what comes back, what it costs in memory, and when the file goes."""

import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data import preparation
from data.preparation import spool
from kshot.errors import DatasetError

ROOT = Path(__file__).parents[2]
LINUX = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into /proc")


def open_files(folder: Path) -> int:
    """How many files in or under `folder` this process holds open, deleted ones included."""
    descriptors = list(Path("/proc/self/fd").iterdir())
    return sum(str(folder) in os.readlink(path) for path in descriptors if os.path.lexists(path))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder, and a spool that begins in it."""
    monkeypatch.setenv("KSHOT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(preparation, "_current", type(preparation._current)())
    return tmp_path / "cache"


def test_what_is_kept_comes_back_to_many_threads(folder: Path) -> None:
    contents = [bytes([n % 251]) * (n % 4000) for n in range(2000)]
    with ThreadPoolExecutor(8) as pool:
        kept = list(pool.map(spool, contents))
        assert list(pool.map(lambda one: one.read(), kept)) == contents
    assert list(folder.iterdir()) == []  # the file has no name


@LINUX
def test_one_file_for_many_calls_until_the_last_reference_dies(folder: Path) -> None:
    kept = [spool(b"some"), spool(b"thing")]
    assert open_files(folder) == 1
    del kept[0]
    gc.collect()
    assert (open_files(folder), kept[0].read()) == (1, b"thing")
    kept.clear()
    gc.collect()
    assert open_files(folder) == 0


@LINUX
def test_a_full_file_is_followed_by_another(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "SEGMENT", 10)
    kept = [spool(b"123456") for _ in range(6)]
    assert open_files(folder) == 3
    assert [one.read() for one in kept] == [b"123456"] * 6
    del kept[:4]
    gc.collect()
    assert open_files(folder) == 1


def test_a_forked_process_begins_its_own_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = spool(b"mine")
    monkeypatch.setattr(os, "getpid", lambda: -1)
    child = spool(b"its")
    assert child.segment is not mine.segment
    assert (mine.read(), child.read()) == (b"mine", b"its")


def test_a_cache_that_cannot_be_written(folder: Path) -> None:
    folder.write_text("a file where the folder should be")
    with pytest.raises(DatasetError, match=r"cache folder .*cache cannot be written \(.*\); set KSHOT_CACHE"):
        spool(b"x")


def test_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DatasetError, match=r"No space left on device\); set KSHOT_CACHE"):
        spool(b"x")


MANY = """
import io, sys
from pathlib import Path

import numpy as np
from PIL import Image

from data.dataset import Example, Slice, content_key
from data.preparation import prepare_all


def peak(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) / 1024


path, examples = Path(sys.argv[1]), []
rng = np.random.default_rng(0)
with path.open("wb") as file:
    for n in range(8):
        smooth = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((240, 180))
        pixels = np.asarray(smooth) + rng.normal(0, 30, (180, 240, 3))
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=93)
        examples.append(Example(content_key(buffer.getvalue()), Slice(path, file.tell(), len(buffer.getvalue())), n))
        file.write(buffer.getvalue())
before = peak("VmRSS:")
prepared = prepare_all(examples * 250, hflip=False)
print(peak("VmHWM:") - before, sum(e.stored.length for e in examples) / 8, sum(e.stored.length for e in prepared))
"""


@LINUX
def test_two_thousand_images_cost_less_than_20_mb(tmp_path: Path) -> None:
    """Read from and put on disk: either held in memory would exceed the limit."""
    environment = {**os.environ, "KSHOT_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", MANY, str(tmp_path / "images")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    grown, size, written = map(float, done.stdout.split())
    assert size > 30_000
    assert written > 32e6
    assert grown < 20
