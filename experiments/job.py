"""A cell and what only this machine needs to run it. Loads nothing."""

from dataclasses import dataclass, field

from data.row import Access
from experiments.cell import Cell
from experiments.config import Settings


@dataclass(frozen=True)
class Job:
    """source: how the data set is named here, maybe a path. service, device: who computes, and on what.
    access: how the data set is had."""

    cell: Cell
    settings: Settings
    source: str
    service: str = "local"
    device: str = "cpu"
    access: Access = field(default_factory=Access)

    def __str__(self) -> str:
        return str(self.cell)
