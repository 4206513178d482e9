"""A cell and what only this machine needs to run it. Loads nothing."""

from dataclasses import dataclass

from experiments.cell import Cell
from experiments.config import Settings


@dataclass(frozen=True)
class Job:
    """source: how the data set is named here, maybe a path. service, device: who computes, and on what."""

    cell: Cell
    settings: Settings
    source: str
    service: str = "local"
    device: str = "cpu"

    def __str__(self) -> str:
        return str(self.cell)
