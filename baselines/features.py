"""Frozen features of images: computed once per image and setting, kept in a folder that processes share.

A stored feature is good for a later run only if that run would compute the same bits, so the folder's name holds
everything that features depend on (`fingerprint`). Features are in buckets by the first byte of the image's SHA-256,
one file each, with a checksum; a process that fills a bucket holds its lock, and others fill other buckets meanwhile.
Nothing is evicted: a feature has a few KB, and the folder may be deleted at any time.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from filelock import FileLock, Timeout
from PIL import Image
from safetensors import SafetensorError
from torch import nn

from baselines.backbone import load
from kshot.errors import InputError, KshotError, NotFiniteError
from kshot.files import facts_digest, processor, tensor_digest, write_file
from kshot.images import image_key, open_image
from kshot.untrusted import set_damaged_aside

# Results of a batched product depend in their low bits on the size of the batch, so on a CPU every image is a forward
# of its own: its features are a function of the image alone, bit for bit. A GPU would idle at that.
CPU_BATCH, GPU_BATCH = 1, 64
WINDOW = 16  # batches whose images are decoded together, to find among them those of one size
THREADS = 16  # that decode while a GPU computes
FORMAT = 2  # of a file and of what is computed; another number leaves all old files unread
LIBRARIES = ("torch", "timm", "pillow")
KEY = 32  # bytes of a SHA-256

Features = dict[bytes, np.ndarray]


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
        self._memory: Features = {}
        self._store = None
        self.forwards = 0  # images that went through the backbone
        if folder is not None:
            facts = {"readout": readout, "size": size, "mean": backbone.mean.tolist(), "std": backbone.std.tolist()}
            self._store = FeatureStore(folder, fingerprint(backbone.module, facts, device), backbone.dim)

    @property
    def dim(self) -> int:
        """D, of a feature."""
        return self._backbone.dim

    def features(self, images: Sequence[bytes]) -> np.ndarray:
        """(N, D) float32, of N JPEG or PNG files; kept by the SHA-256 of their bytes.

        Raises:
            ImageError: bytes that are no image. NotFiniteError: a backbone that gives NaN.
        """
        keys = [bytes.fromhex(image_key(image)) for image in images]
        new = {key: n for n, key in enumerate(keys) if key not in self._memory}  # read again then: not all are held
        if self._store is None:
            self._encode(images, new)
        else:
            self._fill(self._store, images, new)
        return np.array([self._memory[key] for key in keys], np.float32).reshape(len(keys), self._backbone.dim)

    def _fill(self, store: "FeatureStore", images: Sequence[bytes], new: dict[bytes, int]) -> None:
        """Take from the store what is there and encode the rest into it, bucket by bucket; those that other processes
        are filling come last, when they are done."""
        if not self._cpu:  # one process has the device: all at once, in whole batches
            stored = {key: row for bucket in {key[0] for key in new} for key, row in store.read(bucket).items()}
            self._memory.update((key, stored[key]) for key in new.keys() & stored.keys())
            self._encode(images, {key: n for key, n in new.items() if key not in stored})
        buckets: dict[int, dict[bytes, int]] = {}
        for key, n in new.items():
            buckets.setdefault(key[0], {})[key] = n
        waiting = sorted(buckets)
        for wait in (False, True):
            waiting = [n for n in waiting if not self._fill_bucket(store, n, images, buckets[n], wait=wait)]

    def _fill_bucket(
        self, store: "FeatureStore", bucket: int, images: Sequence[bytes], wanted: dict[bytes, int], *, wait: bool
    ) -> bool:
        if wanted.keys() <= (stored := store.read(bucket)).keys():
            self._memory.update((key, stored[key]) for key in wanted)
            return True
        with store.lock(bucket, wait=wait) as held:
            if held:
                stored = store.read(bucket)  # another process may just have filled it
                self._memory.update((key, stored[key]) for key in wanted.keys() & stored.keys())
                self._encode(images, {key: n for key, n in wanted.items() if key not in self._memory})
                store.write(bucket, stored | {key: self._memory[key] for key in wanted})
        return held

    @torch.inference_mode()
    def _encode(self, images: Sequence[bytes], new: dict[bytes, int]) -> None:
        """Through the backbone and into the memory: {key: index into images}."""
        batch = CPU_BATCH if self._cpu else GPU_BATCH
        decoded = self._decoded(images, list(new.values()))
        keys = iter(new)
        while window := list(islice(decoded, WINDOW * batch)):
            window_keys = list(islice(keys, len(window)))
            for members in size_batches(window, batch):
                pixels = self._backbone.normalised([window[n] for n in members])
                features = self._backbone.features(self._backbone.module, pixels).cpu().numpy()
                if not np.isfinite(features).all():
                    raise NotFiniteError(self._backbone.name, "features")
                self._memory.update((window_keys[n], row) for n, row in zip(members, features, strict=True))
        self.forwards += len(new)

    def _decoded(self, images: Sequence[bytes], order: Sequence[int]) -> Iterator[np.ndarray]:
        """The images as pixels, in this order; for a GPU decoded ahead in threads, about one window."""

        def prepare(n: int) -> np.ndarray:
            return resized(images[n], self._backbone.patch, self._size)

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


# The store


class FeatureStore:
    """Features of one setting in <folder>/<fingerprint>/<2 hex digits>.safetensors.

    Raises InputError where the folder cannot be written.
    """

    def __init__(self, folder: Path, fingerprint: str, dim: int) -> None:
        self._folder, self._dim = folder / fingerprint, dim
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(folder, error) from error

    def read(self, bucket: int) -> Features:
        """What is stored of a bucket; nothing where there is no file, or a damaged one, which is set aside."""
        path = self._path(bucket)
        try:
            tensors = safetensors.torch.load_file(path)
            check = bytes(tensors.pop("sha256").tolist())
            keys, features = tensors["keys"].numpy(), tensors["features"].numpy()
            if check.hex() != tensor_digest(tensors) or keys.shape != (len(features), KEY):
                raise ValueError("the content is not what was written")
        except OSError:
            return {}
        except (SafetensorError, KeyError, TypeError, ValueError):
            set_damaged_aside(path)
            return {}
        return {key.tobytes(): row for key, row in zip(keys, features, strict=True)}

    def write(self, bucket: int, features: Features) -> None:
        """Replace a bucket; the caller has its lock. Raises KshotError where the disk is full or gone."""
        keys = torch.frombuffer(bytearray(b"".join(features)), dtype=torch.uint8).reshape(len(features), KEY)
        tensors = {"keys": keys, "features": torch.from_numpy(np.stack(list(features.values())).astype(np.float32))}
        check = torch.frombuffer(bytearray.fromhex(tensor_digest(tensors)), dtype=torch.uint8)
        try:
            write_file(self._path(bucket), safetensors.torch.save({**tensors, "sha256": check}))
        except OSError as error:
            reason = f"features cannot be written to {self._folder} ({error.strerror})"
            raise KshotError(f"{reason}; make room, then the same command goes on from there") from error

    @contextmanager
    def lock(self, bucket: int, *, wait: bool) -> Iterator[bool]:
        """Lock a bucket against other processes; without `wait` it is False where another process has it.

        Raises InputError where the folder, though it is there, cannot be written.
        """
        lock = FileLock(self._folder / f".{bucket:02x}.lock", blocking=wait)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        except OSError as error:
            raise _unwritable(self._folder, error) from error
        try:
            yield True
        finally:
            lock.release()

    def _path(self, bucket: int) -> Path:
        return self._folder / f"{bucket:02x}.safetensors"


def fingerprint(module: nn.Module, facts: Mapping[str, Any], device: str) -> str:
    """32 hex digits for all that a feature depends on: the module's weights, `facts` (JSON values), the device, the
    threads that share a product on a CPU, and the libraries between the bytes of an image and its feature."""
    cuda = device.startswith("cuda")
    cpu = [torch.backends.cpu.get_cpu_capability(), processor()]
    depends = {
        "format": FORMAT,
        "module": _structure(module),
        "weights": tensor_digest(module.state_dict()),
        "device": torch.cuda.get_device_name(device) if cuda else cpu,
        "threads": 0 if cuda else torch.get_num_threads(),
        "libraries": {name: version(name) for name in LIBRARIES},
        **facts,
    }
    return facts_digest(depends)


def _unwritable(folder: Path, error: OSError) -> InputError:
    return InputError(f"feature folder {folder} cannot be written ({error.strerror}); name another with KSHOT_CACHE")


def _structure(module: nn.Module) -> list[tuple[str, str, list[str]]]:
    """What weights do not tell: each part's name, its type and its own settings, as the number of heads."""
    return [
        (name, type(part).__name__, sorted(f"{key} {value}" for key, value in vars(part).items() if _is_plain(value)))
        for name, part in module.named_modules()
    ]


def _is_plain(value: object) -> bool:
    """Whether its text is the same in every process."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


# Pixels


def whole_patches(side: int, patch: int) -> int:
    """The multiple of `patch` nearest to `side` pixels, at least one patch; halves go up."""
    return max(1, (2 * side + patch) // (2 * patch)) * patch


def resized(image: bytes, patch: int, size: int | None = None) -> np.ndarray:
    """The whole image as (height, width, 3) uint8, bicubic with antialiasing, never cropped.

    Each side goes to its nearest multiple of `patch`; with `size` both sides become `size`, whatever the aspect.
    """
    decoded = open_image(image)
    width, height = (whole_patches(side, patch) for side in decoded.size) if size is None else (size, size)
    # Pillow's bicubic filter widens with the reduction: it antialiases always.
    return np.asarray(decoded.resize((width, height), Image.Resampling.BICUBIC))


def size_batches(pixels: Sequence[np.ndarray], limit: int) -> list[list[int]]:
    """Indices of arrays of one shape, at most `limit` together: what one batched forward can take."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, array in enumerate(pixels):
        groups.setdefault(array.shape, []).append(index)
    return [group[n : n + limit] for group in groups.values() for n in range(0, len(group), limit)]


class PixelCache:
    """Resized images by the SHA-256 of their bytes, up to `limit` bytes of pixels.

    A full cache stops taking: training goes over the same images in ever new order, where throwing out the oldest
    would lose each image just before it is needed again.
    """

    def __init__(self, patch: int, size: int | None = None, *, limit: int = 1 << 29) -> None:
        self._patch, self._size, self._room = patch, size, limit
        self._pixels: dict[str, np.ndarray] = {}

    def __call__(self, image: bytes) -> np.ndarray:
        """`resized(image)`, from memory if it was kept. The array is shared: do not write to it."""
        key = image_key(image)
        if key in self._pixels:
            return self._pixels[key]
        pixels = resized(image, self._patch, self._size)
        if pixels.nbytes <= self._room:
            self._room -= pixels.nbytes
            self._pixels[key] = pixels
        return pixels
