"""Frozen features: images to the CLS tokens of a DINOv2 backbone, computed once per image.

Knows neither labels nor heads.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from baselines.backbone import check_size, cls_tokens, load
from baselines.pixels import resized, size_groups

# Results of a batched product depend in their low bits on the size of the batch, so on a CPU every image is a forward
# of its own: its features are a function of the image alone, bit for bit. A GPU would idle at that.
CPU_CHUNK, GPU_CHUNK = 1, 64


class Encoder:
    """A frozen backbone as a function from images to features, with a memory.

    Args:
        model: see `baselines.backbone.load`, which also lists what is raised.
        size: side in pixels to which every image is resized, square (DINOv2's own is 518); None keeps each image's own
            size, rounded to whole patches.
        device: "cpu" or "cuda".

    Raises:
        InputError: `size` is no multiple of the patch size.
    """

    def __init__(self, model: str, *, size: int | None = None, device: str = "cpu") -> None:
        self._backbone = load(model, device)
        check_size(size, self._backbone.patch)
        self._size = size
        self._chunk = CPU_CHUNK if device == "cpu" else GPU_CHUNK
        self._known: dict[bytes, np.ndarray] = {}

    @property
    def dim(self) -> int:
        """Length D of a feature."""
        return self._backbone.dim

    def features(self, images: Sequence[bytes]) -> np.ndarray:
        """(N, D) float32 CLS tokens after the final norm, of N JPEG or PNG files; kept by SHA-256 of the bytes.

        Raises:
            ImageError: bytes that are no image.
        """
        keys = [hashlib.sha256(image).digest() for image in images]
        new = {key: n for n, key in enumerate(keys) if key not in self._known}  # read again then: not all are held
        waiting = list(new)
        for start in range(0, len(waiting), self._chunk):
            chunk = waiting[start : start + self._chunk]
            self._known.update(zip(chunk, self._encode([images[new[key]] for key in chunk]), strict=True))
        return np.array([self._known[key] for key in keys], np.float32).reshape(len(keys), self.dim)

    @torch.inference_mode()
    def _encode(self, images: Sequence[bytes]) -> np.ndarray:
        pixels = [resized(image, self._backbone.patch, self._size) for image in images]
        features = np.empty((len(images), self.dim), np.float32)
        for group in size_groups(pixels):
            batch = self._backbone.normalised([pixels[i] for i in group])
            features[group] = cls_tokens(self._backbone.vit, batch).cpu().numpy()
        return features
