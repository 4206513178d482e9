"""A small set of images in a folder with odd names, the command line in this process, and sweeps run once for all."""

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from stored import CLASSES
from trained import train

from experiments.cli import main
from experiments.sweep import workers
from experiments.sweep.cells import Job
from experiments.sweep.workers import call

METHODS = ("vlm-zero-shot", "vlm-lora", "dinov2-logreg", "dinov2-lora", "pixel-knn")
TINY = ("--set", "views_per_class=4", "--set", "batch_size=4", "--set", "rank=4")


class Said(NamedTuple):
    """How a command ended and what it printed."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory, make_image: Callable[..., bytes]) -> Path:
    """Three classes of ten images, eight of them for training."""
    home = tmp_path_factory.mktemp("somewhere") / "my <b>photos|é"
    for c, name in enumerate(CLASSES):
        (home / name).mkdir(parents=True)
        for n in range(10):
            (home / name / f"{n}.png").write_bytes(make_image(100 * c + n, 32 + 16 * (n % 2), 32))
    return home


@pytest.fixture(scope="session")
def grid(photos: Path) -> list[str]:
    """The arguments of a sweep of 17 cells with every method."""
    methods = [argument for method in METHODS for argument in ("--method", method)]
    return ["sweep", "--dataset", f"folder:{photos}", *methods, "--shots", "1,2", "--seeds", "0,1", *TINY]


@pytest.fixture
def kshot(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """The console script, run in this process."""

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["kshot", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main.main()
        assert isinstance(ended.value.code, int)
        return Said(ended.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Cells run in this process, without workers; the list of those that were."""
    jobs: list[Job] = []

    def local(
        run: Callable[[Any], Any], given: Sequence[Job], _: int | None = None, *, first: Sequence[Any] = (), **__: Any
    ) -> Iterator[Any]:
        for job in (*first, *given):
            jobs.extend([job] if isinstance(job, Job) else [])
            yield job, call(run, job)

    monkeypatch.setattr(workers, "local", local)
    return jobs


@pytest.fixture(scope="session")
def two_workers(grid: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of `grid`, uninterrupted."""
    out = tmp_path_factory.mktemp("two") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["kshot", *grid, "--workers", "2", "--out", str(out)])
        with pytest.raises(SystemExit, match=r"^0$"):
            main.main()
    return out


@pytest.fixture(scope="session")
def adapter(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the photos' classes."""
    return train(photos, tmp_path_factory.mktemp("trained") / "adapter")


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
