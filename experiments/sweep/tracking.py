"""Optional tracking of a sweep while it runs, with a tool of the user's choice: W&B, trackio or TensorBoard.

A run of the tool is a curve of a figure: a method (under what the sweep compares) with one seed. It has a value
`DATA SET/METRIC` at each number of shots, so that the tool draws for each data set the figure of the report. Nothing is
sent anywhere unless the tool does so.
"""

import hashlib
import io
import json
import os
from collections.abc import Mapping
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from experiments.sweep.provenance import file_stem
from experiments.sweep.series import by_series
from experiments.terminal import err
from kshot.errors import InputError, UnknownNameError
from kshot.hub import one_line

EXTRA = "pip install 'kshot[tracking]'"
PROJECT = "kshot"  # of W&B, unless WANDB_PROJECT names another
TAG, NAME = 64, 128  # characters that W&B allows, at most
# What W&B would collect besides: what is printed, the code and its repository, the machine and its packages.
UNWANTED = {
    **{"console": "off", "disable_git": True, "disable_code": True, "x_save_requirements": False},
    **{"x_disable_meta": True, "x_disable_stats": True, "x_disable_machine_info": True},
}


class Tracker:
    """Follows a sweep with a tool of TRACKERS, or with none: `start`, then `cell` for each cell that has finished, then
    `finish`. Once the tool fails it says so in a line on stderr and does no more; nothing is raised.

    Raises UnknownNameError for another name, InputError with the line that installs it where its package is missing.
    """

    def __init__(self, name: str | None = None) -> None:
        if name is not None and name not in TRACKERS:
            raise UnknownNameError("tracker", name, TRACKERS)
        self._name, self._tool = name, TRACKERS[name]() if name else None
        try:
            for module in self._tool.modules if self._tool else ():
                import_module(module)
        except Exception as error:  # also what is broken in other ways than by being absent
            reason = f"which cannot be imported ({one_line(error)})"
            install = f"{EXTRA}, or: pip install {name}"
            raise InputError(f"tracking with {name} needs the package {name}, {reason}; {install}") from error

    def start(self, config: Mapping[str, Any], folder: Path) -> None:
        """config: the content of sweep.json. folder: of the results; a tool that writes files puts them into a folder
        of its own there."""
        self._try("start", config, folder)

    def cell(self, record: Mapping[str, Any], done: int, total: int) -> None:
        """record: of a finished cell, as it is stored. done, total: cells of the sweep, with this one."""
        self._try("cell", record, done, total)

    def finish(self) -> None:
        """Everything is written or sent when this returns."""
        self._try("finish")

    def _try(self, stage: str, *arguments: Any) -> None:
        try:
            if self._tool is not None:
                getattr(self._tool, stage)(*arguments)
        except Exception as error:
            self._tool = None
            text = f"kshot: tracking with {self._name} failed and ends here, the sweep goes on ({one_line(error)})"
            err.print(text, style="yellow")


class Curve(NamedTuple):
    """Of which run a cell is. series: the method, with what it is run under of what the sweep compares."""

    series: str
    seed: int


class _Runs:
    """A tool, with a run a curve. modules: what must be importable; the package is named as the tool."""

    modules: tuple[str, ...]

    def start(self, config: Mapping[str, Any], folder: Path) -> None:
        self._name, self._config, self._folder, self._runs = config["name"], config, folder, dict[Curve, Any]()

    def finish(self) -> None:
        """What a tool has that keeps nothing open."""

    def _curve(self, record: Mapping[str, Any]) -> Curve:
        _, (named,) = by_series(self._config, [record])
        return Curve(str(named["method"]), record["seed"])

    def _run_config(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """What holds for all cells of a run; of the sweep all but the names of the classes, which are many."""
        same = {field: record[field] for field in ("method", "seed", "settings", "versions")}
        return {**same, "sweep": {key: value for key, value in self._config.items() if key != "classes"}}


def _values(record: Mapping[str, Any]) -> dict[str, float]:
    """{"DATA SET/NAME": value} of a cell's metrics that have a meaning, and of its times in seconds."""
    values = {**record["metrics"], **record["timings"]}
    return {f"{record['dataset']}/{name}": value for name, value in values.items() if value is not None}


class Wandb(_Runs):
    """Weights & Biases: a run a curve, in a group a series; shots are the x axis. WANDB_MODE, WANDB_PROJECT,
    WANDB_ENTITY and the like hold. Files, and what is logged offline, go to `wandb` in the results folder."""

    modules = ("wandb",)

    def start(self, config: Mapping[str, Any], folder: Path) -> None:
        """Asks for a key where one is needed, there is none, and somebody is there to be asked."""
        import wandb

        super().start(config, folder)
        if wandb.setup().settings.mode == "online":
            wandb.login()

    def cell(self, record: Mapping[str, Any], done: int, total: int) -> None:
        curve = self._curve(record)
        if curve not in self._runs:
            self._runs[curve] = self._opened(curve, record)
        self._runs[curve].log({"shots": record["shots"], **_values(record), "cells": done, "cells of": total})

    def finish(self) -> None:
        for run in self._runs.values():
            run.finish()

    def _opened(self, curve: Curve, record: Mapping[str, Any]) -> Any:
        import wandb

        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=self._folder,
            name=f"{self._name}: {curve.series}, seed {curve.seed}"[:NAME],
            group=f"{self._name}: {curve.series}"[:NAME],
            job_type=record["method"][:TAG],
            tags=[tag[:TAG] for tag in (self._name, record["method"], *self._config["datasets"])],
            config=self._run_config(record),
            reinit="create_new",  # beside those of the other curves
            settings=wandb.Settings(**{k: v for k, v in UNWANTED.items() if k in wandb.Settings.model_fields}),
        )
        run.define_metric("*", step_metric="shots")
        return run


class Trackio(_Runs):
    """trackio: a project a sweep, in it a run a curve and a group a series; the step is the shots. Kept on this machine
    (TRACKIO_DIR) unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says otherwise."""

    modules = ("trackio",)

    def cell(self, record: Mapping[str, Any], done: int, total: int) -> None:
        """Opens the run, and closes it: trackio has one open at a time."""
        import trackio
        from huggingface_hub import constants

        curve = self._curve(record)
        # A sweep that is continued in its folder continues its runs; one in another folder has its own.
        folder = hashlib.sha256(str(self._folder.resolve()).encode()).hexdigest()[:6]
        here = not (os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL"))
        # Where all stays here, trackio does not ask the hub whose token this is, as it does for every run.
        offline = patch.object(constants, "HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE or here)
        with redirect_stdout(io.StringIO()), offline:
            run = trackio.init(
                project=self._name,
                name=f"{curve.series}, seed {curve.seed} ({folder})",
                group=curve.series,
                config=self._run_config(record),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
            run.log({**_values(record), "cells": done, "cells of": total}, step=record["shots"])
            trackio.finish()


class TensorBoard(_Runs):
    """TensorBoard's event files in `tensorboard` of the results folder, a run a curve; the step is the shots."""

    modules = ("tensorboard", "torch.utils.tensorboard")

    def start(self, config: Mapping[str, Any], folder: Path) -> None:
        super().start(config, folder)
        self._progress = self._writer(".")
        text = json.dumps(config, indent=2, ensure_ascii=False)
        self._progress.add_text(self._name, "\n".join(f"    {line}" for line in text.splitlines()))

    def cell(self, record: Mapping[str, Any], done: int, total: int) -> None:
        curve = self._curve(record)
        if curve not in self._runs:
            self._runs[curve] = self._writer(f"{file_stem(curve.series)}/seed-{curve.seed}")
        for name, value in _values(record).items():
            self._runs[curve].add_scalar(name, value, record["shots"])
        self._progress.add_scalar("sweep/done", done / total, done)
        for writer in (self._runs[curve], self._progress):
            writer.flush()

    def finish(self) -> None:
        for writer in (*self._runs.values(), self._progress):
            writer.close()

    def _writer(self, folder: str) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self._folder / "tensorboard" / folder)


TRACKERS: dict[str, type[_Runs]] = {"wandb": Wandb, "trackio": Trackio, "tensorboard": TensorBoard}
