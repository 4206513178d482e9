"""Worker processes: results in any order, one thread each, and an end for every one of them."""

import os
import signal
import time
from contextlib import closing
from multiprocessing import active_children

import pytest

from experiments.executors import local
from kshot_errors import InputError, KshotError


def work(job: tuple[str, int]) -> tuple[int, int, str]:
    """What a worker does in these tests; picklable because it stands in a module."""
    import torch

    what, number = job
    if what == "input":
        raise InputError(f"{number} is wrong")
    if what == "fail":
        raise KshotError(f"{number} failed")
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "sleep":
        time.sleep(number)
    return number, torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]


def test_no_job_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.executors.ProcessPoolExecutor", None)
    assert list(local(work, [])) == []


def test_every_job_once_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")  # these tests set it themselves; a user's shell does not
    jobs = [("do", n) for n in range(5)]
    found = dict(local(work, jobs, workers=2))
    assert found == {job: (job[1], 1, "1") for job in jobs}
    assert not active_children()


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("input", InputError, "^7 is wrong$"),
        ("fail", KshotError, "^7 failed$"),
        ("die", KshotError, r"a worker process died .*\('die', 7\).* the same command goes on"),
    ],
)
def test_the_first_error_ends_the_run_but_loses_no_result(what: str, kind: type[KshotError], message: str) -> None:
    found = []
    start = time.monotonic()
    with pytest.raises(kind, match=message) as raised:  # noqa: PT012
        for job, _ in local(work, [("do", 1), (what, 7), ("sleep", 100)], workers=1):
            found.append(job)
    assert type(raised.value) is kind
    assert found == [("do", 1)]
    assert time.monotonic() - start < 60
    assert not active_children()


def test_closing_stops_what_runs() -> None:
    start = time.monotonic()
    with closing(local(work, [("do", 1), ("sleep", 100)], workers=1)) as finished:
        assert next(finished)[0] == ("do", 1)
        assert len(active_children()) == 1
    assert not active_children()
    assert time.monotonic() - start < 60
