"""A small set of images in a folder with odd names, the command line in this process, and sweeps run once for all."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from stored import CLASSES
from trained import TINY, status_of, train

from tests.vlm.browser import browser, tab  # noqa: F401 - fixtures
from vlm.local.registry import LocalServiceClient

PHOTOS = "my <b>photos|é"
METHODS = ("vlm-zero-shot", "vlm-lora", "dinov2-logreg", "dinov2-lora", "pixel-knn")


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that is made once for all processes of these tests, which only read it."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not (folder / "made").exists():
            make(folder)
            (folder / "made").touch()
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory, make_image: Callable[..., bytes]) -> Path:
    """Three classes of ten images, eight of them for training."""

    def draw(home: Path) -> None:
        for c, name in enumerate(CLASSES):
            (home / PHOTOS / name).mkdir(parents=True)
            for n in range(10):
                (home / PHOTOS / name / f"{n}.png").write_bytes(make_image(100 * c + n, 32 + 16 * (n % 2), 32))

    return once(tmp_path_factory, "somewhere", draw) / PHOTOS


@pytest.fixture(scope="session")
def grid(photos: Path) -> list[str]:
    """The arguments of a sweep of 17 cells with every method."""
    methods = [argument for method in METHODS for argument in ("--method", method)]
    return ["sweep", "demo", "--dataset", f"folder:{photos}", *methods, "--shots", "1,2", "--seeds", "0,1", *TINY]


@pytest.fixture
def refused(kshot: Callable[..., Any]) -> Callable[..., str]:
    """The one line that a command prints which is refused for bad input."""

    def run(*words: object, parts: Sequence[str] = ()) -> str:
        ended = kshot(*words)
        lines = [line for line in ended.err.splitlines() if not line.startswith(("training ", "models: "))]
        assert (ended.status, ended.out, len(lines), ended.err[-1]) == (2, "", 1, "\n"), ended
        assert lines[0].startswith("kshot: ")
        assert all(part in lines[0] for part in parts), lines[0]
        return lines[0]

    return run


@pytest.fixture(scope="session")
def two_workers(grid: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of `grid`, uninterrupted."""

    def run(folder: Path) -> None:
        assert status_of(*grid, "--workers", "2", "--out", folder / "out") == 0

    return once(tmp_path_factory, "two", run) / "out"


@pytest.fixture(scope="session")
def adapter(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the photos' classes, in a folder that was not there."""
    return once(tmp_path_factory, "trained", lambda folder: train(photos, folder / "new/adapter")) / "new/adapter"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, make_image: Callable[..., bytes]) -> Path:
    """Images of several sizes and formats, and two that are none."""
    home = tmp_path_factory.mktemp("asked")
    (home / "sub").mkdir()
    for n, name in enumerate(("a.png", "b.jpg", "sub/c.webp", "sub/d.png")):
        format = {".jpg": "JPEG", ".webp": "WEBP"}.get(Path(name).suffix, "PNG")
        (home / name).write_bytes(make_image(50 + n, 48 + 16 * n, 40, format))
    (home / "photo.txt").write_text("no image")
    (home / "sub/cut.png").write_bytes((home / "a.png").read_bytes()[:200])
    return home


@pytest.fixture
def images(folder: Path, tmp_path: Path) -> Path:
    """The images alone."""
    return Path(shutil.copytree(folder, tmp_path / "images", ignore=shutil.ignore_patterns("*.txt", "cut.png")))


@pytest.fixture
def service(tmp_path: Path) -> Iterator[LocalServiceClient]:
    """A service without a checkpoint or a loaded model."""
    client = LocalServiceClient(tmp_path / "state")
    yield client
    client.close()


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that would serve fails the test at once instead of waiting for requests."""

    from vlm.server import serve

    def run(*_: object) -> None:
        raise AssertionError("the server would run")

    monkeypatch.setattr(serve._Server, "run", run)
