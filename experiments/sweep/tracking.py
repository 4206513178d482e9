"""Optional tracking of a sweep while it runs, with a tool that the user has chosen: one small interface, a row a tool.

Knows no tool's package: those are in `experiments.sweep.tracking` and are imported when one is chosen. Nothing is sent
anywhere unless the chosen tool does so.

TODO The trackers: what each tool is told of a sweep, through its own public calls.

All say the same. A run is a line of a figure: a method (under what the sweep compares) with one seed. It has a value
`DATA SET/METRIC` at each number of shots, so that a tool draws for each data set the figure of the report. This module
knows no sweep that runs, and imports a tool's package when it starts.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from experiments.sweep.provenance import file_stem
from experiments.sweep.series import by_series
from experiments.terminal import err
from kshot.errors import InputError, UnknownNameError

# ---- Optional tracking of a sweep while it runs, with a tool that the user has chosen: one small interface, a

EXTRA = "pip install 'kshot[tracking]'"


class Tracker(Protocol):
    """What follows a sweep. start, then cell for each cell that has finished, then finish."""

    def start(self, name: str, config: Mapping[str, Any], folder: Path) -> None:
        """name: of the sweep. config: the content of sweep.json. folder: of the results; a tool that writes files puts
        them into a folder of its own there."""

    def cell(self, record: Mapping[str, Any], done: int, total: int) -> None:
        """record: of a finished cell, as in cells/*.json. done, total: cells of the sweep, with this one."""

    def finish(self) -> None:
        """Everything is written or sent when this returns."""


@dataclass(frozen=True)
class Tool:
    """A row. package: what pip calls it. modules: what must be importable. make: a tracker, as "module:class"."""

    package: str
    modules: tuple[str, ...]
    make: str


TRACKERS: dict[str, Tool] = {
    "wandb": Tool("wandb", ("wandb",), "experiments.sweep.tracking:Wandb"),
    "trackio": Tool("trackio", ("trackio",), "experiments.sweep.tracking:Trackio"),
    "tensorboard": Tool(
        "tensorboard", ("tensorboard", "torch.utils.tensorboard"), "experiments.sweep.tracking:TensorBoard"
    ),
}


def tracker(name: str) -> Tracker:
    """The tracker of that name; once it fails it says so in a line on stderr and is left alone, and nothing is raised.

    Raises UnknownNameError for another name, InputError with the line that installs it where its package is missing.
    """
    if name not in TRACKERS:
        raise UnknownNameError("tracker", name, TRACKERS)
    tool = TRACKERS[name]
    try:
        for needed in tool.modules:
            import_module(needed)
    except Exception as error:  # also what is broken in other ways than by being absent
        reason = f"which cannot be imported ({_line(error)})"
        install = f"{EXTRA}, or: pip install {tool.package}"
        raise InputError(f"tracking with {name} needs the package {tool.package}, {reason}; {install}") from error
    module, factory = tool.make.split(":")
    return _Guarded(name, getattr(import_module(module), factory)())


class _Guarded:
    """A tracker whose failure ends the tracking, and not a sweep that is hours old."""

    def __init__(self, name: str, inner: Tracker) -> None:
        self._name, self._inner, self._failed = name, inner, False

    def start(self, name: str, config: Mapping[str, Any], folder: Path) -> None:
        self._try(self._inner.start, name, config, folder)

    def cell(self, record: Mapping[str, Any], done: int, total: int) -> None:
        self._try(self._inner.cell, record, done, total)

    def finish(self) -> None:
        self._try(self._inner.finish)

    def _try(self, call: Callable[..., None], *given: Any) -> None:
        if self._failed:
            return
        try:
            call(*given)
        except Exception as error:
            self._failed = True
            text = f"kshot: tracking with {self._name} failed and ends here, the sweep goes on ({_line(error)})"
            err.print(text, style="yellow", markup=False, highlight=False)


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


# ---- The trackers: what each tool is told of a sweep, through its own public calls.

PROJECT = "kshot"  # unless WANDB_PROJECT names another
TAG, NAME = 64, 128  # characters that W&B allows, at most
# What W&B would collect besides: what is printed, the code and its repository, the machine and its packages.
UNASKED = {
    **{"console": "off", "disable_git": True, "disable_code": True, "x_save_requirements": False},
    **{"x_disable_meta": True, "x_disable_stats": True, "x_disable_machine_info": True},
}


class Line(NamedTuple):
    """Of which run a cell is. series: the method, with what it is run under of what the sweep compares."""

    series: str
    seed: int

    def __str__(self) -> str:
        return f"{self.series}, seed {self.seed}"


class Sweep(NamedTuple):
    """What a tracker was started with."""

    name: str
    config: Mapping[str, Any]
    folder: Path

    def line(self, record: Mapping[str, Any]) -> Line:
        _, (named,) = by_series(self.config, [record])
        return Line(str(named["method"]), record["seed"])

    def about(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """What holds for all cells of a run; of the sweep all but the names of the classes, which are many."""
        same = {field: record[field] for field in ("method", "seed", "settings", "versions")}
        return {**same, "sweep": {key: value for key, value in self.config.items() if key != "classes"}}


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """{"DATA SET/NAME": value} of a cell's metrics that have a meaning, and of its times in seconds."""
    found = {**record["metrics"], **record["timings"]}
    return {f"{record['dataset']}/{name}": value for name, value in found.items() if value is not None}


class Wandb:
    """Weights & Biases: a run a line, in a group a series; shots are the x axis. WANDB_MODE, WANDB_PROJECT,
    WANDB_ENTITY and the like hold. Files, and what is logged offline, go to `wandb` in the results folder."""

    def start(self, name: str, config: Mapping[str, Any], folder: Path) -> None:
        """Asks for a key where one is needed, there is none, and somebody is there to be asked."""
        import wandb

        self._sweep, self._runs = Sweep(name, config, folder), dict[Line, Any]()
        if wandb.setup().settings.mode == "online":
            wandb.login()

    def cell(self, record: Mapping[str, Any], done: int, total: int) -> None:
        line = self._sweep.line(record)
        if line not in self._runs:
            self._runs[line] = self._opened(line, record)
        self._runs[line].log({"shots": record["shots"], **numbers(record), "cells": done, "cells of": total})

    def finish(self) -> None:
        for run in self._runs.values():
            run.finish()

    def _opened(self, line: Line, record: Mapping[str, Any]) -> Any:
        import wandb

        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=self._sweep.folder,
            name=f"{self._sweep.name}: {line}"[:NAME],
            group=f"{self._sweep.name}: {line.series}"[:NAME],
            job_type=record["method"][:TAG],
            tags=[tag[:TAG] for tag in (self._sweep.name, record["method"], *self._sweep.config["datasets"])],
            config=self._sweep.about(record),
            reinit="create_new",  # beside those of the other lines
            settings=wandb.Settings(**{k: v for k, v in UNASKED.items() if k in wandb.Settings.model_fields}),
        )
        run.define_metric("*", step_metric="shots")
        return run


class Trackio:
    """trackio: a project a sweep, in it a run a line and a group a series; the step is the shots. Kept on this machine
    (TRACKIO_DIR) unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says otherwise."""

    def start(self, name: str, config: Mapping[str, Any], folder: Path) -> None:
        self._sweep = Sweep(name, config, folder)
        # A sweep that is continued in its folder continues its runs; one in another folder has its own.
        self._mark = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:6]

    def cell(self, record: Mapping[str, Any], done: int, total: int) -> None:
        """Opens the run, and closes it: trackio has one open at a time."""
        import trackio

        line, chatter = self._sweep.line(record), io.StringIO()
        with redirect_stdout(chatter), _nothing_sent():
            run = trackio.init(
                project=self._sweep.name,
                name=f"{line} ({self._mark})",
                group=line.series,
                config=self._sweep.about(record),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
            run.log({**numbers(record), "cells": done, "cells of": total}, step=record["shots"])
            trackio.finish()

    def finish(self) -> None:
        """Every cell's run is closed already."""


class TensorBoard:
    """TensorBoard's event files in `tensorboard` of the results folder, a run a line; the step is the shots."""

    def start(self, name: str, config: Mapping[str, Any], folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._sweep, self._root = Sweep(name, config, folder), folder / "tensorboard"
        self._progress, self._writers = SummaryWriter(self._root), dict[Line, Any]()
        text = json.dumps(config, indent=2, ensure_ascii=False)
        self._progress.add_text(name, "\n".join(f"    {line}" for line in text.splitlines()))

    def cell(self, record: Mapping[str, Any], done: int, total: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        line = self._sweep.line(record)
        if line not in self._writers:
            self._writers[line] = SummaryWriter(self._root / file_stem(line.series) / f"seed-{line.seed}")
        for name, value in numbers(record).items():
            self._writers[line].add_scalar(name, value, record["shots"])
        self._progress.add_scalar("sweep/done", done / total, done)
        for writer in (self._writers[line], self._progress):
            writer.flush()

    def finish(self) -> None:
        for writer in (*self._writers.values(), self._progress):
            writer.close()


@contextmanager
def _nothing_sent() -> Iterator[None]:
    """Keep trackio from asking the hub whose token this is, as it does for every run, where all stays here."""
    from huggingface_hub import constants

    local = not (os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL"))
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or local
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
