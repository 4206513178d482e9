"""Image features: bytes of an image chunk → what the frozen vision tower says of it, cached by content. Knows no text.

Exact as long as no LoRA touches the tower. On a CPU every image is its own forward pass: features are then a function
of the image alone, bit for bit, whatever else was asked for with it; elsewhere images of one size share a pass.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tinker import types
from torch import Tensor

from kshot_errors import RequestError
from kshot_images import open_image
from vlm.local.model import Model

CACHE_BYTES = 1 << 30


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


class Vision:
    """The tower of one model with its cache: least recently used images go first, beyond `cache_bytes`."""

    def __init__(self, model: Model, cache_bytes: int = CACHE_BYTES) -> None:
        self._model, self._limit, self._held = model, cache_bytes, 0
        self._cache: OrderedDict[bytes, ImageFeatures] = OrderedDict()
        self.forwards = 0  # images that went through the tower

    def features(self, chunks: Sequence[types.ImageChunk]) -> list[ImageFeatures]:
        """The features of each chunk, in order. Raises ImageError for broken bytes and RequestError where
        `expected_tokens` is given and differs from what this model's processor makes of the image."""
        keys = [hashlib.sha256(chunk.data).digest() for chunk in chunks]
        found = {key: self._cache[key] for key in keys if key in self._cache}
        missing = {key: chunk for key, chunk in zip(keys, chunks, strict=True) if key not in found}
        found.update(zip(missing, self._encode([chunk.data for chunk in missing.values()]), strict=True))
        for key, chunk in zip(keys, chunks, strict=True):
            self._check(chunk, found[key])
            self._keep(key, found[key])
        return [found[key] for key in keys]

    def _check(self, chunk: types.ImageChunk, features: ImageFeatures) -> None:
        if chunk.expected_tokens not in (None, features.tokens):
            raise RequestError(
                f"Expected {chunk.expected_tokens} tokens, got {features.tokens} from image: the client counted with "
                f"other processor settings than this model's {self._model.rule.settings}; vlm.image_chunk counts them"
            )

    def _keep(self, key: bytes, features: ImageFeatures) -> None:
        if key not in self._cache:
            self._held += features.bytes
        self._cache[key] = features
        self._cache.move_to_end(key)
        while self._held > self._limit:
            self._held -= self._cache.popitem(last=False)[1].bytes

    @torch.no_grad()
    def _encode(self, images: Sequence[bytes]) -> list[ImageFeatures]:
        if self._model.device.type == "cpu":
            return [f for data in images for f in self._tower(**self._pixels(data))]
        return self._grouped([self._pixels(data) for data in images])

    def _grouped(self, inputs: Sequence[dict[str, Tensor]]) -> list[ImageFeatures]:
        """Images of one size in one pass."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, one in enumerate(inputs):
            groups.setdefault(tuple(one["grids"][0].tolist()), []).append(number)
        done: dict[int, ImageFeatures] = {}
        for members in groups.values():
            together = {name: torch.cat([inputs[n][name] for n in members]) for name in ("pixels", "grids")}
            done.update(zip(members, self._tower(**together), strict=True))
        return [done[number] for number in range(len(inputs))]

    def _pixels(self, data: bytes) -> dict[str, Tensor]:
        made = self._model.rule.processor(images=[open_image(data)], return_tensors="pt")
        return {"pixels": made["pixel_values"], "grids": made["image_grid_thw"]}

    def _tower(self, pixels: Tensor, grids: Tensor) -> list[ImageFeatures]:
        device = self._model.device
        out = self._model.stock.get_image_features(pixels.to(device), grids.to(device), return_dict=True)
        self.forwards += len(grids)
        grid = [(int(t), int(h), int(w)) for t, h, w in grids.tolist()]
        layers = zip(*out.deepstack_features, strict=True) if out.deepstack_features else [()] * len(grid)
        return [  # clones, because a view would keep the whole pass in memory
            ImageFeatures(g, e.clone(), tuple(d.clone() for d in ds))
            for g, e, ds in zip(grid, out.pooler_output, layers, strict=True)
        ]
