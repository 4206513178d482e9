"""Cells whose VLM is over several processes, in a worker of a sweep."""

from typing import Any

import psutil
import pytest

from experiments.sweep.cells import Job
from experiments.sweep.config import RunOptions, load
from experiments.sweep.grid import plan
from experiments.sweep.run import work
from experiments.sweep.workers import local, results

pytestmark = [pytest.mark.ranks, pytest.mark.slow]


def cell(job: Job) -> tuple[Any, list[int]]:
    """Its predictions by image, and the processes that its worker has then."""
    done = work(job)
    assert done is not None
    table = done[1].to_pydict()
    others = [each.pid for each in psutil.Process().children(recursive=True)]
    return dict(zip(table["key"], table["prediction"], strict=True)), others


def test_a_cell_over_two_processes_is_that_of_one_but_for_one_image_at_most() -> None:
    grid = {"datasets": ("icons",), "methods": ("vlm-lora", "dinov2-logreg"), "shots": (2,), "seeds": (0,)}
    sweep = load("demo", grid, {"views_per_class": 4, "limit_test": 40, "answer_tokens": 4})
    jobs = [job for device in ("cpu", "cpu:2") for job in plan(sweep, device=device).jobs]
    answers = {(job.cell.method, job.device): answer for job, answer in results(local(cell, jobs, 1, ranks=2))}
    assert RunOptions(device="cpu:2").ranks == 2
    assert len({job.cell.key for job in jobs}) == 2  # a cell is the same one on any number of processes
    (one, none), (two, some) = (answers["vlm-lora", device] for device in ("cpu", "cpu:2"))
    assert len(one) == 40
    assert len({*one.values()}) > 5
    assert sum(one[key] != two[key] for key in one) <= 1
    assert none == []
    assert len(some) >= 3  # the two, and what they are forked from
    assert answers["dinov2-logreg", "cpu"][0] == answers["dinov2-logreg", "cpu:2"][0]
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in some if psutil.pid_exists(pid)], timeout=60)
    assert not alive
