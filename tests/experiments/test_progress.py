"""The time that is left, by hand; what is shown while a sweep runs, on a terminal and without one."""

import io
import re
from types import SimpleNamespace
from typing import Any

import pytest

from experiments.cli import progress
from experiments.cli.progress import Display, Pace
from experiments.sweep.workers import Failure
from experiments.terminal import Terminal


class Job(SimpleNamespace):
    def __str__(self) -> str:
        return f"{self.cell.method} on {self.cell.dataset}, {self.cell.shots} shots, seed {self.cell.seed}"


def job(method: str, shots: int = 1) -> Any:
    return Job(cell=SimpleNamespace(dataset="icons", method=method, shots=shots, seed=0))


def test_the_time_left_is_weighted() -> None:
    """Cells of vlm-lora cost ten times as much as those of pixel-knn, until both are measured."""
    now = [0.0]
    jobs = [job("vlm-lora", 1), job("vlm-lora", 2), job("pixel-knn", 1), job("pixel-knn", 2)]
    pace = Pace(jobs, lambda: now[0])
    assert pace.left() is None
    pace.started(jobs[0])
    now[0] = 100.0
    pace.finished(jobs[0])
    assert pace.left() == pytest.approx(100 + 2 * 10)
    pace.started(jobs[1])
    pace.started(jobs[2])
    now[0] = 150.0  # half of the second is done; the third, longer than it should
    assert pace.left() == pytest.approx((100 + 2 * 10 - 50 - 10) / 2)
    pace.finished(jobs[2])
    now[0] = 200.0
    pace.finished(jobs[1])
    assert pace.left() == pytest.approx(50)  # the last as the third


def test_without_a_terminal_a_line_a_cell(capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [job("pixel-knn"), job("pixel-knn", 2)]
    display = Display(jobs, 3, 5)
    with display.shown():
        for part in range(3):
            display.started(SimpleNamespace(part=part))
        for each in jobs:
            display.started(each)
        display.finished(jobs[0], None, {"metrics": {"accuracy": 0.4567}}, 4)
        display.finished(jobs[1], Failure("no room"), None, 4)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "encoding images, each once for all cells"
    assert re.fullmatch(r"4/5 pixel-knn on icons, 1 shots, seed 0: 45\.7%, about 0 s left", lines[1])
    assert lines[2:] == ["failed: pixel-knn on icons, 2 shots, seed 0: no room"]


def test_on_a_terminal_what_runs_and_what_came(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(progress, "err", Terminal(file=written, force_terminal=True, width=80, color_system=None))
    jobs = [job("vlm-lora", 4), job("pixel-knn", 2)]
    display = Display(jobs, 0, 2)
    with display.shown():
        display.started(jobs[0])
        display.started(jobs[1])
        display.finished(jobs[1], None, {"metrics": {"accuracy": 0.5}}, 1)
    text = written.getvalue()
    assert "running: vlm-lora icons k=4 seed 0" in text
    assert "last: 50.0% pixel-knn icons k=2 seed 0" in text
    assert "1/2" in text
