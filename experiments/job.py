"""What a worker is given: a cell, or images to encode for cells, and what only this machine needs. Loads nothing."""

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


@dataclass(frozen=True)
class Encoding:
    """Images that cells like `like` will show the VLM: its test images and, where cells learn (shots > 0), those of all
    `seeds`; of them every `parts`-th from `part` on."""

    like: Job
    seeds: tuple[int, ...]
    shots: int
    part: int
    parts: int

    def __str__(self) -> str:
        return f"encoding the images of {self.like.cell.dataset}, part {self.part + 1} of {self.parts}"
