"""How a sweep goes: on a terminal the cells that run, the time left, the last accuracy and failures; elsewhere a line a
cell."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING, Any

from experiments.terminal import err

if TYPE_CHECKING:
    from rich.console import RenderableType

    from experiments.sweep.cells import EncodingJob, Job
    from experiments.sweep.workers import Failure

SHOWN = 3  # cells that run, named at once


class Pace:
    """The time that is left: each missing cell takes what cells of its method and data set have taken on average, or
    before one of them is finished, as its cost is to that of the others."""

    def __init__(self, jobs: "Sequence[Job]", clock: Callable[[], float] = time.monotonic) -> None:
        from experiments.sweep.methods import METHODS

        self._costs = {name: method.cost for name, method in METHODS.items()}
        self._missing = Counter(map(_kind, jobs))
        self._seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
        self._clock, self._last = clock, clock()
        self._running: dict[int, tuple[Job | EncodingJob, float]] = {}  # by identity: jobs have no hash

    @property
    def running(self) -> "list[Job | EncodingJob]":
        return [job for job, _ in self._running.values()]

    def started(self, job: "Job | EncodingJob") -> None:
        self._running[id(job)] = job, self._clock()

    def finished(self, job: "Job | EncodingJob") -> None:
        now = self._clock()
        (_, began), self._last = self._running.pop(id(job), (job, self._last)), now
        if (kind := _kind(job)) in self._missing:
            self._missing[kind] -= 1
            self._seconds[kind].append(now - began)

    def left(self) -> float | None:
        """Seconds; None before a cell is finished."""
        if not self._seconds:
            return None
        paid = sum(self._costs[method] * len(each) for (_, method), each in self._seconds.items())
        rate = sum(map(sum, self._seconds.values())) / paid  # seconds of a unit of cost

        def each(kind: tuple[str, str]) -> float:
            return fmean(self._seconds[kind]) if kind in self._seconds else rate * self._costs[kind[1]]

        now = self._clock()
        spent = sum(min(now - began, each(_kind(job))) for job, began in self._running.values() if _kind(job)[1])
        total = sum(count * each(kind) for kind, count in self._missing.items())
        return max(0.0, total - spent) / max(1, len(self._running))


def _kind(job: "Job | EncodingJob") -> tuple[str, str]:
    """Data set and method of a cell; of an encoding no method."""
    cell = getattr(job, "cell", None)
    return (cell.dataset, cell.method) if cell else ("", "")


class Display:
    """Shows a run. done, total: cells of the sweep that are stored, and all."""

    def __init__(self, jobs: "Sequence[Job]", done: int, total: int) -> None:
        self._pace, self._done, self._total = Pace(jobs), done, total
        self._failed, self._last, self._encoding = 0, "", False
        self._began = time.monotonic()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """While it goes on."""
        if not err.is_terminal:
            yield
            return
        from rich.live import Live

        with Live(console=err, get_renderable=self._picture, refresh_per_second=2):
            yield

    def started(self, job: "Job | EncodingJob") -> None:
        self._pace.started(job)
        if not _kind(job)[1] and not self._encoding:
            self._encoding = True
            if not err.is_terminal:
                err.print("encoding images, each once for all cells")

    def finished(
        self, job: "Job | EncodingJob", failure: "Failure | None", record: Mapping[str, Any] | None, done: int
    ) -> None:
        self._pace.finished(job)
        self._done = done
        if failure:
            self._failed += 1
            err.print(f"failed: {job}: {failure.message}", style="yellow")
        elif record is not None:
            self._last = f"{100 * record['metrics']['accuracy']:.1f}% {_name(job)}"
            if not err.is_terminal:
                err.print(f"{done}/{self._total} {job}: {100 * record['metrics']['accuracy']:.1f}%{self._time(', ')}")

    def _time(self, before: str = "") -> str:
        from experiments.plan.estimate import duration

        left = self._pace.left()
        return "" if left is None or self._over else f"{before}about {duration(left)} left"

    @property
    def _over(self) -> bool:
        return self._done + self._failed >= self._total

    def _picture(self) -> "RenderableType":
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        elapsed = int(time.monotonic() - self._began)
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            "cells",
            ProgressBar(total=max(1, self._total), completed=self._done, width=24),
            f"{self._done}/{self._total}",
            f"{elapsed // 3600}:{elapsed // 60 % 60:02}:{elapsed % 60:02}",
            self._time() or ("" if self._over else "measuring the time left"),
        )
        lines = [] if self._over else [self._running()]
        lines += [f"last: {self._last}"] if self._last else []
        lines += [f"failed: {self._failed}"] if self._failed else []
        return Group(bar, *(Text(line, no_wrap=True, overflow="ellipsis") for line in lines))

    def _running(self) -> str:
        names = Counter("encoding images" if not _kind(job)[1] else _name(job) for job in self._pace.running)
        words = [*names][:SHOWN]
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        return f"running: {', '.join(words) or 'starting'}{more}"


def _name(job: Any) -> str:
    return f"{job.cell.method} {job.cell.dataset} k={job.cell.shots} seed {job.cell.seed}"
