"""Image features: the bytes of an image chunk → the output of the vision tower, cached by content.

Cached features are exact as long as no LoRA covers the tower; with LoRA on it, they are computed anew. On a CPU
every image is its own forward pass, so that features are a function of the image alone, bit for bit, whatever else was
requested with it; elsewhere images of one size share a pass.

A few threads decode images ahead of time (`PixelLoader`). Their patches have the bits of the stock image processor,
called on one image, whichever thread makes them.
"""

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from threading import Barrier, Lock
from typing import Any, NamedTuple

import psutil
import torch
from tinker import types
from torch import Tensor

from kshot.errors import ImageError, RequestError
from kshot.images import image_key, open_header, open_image
from vlm.inputs import ImageRule
from vlm.local.features import DiskCache, fingerprint
from vlm.local.model.families import family_of
from vlm.local.model.load import Model
from vlm.local.model.placement import group_free_bytes
from vlm.local.model.tower import GRIDS, ImageFeatures, Linear, grid_tables, plain, stock_features, tower

PIXEL_BYTES = 1 << 30
MOST_THREADS = 4
ABANDONED = 600  # seconds after which patches that nobody took may make room for others
PASS_PATCHES = 1 << 15  # of images that share a pass: activations of about 1 GB in the largest tower in bfloat16


class Patches(NamedTuple):
    """One image. pixels: (patches, channels x time x patch x patch). grid: patches (time, height, width)."""

    pixels: Tensor
    grid: tuple[int, int, int]


@dataclass
class _PendingImage:
    future: Future[Patches]
    bytes: int
    requests: int  # how often it was started and not yet taken
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
        self._started: dict[str, _PendingImage] = {}
        self._lock = Lock()

    def start(self, key: str, data: bytes) -> None:
        """Have the image made for a later `take`, unless there is no room. `take` raises what is wrong with it."""
        if not self.threads:
            return
        try:
            size = self._bytes(data)
        except ImageError:
            return
        with self._lock:
            if before := self._started.get(key):
                before.requests, before.since = before.requests + 1, time.monotonic()
            elif self._room(size):
                future = self._pool.submit(self._make, data)
                self._started[key] = _PendingImage(future, size, 1, time.monotonic())
                self._held += size

    def take(self, key: str, data: bytes) -> Patches:
        """The patches of an image, made here if nobody has begun. Raises ImageError for what is no image."""
        with self._lock:
            started = self._started.get(key)
            not_begun = started is not None and started.future.cancel()
            if started:
                started.requests -= 1
                if not_begun or not started.requests:
                    self._remove(key)
        return self._make(data) if started is None or not_begun else started.future.result()

    def drop(self, key: str) -> None:
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

    def _remove(self, key: str) -> None:
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
        self._cache: OrderedDict[str, ImageFeatures] = OrderedDict()

    def __contains__(self, key: str) -> bool:
        return key in self._cache

    def get(self, key: str) -> ImageFeatures | None:
        if key in self._cache:
            self._cache.move_to_end(key)
        return self._cache.get(key)

    def put(self, key: str, features: ImageFeatures) -> None:
        self._held += features.values.nbytes
        if key in self._cache:
            self._held -= self._cache.pop(key).values.nbytes
        self._cache[key] = features
        while self._held > self.limit:
            self._held -= self._cache.popitem(last=False)[1].values.nbytes


class Vision:
    """The tower of one model with its caches, of which least recently used features go first.

    cache_bytes: in the host's memory; by default `memory_limit`. device_bytes: in a GPU's memory too, as copying there
    waits for its work; by default `device_limit`. disk: a folder that keeps features for later processes. threads: that
    decode ahead (`prefetch`); by default `spare_threads`. Raises ModelError where the folder cannot be written.
    """

    _opened: Callable[[Any], AbstractContextManager[Any]] = nullcontext  # around what is computed with a block

    def __init__(
        self,
        model: Model,
        cache_bytes: int | None = None,
        disk: Path | None = None,
        *,
        device_bytes: int | None = None,
        threads: int | None = None,
        pixel_bytes: int = PIXEL_BYTES,
    ) -> None:
        self._model = model
        self._packed = family_of(model.stock).packed
        self._tables = lru_cache(GRIDS)(partial(grid_tables, self._visual))
        self._memory = MemoryCache(memory_limit() if cache_bytes is None else cache_bytes)
        self._device_memory = MemoryCache(device_limit(model.device) if device_bytes is None else device_bytes)
        self._disk = None if disk is None else DiskCache(disk, partial(fingerprint, self._visual, model.rule.processor))
        threads = spare_threads(model.device) if threads is None else threads
        self._pixels = PixelLoader(model.rule, threads, pixel_bytes)
        self.forwards = 0  # images that went through the tower

    def prefetch(self, chunks: Iterable[types.ImageChunk]) -> None:
        """Begin to decode the images that `features` will be asked for. From any thread; raises nothing about images;
        does nothing where no thread is spare or too many wait already."""
        images = {_key(chunk): chunk for chunk in chunks} if self._pixels.threads else {}
        for key, chunk in images.items():
            if not self._is_cached(key):
                self._pixels.start(key, chunk.data)

    def features(self, chunks: Sequence[types.ImageChunk], linear: Linear | None = None) -> list[ImageFeatures]:
        """The features of each chunk, in order, on the model's device. Raises ImageError for broken bytes, RequestError
        where `expected_tokens` is given and is not what this model's processor makes of the image.

        linear: of `tower`, where it is not the frozen one: with the graph of the gradients, and past all caches.
        """
        images = {_key(chunk): chunk.data for chunk in chunks}
        ready = self._frozen(images) if linear is None else self._together(images, linear)
        for chunk in chunks:
            tokens = ready[_key(chunk)].tokens
            if chunk.expected_tokens not in (None, tokens):
                raise RequestError(
                    f"Expected {chunk.expected_tokens} tokens, got {tokens} from image: the client counted with "
                    f"other processor settings than this model's {self._model.rule.settings}; vlm.image_chunk counts "
                    "them"
                )
        return [ready[_key(chunk)] for chunk in chunks]

    def _frozen(self, images: dict[str, bytes]) -> dict[str, ImageFeatures]:
        """From the caches, else through the tower and into them."""
        known = ((key, self._device_memory.get(key) or self._from_cache(key)) for key in images)
        cached = {key: features for key, features in known if features}
        cached |= self._encode({key: data for key, data in images.items() if key not in cached})
        ready = {key: features.to(self._model.device) for key, features in cached.items()}
        for key, features in ready.items():
            if self._device_memory.limit and key not in self._device_memory:
                self._device_memory.put(key, features.compact(host=False))
        return ready

    def uncached(self, chunks: Sequence[types.ImageChunk]) -> list[types.ImageChunk]:
        """Those whose features no cache has; the others count as used now, and stay while new ones come."""
        if self._disk:
            for chunk in chunks:
                self._disk.touch(_key(chunk))
        return [chunk for chunk in chunks if not self._is_cached(_key(chunk))]

    @property
    def _visual(self) -> Any:
        return self._model.stock.get_encoder("image")

    def _is_cached(self, key: str) -> bool:
        return key in self._device_memory or key in self._memory or bool(self._disk and key in self._disk)

    def _from_cache(self, key: str) -> ImageFeatures | None:
        features = self._memory.get(key)
        if features is None and self._disk and (features := self._disk.get(key)):
            self._memory.put(key, features.compact())
        if features is not None:
            self._pixels.drop(key)
        return features

    @torch.inference_mode(False)  # kept for passes with gradients too
    @torch.no_grad()
    def _encode(self, images: dict[str, bytes]) -> dict[str, ImageFeatures]:
        """Through the tower and into the caches; images of one size in one pass, unless on a CPU."""
        if self._model.device.type != "cpu":
            done = self._together(images)
        else:
            done = {key: self._run([self._pixels.take(key, data)])[0] for key, data in images.items()}
        for key, features in done.items():
            self._pixels.drop(key)  # other requests may wait for it
            self._memory.put(key, compact := features.compact())
            if self._disk:
                self._disk.put(key, compact)
        return done

    def _together(self, images: dict[str, bytes], linear: Linear = plain) -> dict[str, ImageFeatures]:
        """Through the tower, those of one grid in one pass, as many as may share it."""
        done, by_grid = dict[str, ImageFeatures](), dict[tuple[int, int, int], dict[str, Patches]]()
        for key, data in images.items():
            patches = self._pixels.take(key, data)
            by_grid.setdefault(patches.grid, {})[key] = patches
        for group in by_grid.values():
            keys, patches_of = [*group], [*group.values()]
            size = max(1, PASS_PATCHES // len(patches_of[0].pixels))
            for n in range(0, len(keys), size):
                done |= zip(keys[n : n + size], self._run(patches_of[n : n + size], linear), strict=True)
        return done

    def _run(self, images: Sequence[Patches], linear: Linear = plain) -> list[ImageFeatures]:
        """Images of one grid, in one pass."""
        grid = images[0].grid
        pixels = torch.cat([image.pixels for image in images]).to(self._model.device)
        with self._model.timed("tower"):
            if self._packed:
                features = tower(self._visual, pixels, self._tables(grid), len(images), linear, self._opened)
            else:
                features = stock_features(self._model.stock.base_model, pixels, grid, len(images))
        self.forwards += len(images)
        return [ImageFeatures(grid, values) for values in features]


class NoVision:
    """In the place of Vision in a text model, which takes no images."""

    forwards = 0

    def __init__(self, model: Model) -> None:
        self._model = model

    def prefetch(self, chunks: Iterable[types.ImageChunk]) -> None:
        """Nothing; `features` says what is wrong."""

    def features(self, chunks: Sequence[types.ImageChunk], linear: Linear | None = None) -> list[ImageFeatures]:
        """None, of no chunks. Raises RequestError for any."""
        if chunks:
            _ = self._model.rule  # raises
        return []

    def uncached(self, chunks: Sequence[types.ImageChunk]) -> list[types.ImageChunk]:
        """All of them, so that `features` says what is wrong."""
        return list(chunks)


def _key(chunk: types.ImageChunk) -> str:
    return image_key(chunk.data)
