"""Jobs on Ray: a local cluster, two nodes of which one is removed half way, and errors; and a sweep there, of which the
results are the local ones."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stored import numbers

from experiments.sweep import workers
from experiments.sweep.workers import Failure
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


@pytest.fixture(scope="module")
def cluster(two_workers: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two nodes of one CPU each on this machine, and a cache of its own that has nothing of `two_workers`. Its
    processes find this module."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        patch.setenv("KSHOT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("OMP_NUM_THREADS", raising=False)
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        made.second = made.add_node(num_cpus=1)
        ray.init(address=made.address, log_to_driver=False, logging_level="error")
        yield made
        ray.shutdown()
        made.shutdown()


@pytest.mark.slow
def test_results_and_failures_come_back(cluster: Any) -> None:
    jobs = [("do", 1), ("fail", 7), ("do", 2)]
    found = dict(workers.ray(work, jobs))
    assert found == {("do", 1): (1, 1), ("do", 2): (2, 1), ("fail", 7): Failure("7 is wrong", 2)}


@pytest.mark.slow
def test_a_job_that_fits_nowhere_is_an_error_and_does_not_wait(cluster: Any) -> None:
    with pytest.raises(KshotError, match="no node of the Ray cluster has 64 CPUs for a worker; give fewer --threads"):
        list(workers.ray(work, [("do", 1)], threads=64))


@pytest.mark.slow
def test_a_job_that_always_kills_its_worker_is_given_up(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "RETRIES", 1)
    ((_, answer),) = workers.ray(work, [("die", 1)])
    assert isinstance(answer, Failure)
    assert answer.lost
    assert "lost in the Ray cluster, 2 times" in answer.message


@pytest.mark.slow
def test_what_must_come_first_is_finished_and_the_jobs_of_a_node_that_is_removed_run_elsewhere(
    cluster: Any, tmp_path: Path
) -> None:
    first, jobs = ([(f"{kind}{n}", 1.0, str(tmp_path)) for n in range(count)] for kind, count in (("a", 2), ("b", 6)))
    found = []
    for _, answer in workers.ray(note, jobs, first=first):
        found.append(answer)
        if len(found) == 4:
            cluster.remove_node(cluster.second, allow_graceful=False)
    assert sorted(map(str, found)) == sorted(name for name, _, _ in first + jobs)  # each once
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert {name for name, _, _ in lines[:4]} == {"a0", "a1"}
    assert len({node for _, _, node in lines}) == 2
    begun = [name for name, what, _ in lines if what == "begins"]
    assert 8 <= len(begun) <= 10  # what was on the node began again, unless its answer was out


def removed_after(cluster: Any, cells: int, out: Path, left: list[int]) -> threading.Thread:
    """Takes a second node away, without a warning, as soon as so many cells are stored."""
    second = cluster.add_node(num_cpus=1)

    def wait_and_remove() -> None:
        while len(stored := [*out.glob("cells/*.json")]) < cells:
            time.sleep(0.05)
        cluster.remove_node(second, allow_graceful=False)
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


@pytest.mark.slow
def test_a_sweep_loses_a_node(grid: list[str], two_workers: Path, cluster: Any, tmp_path: Path, kshot: Any) -> None:
    left: list[int] = []
    thread = removed_after(cluster, 8, tmp_path / "out", left)
    said = kshot(*grid, "--executor", "ray", "--out", tmp_path / "out")
    assert said.status == 0, said.err
    thread.join(120)
    assert 8 <= left[0] < 17
    assert nodes_left() == 1
    assert said.err.count("/17 ") == 17 + said.err.count("encoding the images")  # each was handed on once
    assert numbers(tmp_path / "out") == numbers(two_workers)


def test_without_ray_the_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'kshot\[ray\]'"):
        list(workers.ray(work, [("do", 1)]))
