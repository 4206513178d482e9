"""Jobs on Ray: a local cluster, two nodes of which one is removed half way, and errors; and a sweep there, of which the
results are the local ones."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from stored import numbers

from experiments.sweep import workers
from experiments.sweep.cells import Job
from experiments.sweep.workers import MISSING, Failure
from kshot.errors import InputError, KshotError

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'kshot[ray]'")
# what Ray leaves to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


def work(job: tuple[str, int]) -> tuple[int, int]:
    import torch

    what, number = job
    if what == "fail":
        raise InputError(f"{number} is wrong")
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return number, torch.get_num_threads()


def note(job: tuple[str, float, str]) -> str:
    """Writes down when it begins and ends, and on which node."""
    name, seconds, folder = job
    node = ray.get_runtime_context().get_node_id()
    with (Path(folder) / "log").open("a") as log:
        log.write(f"{name} begins {node}\n")
        log.flush()
        time.sleep(seconds)
        log.write(f"{name} ends {node}\n")
    return name


@contextmanager
def two_nodes() -> Iterator[Any]:
    """A cluster of two nodes of one CPU each on this machine."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.second = made.add_node(num_cpus=1)
    ray.init(address=made.address, log_to_driver=False, logging_level="error")
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster with a cache of its own, so that nothing is there before. A process is in one cluster at a time: its
    tests come first."""
    monkeypatch.setenv("KSHOT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with two_nodes() as made:
        yield made


def removed_after(cluster: Any, cells: int, out: Path, left: list[int]) -> threading.Thread:
    """Takes the second node away, without a warning, as soon as so many cells are stored."""

    def wait_and_remove() -> None:
        while len(stored := [*out.glob("cells/*.json")]) < cells:
            time.sleep(0.05)
        cluster.remove_node(cluster.second, allow_graceful=False)
        left.append(len(stored))

    thread = threading.Thread(target=wait_and_remove, daemon=True)
    thread.start()
    return thread


def nodes_left() -> int:
    """Ray takes a while to say that one is gone."""
    deadline = time.monotonic() + 300
    while (alive := sum(node["Alive"] for node in ray.nodes())) > 1 and time.monotonic() < deadline:
        time.sleep(0.2)
    return alive


def run_without_half(arguments: list[str], cells: int, cluster: Any, out: Path, kshot: Callable[..., Any]) -> None:
    left: list[int] = []
    thread = removed_after(cluster, cells // 2, out, left)
    said = kshot(*arguments, "--executor", "ray", "--out", out)
    assert said.status == 0, said.err
    thread.join(120)
    assert cells // 2 <= left[0] < cells
    assert nodes_left() == 1
    assert said.err.count(f"/{cells} ") == cells + said.err.count("encoding the images")  # each was handed on once


def test_a_sweep_loses_a_node(grid: list[str], fresh: Any, tmp_path: Path, kshot: Any, ran: list[Job]) -> None:
    run_without_half(grid, 17, fresh, tmp_path / "out", kshot)
    assert not ran
    assert kshot(*grid, "--out", tmp_path / "local").status == 0
    assert numbers(tmp_path / "out") == numbers(tmp_path / "local")


@pytest.mark.slow
def test_the_demo_loses_a_node(fresh: Any, tmp_path: Path, kshot: Any) -> None:
    assert kshot("demo", "--out", tmp_path / "local").status == 0
    os.environ["KSHOT_CACHE"] = str(tmp_path / "cache2")
    run_without_half(["sweep", "demo"], 61, fresh, tmp_path / "out", kshot)
    assert numbers(tmp_path / "out") == numbers(tmp_path / "local")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # so that its processes find this module
    with two_nodes() as made:
        yield made
    del os.environ["PYTHONPATH"]


def test_results_and_failures_come_back(cluster: Any) -> None:
    jobs = [("do", 1), ("fail", 7), ("do", 2)]
    found = dict(workers.ray(work, jobs))
    assert found == {("do", 1): (1, 1), ("do", 2): (2, 1), ("fail", 7): Failure("7 is wrong", 2)}


def test_what_must_come_first_is_finished_before_the_rest_begins(cluster: Any, tmp_path: Path) -> None:
    first, rest = ([(name, 0.3, str(tmp_path)) for name in names] for names in ("ab", "cd"))
    assert {answer for _, answer in workers.ray(note, rest, first=first)} == {*"abcd"}
    lines = [line.split()[:2] for line in (tmp_path / "log").read_text().splitlines()]
    assert {name for name, _ in lines[:4]} == {"a", "b"}


def test_a_job_that_fits_nowhere_is_an_error_and_does_not_wait(cluster: Any) -> None:
    with pytest.raises(KshotError, match="no node of the Ray cluster has 64 CPUs for a worker; give fewer --threads"):
        list(workers.ray(work, [("do", 1)], threads=64))


def test_a_job_that_always_kills_its_worker_is_given_up(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "RETRIES", 1)
    ((_, answer),) = workers.ray(work, [("die", 1)])
    assert isinstance(answer, Failure)
    assert answer.lost
    assert "lost in the Ray cluster, 2 times" in answer.message


def test_the_jobs_of_a_node_that_is_removed_run_elsewhere(cluster: Any, tmp_path: Path) -> None:
    jobs = [(f"job{n}", 1.0, str(tmp_path)) for n in range(8)]
    found, removed = [], False
    for _, answer in workers.ray(note, jobs):
        found.append(answer)
        if len(found) == 3 and not removed:
            removed = True
            cluster.remove_node(cluster.second, allow_graceful=False)
    assert sorted(map(str, found)) == sorted(name for name, _, _ in jobs)  # each once
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert len({node for _, _, node in lines}) == 2
    begun = [name for name, what, _ in lines if what == "begins"]
    assert len(jobs) <= len(begun) <= len(jobs) + 2  # what was on the node began again, unless its answer was out


def test_without_ray_the_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'kshot\[ray\]'"):
        list(workers.ray(work, [("do", 1)]))
    assert "kshot[ray]" in MISSING
