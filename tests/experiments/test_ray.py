"""Jobs on Ray: actors that keep what they load, a local cluster of two nodes of which one is removed half way, errors,
and what is left at the end; and a sweep there, of which the results are the local ones."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
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


MODEL = list[str]()  # what a process has loaded


def load_once(job: tuple[str, int]) -> tuple[int, int]:
    """The process, and how often it has loaded its model. Without the file that a job names it dies, once."""
    path, number = Path(job[0]), job[1]
    if number < 0 and not path.exists():
        path.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)
    if not MODEL:
        MODEL.append("loaded")
        with Path(f"{path}.{os.getpid()}").open("a") as log:
            log.write("loaded\n")
    return os.getpid(), len(Path(f"{path}.{os.getpid()}").read_text().splitlines())


def gpus_seen(_: int) -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def note(job: tuple[str, float, str]) -> str:
    """Writes down when it begins and ends, on which node, and its process."""
    name, seconds, folder = job
    node = ray.get_runtime_context().get_node_id()
    with (Path(folder) / "log").open("a") as log:
        log.write(f"{name} begins {node} {os.getpid()}\n")
        log.flush()
        time.sleep(seconds)
        log.write(f"{name} ends {node} {os.getpid()}\n")
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
def test_an_actor_keeps_its_model_from_job_to_job_and_the_job_of_one_that_dies_is_done_again(
    cluster: Any, tmp_path: Path
) -> None:
    began = list[int]()
    jobs = [(str(tmp_path / "m"), number) for number in (1, 2, -3, 4)]
    answers = dict(workers.ray(load_once, jobs, workers=1, started=lambda job: began.append(job[1])))
    assert began == [1, 2, -3, 4, -3]
    first, second, again, after = (answers[job] for job in jobs)
    assert first == second == (first[0], 1)  # one process, which loaded once
    assert again == after == (again[0], 1)
    assert str(first[0]) == (tmp_path / "m").read_text()  # that died
    assert again[0] != first[0]


@pytest.mark.slow
def test_an_actor_has_all_its_gpus_and_those_without_room_hold_nothing_up(cluster: Any) -> None:
    node = cluster.add_node(num_cpus=1, num_gpus=2)
    found = [answer for _, answer in workers.ray(gpus_seen, [1, 2, 3], workers=3, gpus=["0,1"])]
    assert found == ["0,1"] * 3
    with closing(workers.ray(gpus_seen, [1, 2, 3], gpus=["0,1"])) as answers:
        next(answers)
        cluster.remove_node(node)
        with pytest.raises(KshotError, match="has 1 CPUs and 2 GPUs for a worker"):  # and it does not wait for ever
            list(answers)


@pytest.mark.slow
def test_nothing_is_left_of_a_run_that_is_stopped(cluster: Any, tmp_path: Path) -> None:
    def groups() -> set[str]:
        return {group["state"] for group in ray.util.placement_group_table().values()}

    def stop_at_c(job: tuple[str, float, str]) -> None:
        if job[0] == "c":
            assert "CREATED" in groups()
            raise KeyboardInterrupt

    jobs = [(name, seconds, str(tmp_path)) for name, seconds in (("a", 0.0), ("b", 600.0), ("c", 600.0))]
    with closing(workers.ray(note, jobs, started=stop_at_c)) as answers:
        assert next(answers)[1] == "a"
        with pytest.raises(KeyboardInterrupt):
            next(answers)
    assert holds(lambda: groups() == {"REMOVED"})
    assert holds(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"])
    pids = {int(line.split()[-1]) for line in (tmp_path / "log").read_text().splitlines()}
    assert pids
    assert holds(lambda: not any(map(lives, pids)))


def lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def holds(true: Callable[[], bool], seconds: float = 60) -> bool:
    """Whether it comes true in time: Ray takes a moment."""
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.1)
    return true()


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
    assert {line[0] for line in lines[:4]} == {"a0", "a1"}
    assert len({line[2] for line in lines}) == 2
    begun = [line[0] for line in lines if line[1] == "begins"]
    assert 8 <= len(begun) <= 10  # what was on the node began again, unless its answer was out


def removed_after(second: Any, cluster: Any, cells: int, out: Path, left: list[int]) -> threading.Thread:
    """Takes a node away, without a warning, as soon as so many cells are stored."""

    def wait_and_remove() -> None:
        while len(stored := [*out.glob("cells/*.json")]) < cells:
            time.sleep(0.05)
        cluster.remove_node(second, allow_graceful=False)
        left.append(len(stored))

    thread = threading.Thread(target=wait_and_remove, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
def test_a_sweep_loses_a_node(grid: list[str], two_workers: Path, cluster: Any, tmp_path: Path, kshot: Any) -> None:
    left, second = list[int](), cluster.add_node(num_cpus=1)
    thread = removed_after(second, cluster, 8, tmp_path / "out", left)
    said = kshot(*grid, "--executor", "ray", "--out", tmp_path / "out")
    assert said.status == 0, said.err
    thread.join(120)
    assert 8 <= left[0] < 17
    assert holds(lambda: second.node_id not in {node["NodeID"] for node in ray.nodes() if node["Alive"]}, 300)
    assert said.err.count("/17 ") == 17 + said.err.count("encoding the images")  # each was handed on once
    assert numbers(tmp_path / "out") == numbers(two_workers)


def test_without_ray_the_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'kshot\[ray\]'"):
        list(workers.ray(work, [("do", 1)]))
