"""Image features, and those of them that are kept in memory. Computes none, and knows no files."""

from collections import OrderedDict
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from vlm.local.placement import group_free_bytes


@dataclass(frozen=True)
class ImageFeatures:
    """One image. grid: patches (time, height, width).

    values: (1 + deepstack layers, tokens, hidden), the embeds first.
    """

    grid: tuple[int, int, int]
    values: Tensor

    @property
    def embeds(self) -> Tensor:
        """(tokens, hidden)"""
        return self.values[0]

    @property
    def deepstack(self) -> tuple[Tensor, ...]:
        """(tokens, hidden), one a layer."""
        return tuple(self.values[1:])

    @property
    def tokens(self) -> int:
        return self.values.shape[1]

    @property
    def bytes(self) -> int:
        return self.values.nbytes

    def on(self, device: torch.device) -> "ImageFeatures":
        """The same on a device."""
        return self if self.values.device == device else ImageFeatures(self.grid, self.values.to(device))

    def kept(self, host: bool = True) -> "ImageFeatures":
        """In memory of its own, the host's unless told: a view would keep a whole pass, or a padded file, alive."""
        values = self.values.cpu() if host else self.values
        whole = values.untyped_storage().nbytes() == values.nbytes
        return ImageFeatures(self.grid, values if whole else values.clone())


def memory_limit() -> int:
    """A quarter of the memory that the machine, or the process's control group, has; at most 16 GiB (bytes)."""
    return int(min(psutil.virtual_memory().total / 4, group_free_bytes() / 4, 16 << 30))


def device_limit(device: torch.device) -> int:
    """A sixteenth of a GPU's memory (bytes); 0 elsewhere, where the host's memory is as near."""
    return torch.cuda.get_device_properties(device).total_memory // 16 if device.type == "cuda" else 0


class MemoryCache:
    """Features in memory. Least recently used ones go first, beyond `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self._held = limit, 0
        self._cache: OrderedDict[bytes, ImageFeatures] = OrderedDict()

    def __contains__(self, key: bytes) -> bool:
        return key in self._cache

    def get(self, key: bytes) -> ImageFeatures | None:
        if key in self._cache:
            self._cache.move_to_end(key)
        return self._cache.get(key)

    def put(self, key: bytes, layers: ImageFeatures) -> None:
        self._held += layers.values.nbytes
        if key in self._cache:
            self._held -= self._cache.pop(key).values.nbytes
        self._cache[key] = layers
        while self._held > self.limit:
            self._held -= self._cache.popitem(last=False)[1].values.nbytes
