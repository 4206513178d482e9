"""Image features: bytes of an image chunk → what the vision tower says of it, cached by content. Knows no text.

Exact as long as no LoRA touches the tower; with LoRA on it, `live` computes them anew. On a CPU every image is its own
forward pass: features are then a function of the image alone, bit for bit, whatever else was asked for with it;
elsewhere images of one size share a pass.
"""

import hashlib
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tinker import types

from kshot_errors import RequestError
from vlm.local.feature_cache import ImageFeatures, MemoryCache, device_limit, memory_limit
from vlm.local.feature_files import DISK_BYTES, DiskCache, fingerprint
from vlm.local.model import Model
from vlm.local.pixels import Patches, PixelLoader, spare_threads
from vlm.local.tower import Linear, plain, tower

PASS_PATCHES = 1 << 15  # of images that share a pass: activations of about 1 GB in the largest tower in bfloat16


class Vision:
    """The tower of one model with its caches.

    cache_bytes: of features in the host's memory; a quarter of it, at most 16 GiB, unless given. Least recently used
        ones go first.
    device_bytes: of features in a GPU's memory too, as copying them there waits for its work; a sixteenth of it, none
        on other devices, unless given.
    disk: a folder that keeps features for later processes, up to disk_bytes.
    threads: that decode ahead (`prefetch`); as many as the machine can spare unless given.
    Raises ModelError where the folder cannot be written.
    """

    def __init__(
        self,
        model: Model,
        cache_bytes: int | None = None,
        disk: Path | None = None,
        *,
        device_bytes: int | None = None,
        disk_bytes: int = DISK_BYTES,
        threads: int | None = None,
    ) -> None:
        self._model = model
        self._memory = MemoryCache(memory_limit() if cache_bytes is None else cache_bytes)
        self._near = MemoryCache(device_limit(model.device) if device_bytes is None else device_bytes)
        known = partial(fingerprint, self._visual, model.rule.processor)
        self._disk = None if disk is None else DiskCache(disk, known, disk_bytes)
        self._pixels = PixelLoader(model.rule, spare_threads(model.device) if threads is None else threads)
        self.forwards = 0  # images that went through the tower

    def prefetch(self, chunks: Iterable[types.ImageChunk]) -> None:
        """Begin to decode the images that a later `features` or `live` will ask for. From any thread; raises nothing
        about images; does nothing where no thread is spare or too many wait already."""
        images = {_key(chunk): chunk for chunk in chunks} if self._pixels.threads else {}
        for key, chunk in images.items():
            if not self._kept(key):
                self._pixels.start(key, chunk.data)

    def features(self, chunks: Sequence[types.ImageChunk]) -> list[ImageFeatures]:
        """The features of each chunk, in order, on the model's device. Raises ImageError for broken bytes and
        RequestError where `expected_tokens` is given and differs from what this model's processor makes of the
        image."""
        keys = [_key(chunk) for chunk in chunks]
        images = dict(zip(keys, chunks, strict=True))
        found = {key: layers for key in images if (layers := self._near.get(key) or self._known(key))}
        found |= self._encode({key: chunk.data for key, chunk in images.items() if key not in found})
        ready = {key: layers.on(self._model.device) for key, layers in found.items()}
        for key, layers in ready.items():
            if self._near.limit and key not in self._near:
                self._near.put(key, layers.kept(host=False))
        for key, chunk in zip(keys, chunks, strict=True):
            self._check(chunk, ready[key].tokens)
        return [ready[key] for key in keys]

    def unseen(self, chunks: Iterable[types.ImageChunk]) -> list[types.ImageChunk]:
        """Those whose features no cache has; the others count as used now, and stay while new ones come."""
        keys = [(chunk, _key(chunk)) for chunk in chunks]
        for _, key in keys if self._disk else ():
            self._disk.touch(key)  # type: ignore[union-attr]
        return [chunk for chunk, key in keys if not self._kept(key)]

    def live(self, chunks: Sequence[types.ImageChunk], linear: Linear) -> list[ImageFeatures]:
        """The same from `tower` with `linear`, with the graph of their gradients and past all caches of features."""
        images = {_key(chunk): chunk.data for chunk in chunks}
        patches = {key: self._pixels.take(key, data) for key, data in images.items()}
        for chunk in chunks:
            self._check(chunk, self._tokens(patches[_key(chunk)]))
        ready: dict[bytes, ImageFeatures] = {}
        for keys in _groups(patches):
            layers = self._run([patches[key] for key in keys], linear)
            ready |= {key: each.on(self._model.device) for key, each in zip(keys, layers, strict=True)}
        return [ready[_key(chunk)] for chunk in chunks]

    @property
    def _visual(self) -> Any:
        return self._model.stock.model.visual

    def _kept(self, key: bytes) -> bool:
        return key in self._near or key in self._memory or bool(self._disk and key in self._disk)

    def _known(self, key: bytes) -> ImageFeatures | None:
        layers = self._memory.get(key)
        if layers is None and self._disk and (layers := self._disk.get(key)):
            self._memory.put(key, layers.kept())
        if layers is not None:
            self._pixels.drop(key)
        return layers

    @torch.inference_mode(False)  # kept for passes with gradients too
    @torch.no_grad()
    def _encode(self, images: dict[bytes, bytes], together: bool | None = None) -> dict[bytes, ImageFeatures]:
        """Through the tower and into the caches. together: images of one size in one pass; unless on a CPU."""
        if together if together is not None else self._model.device.type != "cpu":
            patches = {key: self._pixels.take(key, data) for key, data in images.items()}
            passes = [{key: patches[key] for key in keys} for keys in _groups(patches)]
            done = {k: v for each in passes for k, v in zip(each, self._run([*each.values()]), strict=True)}
        else:
            done = {key: self._run([self._pixels.take(key, data)])[0] for key, data in images.items()}
        for key, layers in done.items():
            self._keep(key, layers.kept())
        return done

    def _keep(self, key: bytes, layers: ImageFeatures) -> None:
        self._pixels.drop(key)  # other requests may wait for it
        self._memory.put(key, layers)
        if self._disk:
            self._disk.put(key, layers)

    def _run(self, images: Sequence[Patches], linear: Linear = plain) -> list[ImageFeatures]:
        """Images of one grid, in one pass."""
        grid = images[0].grid
        pixels = torch.cat([image.pixels for image in images]).to(self._model.device)
        embeds, deepstack = tower(self._visual, pixels, grid, len(images), linear)
        self.forwards += len(images)
        return [ImageFeatures(grid, values) for values in torch.stack((embeds, *deepstack), 1)]

    def _tokens(self, patches: Patches) -> int:
        return len(patches.pixels) // self._visual.spatial_merge_size**2

    def _check(self, chunk: types.ImageChunk, tokens: int) -> None:
        if chunk.expected_tokens not in (None, tokens):
            raise RequestError(
                f"Expected {chunk.expected_tokens} tokens, got {tokens} from image: the client counted with "
                f"other processor settings than this model's {self._model.rule.settings}; vlm.image_chunk counts them"
            )


def _key(chunk: types.ImageChunk) -> bytes:
    return hashlib.sha256(chunk.data).digest()


def _groups(patches: dict[bytes, Patches]) -> list[list[bytes]]:
    """Keys of images of one grid, as many as may share a pass."""
    by_grid: dict[tuple[int, int, int], list[bytes]] = {}
    for key, each in patches.items():
        by_grid.setdefault(each.grid, []).append(key)
    groups = []
    for keys in by_grid.values():
        size = max(1, PASS_PATCHES // len(patches[keys[0]].pixels))
        groups += [keys[n : n + size] for n in range(0, len(keys), size)]
    return groups
