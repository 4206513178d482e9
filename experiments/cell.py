"""One cell of a sweep: (data set, method, shots, seed) under its settings, and the key it is stored by."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cell:
    """What is measured. settings: only those that the method's numbers depend on, JSON values.

    Where the data set lies, who computes and where results go are not part of a cell.
    """

    dataset: str
    protocol: str
    method: str
    shots: int
    seed: int
    settings: Mapping[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        """Everything the cell's numbers depend on."""
        fields = ("dataset", "protocol", "method", "shots", "seed")
        return {**{field: getattr(self, field) for field in fields}, "settings": dict(self.settings)}

    @property
    def key(self) -> str:
        """Hash of the identity: the same cell has the same key on every machine."""
        canonical = json.dumps(self.identity, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.method} on {self.dataset}, {self.shots} shots, seed {self.seed}"
