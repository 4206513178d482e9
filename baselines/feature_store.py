"""Features in a folder that outlives the process and that several processes fill together. Computes none.

A stored feature is good for a later run only if that run would compute the same bits, so the folder's name holds
everything that features depend on (`fingerprint`). Features lie in buckets by the first byte of the image's SHA-256,
one file each; whoever fills a bucket holds its lock, and others fill other buckets meanwhile. Nothing is thrown away:
a feature has a few KB, and the folder may be deleted at any time.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import nn

from kshot_errors import InputError, KshotError
from kshot_files import write_file
from kshot_machine import processor

FORMAT = 1  # of a file and of what is computed; another number leaves all old files unread
LIBRARIES = ("torch", "timm", "pillow")
KEY = 32  # bytes of a SHA-256

Features = dict[bytes, np.ndarray]


class FeatureStore:
    """Features of one setting in <folder>/<fingerprint>/<2 hex digits>.safetensors.

    Raises InputError where the folder cannot be written.
    """

    def __init__(self, folder: Path, fingerprint: str, dim: int) -> None:
        self._place, self._dim = folder / fingerprint, dim
        try:
            self._place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(folder, error) from error

    def read(self, bucket: int) -> Features:
        """What is stored of a bucket; nothing where there is no file, or a damaged one."""
        try:
            tensors = safetensors.numpy.load_file(self._path(bucket))
            keys, features = tensors["keys"], tensors["features"]
        except (OSError, SafetensorError, KeyError):
            return {}
        if keys.shape != (len(features), KEY) or features.shape != (len(keys), self._dim):
            return {}
        return {key.tobytes(): row for key, row in zip(keys, features, strict=True)}

    def write(self, bucket: int, features: Features) -> None:
        """Replace a bucket; the caller holds it. Raises KshotError where the disk is full or gone."""
        keys = np.frombuffer(b"".join(features), np.uint8).reshape(len(features), KEY)
        tensors: dict[str, np.ndarray] = {
            "keys": keys,
            "features": np.stack(list(features.values())).astype(np.float32),
        }
        try:
            write_file(self._path(bucket), safetensors.numpy.save(tensors))
        except OSError as error:
            reason = f"features cannot be written to {self._place} ({error.strerror})"
            raise KshotError(f"{reason}; make room, then the same command goes on from there") from error

    @contextmanager
    def holding(self, bucket: int, *, wait: bool) -> Iterator[bool]:
        """Hold a bucket against other processes; without `wait` it is False where another one holds it.

        Raises InputError where the folder, though it is there, cannot be written.
        """
        lock = FileLock(self._place / f".{bucket:02x}.lock", blocking=wait)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        except OSError as error:
            raise _unwritable(self._place, error) from error
        try:
            yield True
        finally:
            lock.release()

    def _path(self, bucket: int) -> Path:
        return self._place / f"{bucket:02x}.safetensors"


def fingerprint(module: nn.Module, facts: Mapping[str, Any], device: str) -> str:
    """32 hex digits for all that a feature depends on: the module's weights, `facts` (JSON values), the device, the
    threads that share a product on a CPU, and the libraries between the bytes of an image and its feature."""
    cuda = device.startswith("cuda")
    depends = {
        "format": FORMAT,
        "module": _structure(module),
        "weights": _digest(module.state_dict()),
        "device": torch.cuda.get_device_name(device)
        if cuda
        else [torch.backends.cpu.get_cpu_capability(), processor()],
        "threads": 0 if cuda else torch.get_num_threads(),
        "libraries": {name: version(name) for name in LIBRARIES},
        **facts,
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:32]


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


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes, number formats and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
