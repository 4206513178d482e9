"""Image features, and the part of them that is kept in the host's memory. Computes none, and knows no files."""

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

    def kept(self) -> "ImageFeatures":
        """On the host, in memory of its own: a view would keep a whole pass, or a padded file, alive."""
        host = self.values.cpu()
        whole = host.untyped_storage().nbytes() == host.nbytes
        return ImageFeatures(self.grid, host if whole else host.clone())


def memory_limit() -> int:
    """A quarter of the memory that the machine, or the process's control group, has; at most 16 GiB (bytes)."""
    return int(min(psutil.virtual_memory().total / 4, group_free_bytes() / 4, 16 << 30))


class MemoryCache:
    """Features on the host. Least recently used ones go first, beyond `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
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
        while self._held > self._limit:
            self._held -= self._cache.popitem(last=False)[1].values.nbytes
