"""Optional tracking of a sweep while it runs, with a tool that the user has chosen: one small interface, a row a tool.

Knows no tool's package: those are in `experiments.trackers` and are imported when one is chosen. Nothing is sent
anywhere unless the chosen tool does so.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from experiments.terminal import err
from kshot_errors import InputError, UnknownNameError

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
    "wandb": Tool("wandb", ("wandb",), "experiments.trackers:Wandb"),
    "trackio": Tool("trackio", ("trackio",), "experiments.trackers:Trackio"),
    "tensorboard": Tool("tensorboard", ("tensorboard", "torch.utils.tensorboard"), "experiments.trackers:TensorBoard"),
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
