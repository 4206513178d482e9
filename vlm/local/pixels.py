"""Encoded images → the patches that the vision tower takes, made ahead of time by a few threads. Knows no model.

What is made does not depend on who makes it: the bits are those of the stock image processor, called on one image.
"""

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from threading import Barrier, Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kshot_errors import ImageError
from kshot_images import open_header, open_image
from vlm.inputs import ImageRule

PIXEL_BYTES = 1 << 30
MOST_THREADS = 4
ABANDONED = 600  # seconds after which patches that nobody took may make room for others


class Patches(NamedTuple):
    """One image. pixels: (patches, channels x time x patch x patch). grid: patches (time, height, width)."""

    pixels: Tensor
    grid: tuple[int, int, int]


@dataclass
class _Started:
    future: "Future[Patches]"
    bytes: int
    asked: int  # how often it was started and not yet taken
    since: float


def spare_threads(device: torch.device) -> int:
    """How many threads can decode without taking a core from the model on `device`.

    Beside a model on the CPU these are the cores that torch does not use; none where torch has a single thread, because
    then such processes run side by side, one a core.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    used = torch.get_num_threads() if device.type == "cpu" else 0
    return 0 if used == 1 else max(0, min(MOST_THREADS, cores - used))


class PixelLoader:
    """Any thread may start images and take them. With no threads, `start` does nothing and `take` does all.

    limit: bytes of patches that are made or being made and wait to be taken.
    """

    def __init__(self, rule: ImageRule, threads: int, limit: int = PIXEL_BYTES) -> None:
        self.threads = threads
        self._rule, self._limit, self._held = rule, limit, 0
        self._started: dict[bytes, _Started] = {}
        self._lock = Lock()

    def start(self, key: bytes, data: bytes) -> None:
        """Have the image made for a later `take`, unless there is no room. `take` raises what is wrong with it."""
        if not self.threads:
            return
        try:
            size = self._bytes(data)
        except ImageError:
            return
        with self._lock:
            if before := self._started.get(key):
                before.asked, before.since = before.asked + 1, time.monotonic()
            elif self._room(size):
                future = self._pool.submit(self._make, data)
                self._started[key] = _Started(future, size, 1, time.monotonic())
                self._held += size

    def take(self, key: bytes, data: bytes) -> Patches:
        """The patches of an image, made here if nobody has begun. Raises ImageError for what is no image."""
        with self._lock:
            started = self._started.get(key)
            unbegun = started is not None and started.future.cancel()
            if started:
                started.asked -= 1
                if unbegun or not started.asked:
                    self._remove(key)
        return self._make(data) if started is None or unbegun else started.future.result()

    def drop(self, key: bytes) -> None:
        """Forget an image that is not needed any more."""
        with self._lock:
            if key in self._started:
                self._remove(key)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        """All threads running, each with torch's own threads switched off: the images are many and small."""
        before, ready = torch.get_num_threads(), Barrier(self.threads + 1)

        def begin() -> None:
            torch.set_num_threads(1)  # of this thread, but of threads that begin later too ...
            ready.wait()

        pool = ThreadPoolExecutor(self.threads, "kshot-pixels")
        for _ in range(self.threads):
            pool.submit(begin)
        ready.wait()
        torch.set_num_threads(before)  # ... which this takes back
        return pool

    def _remove(self, key: bytes) -> None:
        gone = self._started.pop(key)
        gone.future.cancel()
        self._held -= gone.bytes

    def _room(self, size: int) -> bool:
        if self._held + size > self._limit:
            long_ago = time.monotonic() - ABANDONED
            for key in [key for key, each in self._started.items() if each.since < long_ago]:
                self._remove(key)
        return self._held + size <= self._limit

    def _bytes(self, data: bytes) -> int:
        """Of an image's patches in float32, from its header. Raises ImageError."""
        processor: Any = self._rule.processor
        with open_header(data) as image:
            tokens = self._rule.tokens(image.height, image.width)
        return tokens * processor.merge_size**2 * 3 * processor.temporal_patch_size * processor.patch_size**2 * 4

    @torch.inference_mode(False)  # pool or caller: the same kind of tensor
    def _make(self, data: bytes) -> Patches:
        image = open_image(data)
        self._rule.tokens(image.height, image.width)  # names the size where the processor would raise ValueError
        made = self._rule.processor(images=[image], return_tensors="pt")
        time_, height, width = made["image_grid_thw"][0].tolist()
        return Patches(made["pixel_values"], (time_, height, width))
