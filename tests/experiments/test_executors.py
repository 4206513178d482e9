"""Worker processes: every job once, one thread each, an end for every one of them; what fails stops nothing else."""

import os
import signal
import time
from contextlib import closing
from itertools import islice
from multiprocessing import active_children
from pathlib import Path

import pytest

from experiments.sweep import workers
from experiments.sweep.workers import Failure, local, results
from kshot.errors import InputError, KshotError


def work(job: tuple[str, int]) -> tuple[int, int, str, str | None]:
    """What a worker does in these tests; picklable because it stands in a module."""
    import torch

    what, number = job
    if what == "input":
        raise InputError(f"{number} is wrong")
    if what == "fail":
        raise KshotError(f"{number} failed")
    if what == "bug":
        raise ZeroDivisionError("of\nwhat")
    if what == "odd":
        return lambda: number  # type: ignore[return-value]
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "sleep":
        time.sleep(number)
    return number, torch.get_num_threads(), os.environ["OMP_NUM_THREADS"], os.environ.get("CUDA_VISIBLE_DEVICES")


def die_once(job: tuple[str, str]) -> str:
    """Dies with the first worker that is given `die`; notes what is begun."""
    name, folder = job
    with (Path(folder) / "log").open("a") as log:
        log.write(f"{name}\n")
    if name == "die" and not (Path(folder) / "died").exists():
        (Path(folder) / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return name


def test_no_job_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "Worker", None)
    assert list(local(work, [])) == []


def test_every_job_once_on_one_thread_and_what_fails_is_said_and_stops_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")  # these tests set it themselves; a user's shell does not
    jobs = [("input", 7), ("fail", 7), ("bug", 7), ("odd", 7), ("die", 7), *(("do", n) for n in range(4))]
    answers = list(local(work, jobs, workers=1))
    assert sorted(job for job, _ in answers) == sorted(jobs)
    assert answers[-1][0] == ("die", 7)  # tried once more, at the end
    found = dict(answers)
    assert [found["do", n][:3] for n in range(4)] == [(n, 1, "1") for n in range(4)]
    assert found["input", 7] == Failure("7 is wrong", 2)
    assert found["fail", 7] == Failure("7 failed", 1)
    bug, odd, died = (found[what, 7] for what in ("bug", "odd", "die"))
    assert isinstance(odd, Failure)
    assert "pickle" in odd.message
    assert not odd.lost
    assert isinstance(bug, Failure)
    assert (bug.message, bug.exit_status) == ("ZeroDivisionError: of what", 1)
    assert "in work" in bug.trace
    assert isinstance(died, Failure)
    assert died.lost
    assert "a worker process died (SIGKILL; killed? out of memory?) with ('die', 7)" in died.message
    assert not active_children()


def test_what_must_come_first_is_finished_before_the_rest_begins(tmp_path: Path) -> None:
    """Also where a worker dies: its job is tried once more."""
    first = [("die", str(tmp_path)), ("x", str(tmp_path))]
    answers = list(local(die_once, [("a", str(tmp_path)), ("b", str(tmp_path))], workers=2, first=first))
    assert sorted(answer for _, answer in answers[:2]) == ["die", "x"]
    assert sorted(answer for _, answer in answers[2:]) == ["a", "b"]
    begun = (tmp_path / "log").read_text().splitlines()
    assert sorted(begun[:3]) == ["die", "die", "x"]
    assert sorted(begun[3:]) == ["a", "b"]


@pytest.mark.parametrize(("what", "kind"), [("input", InputError), ("fail", KshotError)])
def test_results_raises_the_first_failure(what: str, kind: type[KshotError]) -> None:
    failure = workers.call(work, (what, 7))
    assert isinstance(failure, Failure)
    found = results(answer for answer in [(1, "one"), (2, failure), (3, "three")])
    assert next(found) == (1, "one")
    with pytest.raises(kind) as raised:
        next(found)
    assert type(raised.value) is kind


def test_each_gpu_is_one_workers_threads_are_as_asked_for_and_closing_stops_what_runs() -> None:
    start = time.monotonic()
    jobs = [("do", 1), ("do", 2), ("sleep", 1000)]
    with closing(local(work, jobs, threads=2, gpus=["3", "GPU-5"])) as finished:
        answers = [answer for _, answer in islice(finished, 2)]
        assert len(active_children()) == 2
    assert sorted(answers) == [(1, 2, "2", "3"), (2, 2, "2", "GPU-5")]
    assert not active_children()
    assert time.monotonic() - start < 500
