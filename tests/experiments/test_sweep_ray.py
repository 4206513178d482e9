"""A sweep on a Ray cluster of two nodes, of which one is removed half way: the results are the local ones."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stored import numbers

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'kshot[ray]'")
# what Ray leaves to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes of one CPU each, with a cache of their own, so that nothing is there before."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("KSHOT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.second = made.add_node(num_cpus=1)
    ray.init(address=made.address, log_to_driver=False, logging_level="error")
    yield made
    ray.shutdown()
    made.shutdown()


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
    deadline = time.monotonic() + 60
    while (alive := sum(node["Alive"] for node in ray.nodes())) > 1 and time.monotonic() < deadline:
        time.sleep(0.2)
    return alive


def run_without_half(arguments: list[str], cells: int, cluster: Any, out: Path, kshot: Callable[..., Any]) -> None:
    left: list[int] = []
    thread = removed_after(cluster, cells // 2, out, left)
    said = kshot(*arguments, "--executor", "ray", "--out", out)
    assert said.status == 0, said.err
    thread.join(10)
    assert cells // 2 <= left[0] < cells
    assert nodes_left() == 1
    assert said.err.count(f"/{cells} ") == cells + said.err.count("encoding the images")  # each was handed on once


def test_a_sweep_loses_a_node(grid: list[str], two_workers: Path, cluster: Any, tmp_path: Path, kshot: Any) -> None:
    run_without_half(grid, 17, cluster, tmp_path / "out", kshot)
    assert numbers(tmp_path / "out") == numbers(two_workers)


@pytest.mark.slow
def test_the_demo_loses_a_node(cluster: Any, tmp_path: Path, kshot: Any) -> None:
    assert kshot("demo", "--out", tmp_path / "local").status == 0
    os.environ["KSHOT_CACHE"] = str(tmp_path / "cache2")
    run_without_half(["sweep", "demo"], 61, cluster, tmp_path / "out", kshot)
    assert numbers(tmp_path / "out") == numbers(tmp_path / "local")
