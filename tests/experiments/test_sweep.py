"""A sweep: the same numbers however it is run, nothing run twice, and nothing lost when something is killed."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from stored import files, numbers, rewrite
from trained import TINY

from experiments.sweep.cells import Job
from experiments.sweep.store import Results

CELLS = 17  # of the grid: one zero-shot, four methods x two shots x two seeds
QUICK = ("--method", "pixel-knn", "--shots", "1")


@pytest.fixture
def copied(two_workers: Path, tmp_path: Path) -> Path:
    """A results folder of the whole grid to do things to."""
    return shutil.copytree(two_workers, tmp_path / "out")


def test_one_process_and_another_order_give_the_same(
    grid: list[str], two_workers: Path, tmp_path: Path, kshot, ran: list[Job]
) -> None:
    assert kshot(*reversed_methods(grid), "--out", tmp_path / "out").status == 0
    assert len(ran) == CELLS
    assert numbers(tmp_path / "out") == numbers(two_workers)
    for name in (f"predictions/{job.cell.key}.parquet" for job in ran):
        assert (tmp_path / "out" / name).read_bytes() == (two_workers / name).read_bytes()


def reversed_methods(grid: list[str]) -> list[str]:
    """Another order of cells; shots and seeds in another order too."""
    methods = [method for option, method in pairwise(grid) if option == "--method"]
    swap = dict(zip(methods, reversed(methods), strict=True)) | {"1,2": "2,1", "0,1": "1,0"}
    return [swap.get(argument, argument) for argument in grid]


def test_the_command_in_the_report_runs_the_same_cells_and_so_nothing(
    photos: Path, copied: Path, kshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = next(line for line in (copied / "report.md").read_text().splitlines() if line.startswith("kshot sweep"))
    command = [word.replace("PATH/TO/", "") for word in shlex.split(line)]  # filled in, as the reader would
    monkeypatch.chdir(photos.parent)
    before = files(copied)
    monkeypatch.setattr("experiments.sweep.workers.Worker", None)
    ended = kshot(*command[1:], "--out", copied)
    after = files(copied)
    assert (ended.status, ended.err) == (0, "all 17 cells are there: nothing to compute\n")
    assert {name: content for name, (_, content) in before.items()} == {
        name: content for name, (_, content) in after.items()
    }
    stored = [name for name in before if name.startswith(("cells", "predictions"))]
    assert [before[name] for name in stored] == [after[name] for name in stored]


def test_a_folder_grows_by_what_is_new(photos: Path, tmp_path: Path, kshot, ran: list[Job], make_image) -> None:
    def run(*arguments: str) -> list[str]:
        ran.clear()
        assert kshot("sweep", "demo", *QUICK, "--out", tmp_path / "out", *arguments).status == 0
        return sorted(str(job) for job in ran)

    name = f"folder:{photos.name}"
    pets = tmp_path / "pets"
    for n, path in enumerate(pets / kind / f"{i}.png" for kind in ("cat", "dog") for i in range(5)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make_image(900 + n, 32, 32))
    mine = ("--dataset", f"folder:{photos}")
    assert run(*mine, "--seeds", "0") == [f"pixel-knn on {name}, 1 shots, seed 0"]
    assert run(*mine, "--seeds", "0,2") == [f"pixel-knn on {name}, 1 shots, seed 2"]
    assert run(*mine, "--seeds", "0", "--shots", "4") == [f"pixel-knn on {name}, 4 shots, seed 0"]
    assert run(*mine, "--seeds", "0", "--method", "dinov2-logreg") == [f"dinov2-logreg on {name}, 1 shots, seed 0"]
    assert run("--dataset", f"folder:{pets}", "--seeds", "2") == ["pixel-knn on folder:pets, 1 shots, seed 2"]
    assert run(*mine, "--dataset", f"folder:{pets}", "--seeds", "2,0") == ["pixel-knn on folder:pets, 1 shots, seed 0"]
    content = Results(tmp_path / "out").sweep()
    assert content["datasets"] == [name, "folder:pets"]
    assert (content["shots"], content["seeds"]) == ([1, 4], [0, 2])
    assert content["methods"] == ["pixel-knn", "dinov2-logreg"]
    assert (content["service"], content["device"]) == ("local", "cpu")
    assert "It says nothing about DINOv2" in (tmp_path / "out/report.md").read_text()


def test_another_folder_of_the_same_name_is_refused(photos: Path, copied: Path, tmp_path: Path, kshot, refused) -> None:
    twin = shutil.copytree(photos, tmp_path / "elsewhere" / photos.name)
    sweep = ("sweep", "demo", "--dataset", f"folder:{twin}", *QUICK, "--seeds", "0", *TINY, "--out", copied)
    assert kshot(*sweep).status == 0  # the same images: the same data set, wherever it lies
    next(twin.rglob("*.png")).unlink()
    assert f"images of folder:{photos.name} 'seeded-split-0-" in refused(*sweep)
    both = ("sweep", "demo", "--dataset", f"folder:{twin}", "--dataset", f"folder:{photos}", "--out", tmp_path / "new")
    assert "would both be called" in refused(*both)


def test_no_file_says_where_anything_lay(photos: Path, two_workers: Path) -> None:
    for name, (_, content) in files(two_workers).items():
        for place in (photos.parent, two_workers.parent, Path.cwd(), Path.home()):
            assert str(place).encode() not in content, name
    for record, table in numbers(two_workers).values():
        assert record["dataset"] == f"folder:{photos.name}"
        assert str(photos.parent) not in str(table.to_pydict())


def test_odd_names_are_escaped(two_workers: Path) -> None:
    assert Results(two_workers).sweep()["classes"] == {
        "folder:my <b>photos|é": ["<script>alert(1)", "a|b", "café déjà vu"]
    }
    page, text = ((two_workers / name).read_text() for name in ("report.html", "report.md"))
    assert "my &lt;b&gt;photos|é" in page
    assert "my &lt;b&gt;photos\\|é" in text
    outside = "".join(text.split("```")[::2])
    page = page.replace('<script type="module">', "", 1)  # the page's own
    assert not any("<script" in each or "<b>" in each for each in (page, outside))


def test_the_report_recomputes_the_metrics(two_workers: Path, copied: Path) -> None:
    record = Results(copied).cells()[0]
    rewrite(copied / "cells" / f"{record['key']}.json", metrics={**record["metrics"], "accuracy": 0.123})
    (copied / "report.md").write_text("old")
    code = f"import sys; from experiments.cli import main as cli; sys.argv = ['kshot', 'report', {str(copied)!r}]\n"
    code += "try: cli.main()\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "tinker", "timm", "sklearn"} & set(done.stdout.splitlines()[-1].split())
    assert "metrics of 1 cells" in done.stdout
    assert numbers(copied) == numbers(two_workers)
    assert files(copied)["report.md"][1] == files(two_workers)["report.md"][1]


def test_what_is_limited_is_in_the_record(photos: Path, tmp_path: Path, kshot, ran: list[Job]) -> None:
    limits = ("--limit-test", "4", "--allow-fewer", "--shots", "100")
    out = tmp_path / "out"
    sweep = ("sweep", "demo", "--dataset", f"folder:{photos}", *QUICK, "--seeds", "0", *limits)
    assert kshot(*sweep, "--out", out).status == 0
    (record, table), *_ = numbers(out).values()
    assert (record["shots"], record["settings"]["limit_test"], record["settings"]["allow_fewer"]) == (100, 4, True)
    assert table.num_rows == 4
    assert "| limit_test | 4 |" in (out / "report.md").read_text()


# Killing: the console script in a session of its own, as a terminal would run it.


class Sweep:
    """A running `kshot sweep` and what can be done to it."""

    def __init__(self, grid: list[str], out: Path) -> None:
        self.out = out
        command = [sys.executable, "-c", "from experiments.cli.main import main; main()", *grid, "--workers", "2"]
        self.process = subprocess.Popen(
            [*command, "--out", str(out)],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # What a shell starts in the background ignores Ctrl-C, and so would all that it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def until_a_cell_is_stored(self) -> None:
        while not any(self.out.glob("cells/*.json")):
            assert self.process.poll() is None
            time.sleep(0.01)

    def workers(self) -> list[psutil.Process]:
        """Of the parent's children those that run cells."""
        found = []
        for child in psutil.Process(self.process.pid).children():
            with suppress(psutil.NoSuchProcess):  # it has just ended
                found += [child] if "spawn_main" in " ".join(child.cmdline()) else []
        return found

    def ended(self) -> tuple[int, list[str]]:
        """The exit status and the lines on stderr, less those that say what is being done, or a cell is."""
        _, text = self.process.communicate(timeout=600)
        lines = [line for line in text.splitlines() if not line.startswith("folder:")]  # what is used
        encoding = "encoding images, each once for all cells"
        return self.process.returncode, [line for line in lines if f"/{CELLS} " not in line and line != encoding]


@pytest.fixture
def start(grid: list[str], tmp_path: Path) -> Iterator[Callable[[], Sweep]]:
    begun: list[Sweep] = []

    def begin() -> Sweep:
        begun.append(Sweep(grid, tmp_path / "out"))
        return begun[-1]

    yield begin
    for sweep in begun:
        if sweep.process.poll() is None:
            os.killpg(sweep.process.pid, signal.SIGKILL)
        sweep.process.communicate()


def assert_the_rest_follows(grid: list[str], out: Path, expected: Path, kshot, ran: list[Job]) -> None:
    """The finished cells are complete and stay; the same command runs the others, to the same results."""
    kept = {name: at for name, at in files(out).items() if name.startswith("cells")}
    assert 0 < len(kept) < CELLS
    assert all(Results(out).predictions(record["key"]).num_rows for record in Results(out).cells())
    assert kshot(*grid, "--out", out).status == 0
    assert len(ran) == CELLS - len(kept)
    assert files(out).items() >= kept.items()
    assert numbers(out) == numbers(expected)
    assert not list(out.rglob("*.tmp"))


def test_a_killed_worker_is_replaced_and_no_worker_outlives_a_killed_parent(
    grid: list[str], two_workers: Path, start: Callable[[], Sweep], kshot, ran: list[Job]
) -> None:
    sweep = start()
    sweep.until_a_cell_is_stored()
    first, second = sweep.workers()
    first.kill()
    while len(workers := {*sweep.workers()} - {first}) < 2:
        assert sweep.process.poll() is None
    sweep.process.kill()
    assert second in workers
    assert not psutil.wait_procs(workers, timeout=60)[1]
    assert_the_rest_follows(grid, sweep.out, two_workers, kshot, ran)


def test_ctrl_c_ends_all_in_one_line(
    grid: list[str], two_workers: Path, start: Callable[[], Sweep], kshot, ran: list[Job]
) -> None:
    sweep = start()
    sweep.until_a_cell_is_stored()
    workers = sweep.workers()
    os.killpg(sweep.process.pid, signal.SIGINT)  # it reaches everyone
    stopped = "kshot: stopped; what was finished is kept, the same command goes on from there"
    assert sweep.ended() == (130, [stopped])
    assert not psutil.wait_procs(workers, timeout=60)[1]
    assert_the_rest_follows(grid, sweep.out, two_workers, kshot, ran)
