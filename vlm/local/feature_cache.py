"""Image features, and the part of them that is kept in the host's memory. Computes none, and knows no files."""

from collections import OrderedDict
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from vlm.local.placement import group_free_bytes


@dataclass(frozen=True)
class ImageFeatures:
    """One image. grid: patches (time, height, width). embeds: (tokens, hidden). deepstack: likewise, one a layer."""

    grid: tuple[int, int, int]
    embeds: Tensor
    deepstack: tuple[Tensor, ...]

    @property
    def tokens(self) -> int:
        return len(self.embeds)

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.embeds, *self.deepstack))


@dataclass(frozen=True)
class Layers:
    """An image's features in one piece: (1 + deepstack layers, tokens, hidden), the embeds first."""

    grid: tuple[int, int, int]
    values: Tensor

    def features(self, device: torch.device) -> ImageFeatures:
        """As the text model takes them, on its device."""
        embeds, *deepstack = self.values.to(device)
        return ImageFeatures(self.grid, embeds, tuple(deepstack))

    def kept(self) -> "Layers":
        """On the host, in memory of its own: a view would keep a whole pass, or a padded file, alive."""
        host = self.values.cpu()
        whole = host.untyped_storage().nbytes() == host.nbytes
        return Layers(self.grid, host if whole else host.clone())


def memory_limit() -> int:
    """A quarter of the memory that the machine, or the process's control group, has; at most 16 GiB (bytes)."""
    return int(min(psutil.virtual_memory().total / 4, group_free_bytes() / 4, 16 << 30))


class MemoryCache:
    """Features on the host. Least recently used ones go first, beyond `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._cache: OrderedDict[bytes, Layers] = OrderedDict()

    def __contains__(self, key: bytes) -> bool:
        return key in self._cache

    def get(self, key: bytes) -> Layers | None:
        if key in self._cache:
            self._cache.move_to_end(key)
        return self._cache.get(key)

    def put(self, key: bytes, layers: Layers) -> None:
        self._held += layers.values.nbytes
        if key in self._cache:
            self._held -= self._cache.pop(key).values.nbytes
        self._cache[key] = layers
        while self._held > self._limit:
            self._held -= self._cache.popitem(last=False)[1].values.nbytes
