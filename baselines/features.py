"""Frozen features: images to what a readout takes of a backbone, computed once per image and setting.

Knows neither labels nor heads.
"""

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from baselines.backbone import load
from baselines.feature_store import Features, FeatureStore, fingerprint
from baselines.pixels import resized, size_groups

# Results of a batched product depend in their low bits on the size of the batch, so on a CPU every image is a forward
# of its own: its features are a function of the image alone, bit for bit. A GPU would idle at that.
CPU_BATCH, GPU_BATCH = 1, 64
WINDOW = 16  # batches whose images are decoded together, to find among them those of one size
THREADS = 16  # that decode while a GPU computes


class Encoder:
    """A frozen backbone as a function from images to features, with a memory.

    Args:
        model, readout: see `baselines.backbone.load`, which also lists what is raised.
        size: side in pixels to which every image is resized, square (DINOv2's own is 518); None keeps each image's own
            size, rounded to whole patches.
        device: "cpu" or "cuda".
        folder: keeps features for other processes and later ones; None: they live as long as this object.

    Raises:
        InputError: `size` is nothing that the model takes, `folder` cannot be written.
    """

    def __init__(
        self,
        model: str,
        *,
        readout: str = "cls",
        size: int | None = None,
        device: str = "cpu",
        folder: Path | None = None,
    ) -> None:
        self._backbone = backbone = load(model, device, readout)
        backbone.check_size(size)
        self._size, self._cpu = size, device == "cpu"
        self._known: Features = {}
        self._store = None
        self.forwards = 0  # images that went through the backbone
        if folder is not None:
            facts = {"readout": readout, "size": size, "mean": backbone.mean.tolist(), "std": backbone.std.tolist()}
            self._store = FeatureStore(folder, fingerprint(backbone.module, facts, device), backbone.dim)

    @property
    def dim(self) -> int:
        """Length D of a feature."""
        return self._backbone.dim

    def features(self, images: Sequence[bytes]) -> np.ndarray:
        """(N, D) float32, of N JPEG or PNG files; kept by the SHA-256 of their bytes.

        Raises:
            ImageError: bytes that are no image.
        """
        keys = [hashlib.sha256(image).digest() for image in images]
        new = {key: n for n, key in enumerate(keys) if key not in self._known}  # read again then: not all are held
        if self._store is None:
            self._encode(images, new)
        else:
            self._fill(self._store, images, new)
        return np.array([self._known[key] for key in keys], np.float32).reshape(len(keys), self.dim)

    def _fill(self, store: FeatureStore, images: Sequence[bytes], new: dict[bytes, int]) -> None:
        """Take from the store what is there and encode the rest into it, bucket by bucket; those that other processes
        are filling come last, when they are done."""
        if not self._cpu:  # one process has the device: all at once, in whole batches
            known = {key: row for bucket in {key[0] for key in new} for key, row in store.read(bucket).items()}
            self._known.update((key, known[key]) for key in new.keys() & known.keys())
            self._encode(images, {key: n for key, n in new.items() if key not in known})
        buckets: dict[int, dict[bytes, int]] = {}
        for key, n in new.items():
            buckets.setdefault(key[0], {})[key] = n
        later = [each for each in sorted(buckets) if not self._filled(store, each, images, buckets[each], wait=False)]
        for bucket in later:
            self._filled(store, bucket, images, buckets[bucket], wait=True)

    def _filled(
        self, store: FeatureStore, bucket: int, images: Sequence[bytes], wanted: dict[bytes, int], *, wait: bool
    ) -> bool:
        if wanted.keys() <= (found := store.read(bucket)).keys():
            self._known.update((key, found[key]) for key in wanted)
            return True
        with store.holding(bucket, wait=wait) as held:
            if held:
                found = store.read(bucket)  # another process may just have filled it
                self._known.update((key, found[key]) for key in wanted.keys() & found.keys())
                self._encode(images, {key: n for key, n in wanted.items() if key not in self._known})
                store.write(bucket, found | {key: self._known[key] for key in wanted})
        return held

    @torch.inference_mode()
    def _encode(self, images: Sequence[bytes], new: dict[bytes, int]) -> None:
        """Through the backbone and into the memory: {key: index into images}."""
        batch = CPU_BATCH if self._cpu else GPU_BATCH
        decoded = self._decoded(images, list(new.values()))
        keys = iter(new)
        while window := list(islice(decoded, WINDOW * batch)):
            named = list(islice(keys, len(window)))
            for group in size_groups(window):
                for start in range(0, len(group), batch):
                    members = group[start : start + batch]
                    pixels = self._backbone.normalised([window[n] for n in members])
                    features = self._backbone.features(self._backbone.module, pixels).cpu().numpy()
                    self._known.update((named[n], row) for n, row in zip(members, features, strict=True))
        self.forwards += len(new)

    def _decoded(self, images: Sequence[bytes], order: Sequence[int]) -> Iterator[np.ndarray]:
        """The images as pixels, in this order; for a GPU decoded ahead in threads, about one window."""
        prepare = partial(_pixels, images, self._backbone.patch, self._size)
        if self._cpu:
            yield from map(prepare, order)
            return
        with ThreadPoolExecutor(THREADS) as pool:
            waiting: deque[Future[np.ndarray]] = deque()
            for n in order:
                waiting.append(pool.submit(prepare, n))
                if len(waiting) > WINDOW * GPU_BATCH:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()


def _pixels(images: Sequence[bytes], patch: int, size: int | None, n: int) -> np.ndarray:
    return resized(images[n], patch, size)
