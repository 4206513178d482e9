"""Image features in a folder that outlives the process.

A file is good for a later run only if that run would compute the same bits, so its path names everything that features
depend on (`fingerprint`). Several processes may share a folder.
"""

import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from kshot.errors import ModelError
from kshot.files import STALE, facts_digest, tensor_digest, write_file
from kshot.untrusted import set_damaged_aside
from vlm.local.model.tower import ImageFeatures

FORMAT = 1  # of a file and of what is computed; another number leaves all old files unread
DISK_BYTES = 32 << 30
SHARE = 16  # the folder is looked through whenever this process has written one part in SHARE of the limit
LIBRARIES = ("torch", "torchvision", "transformers", "pillow")
_NAME = re.compile(
    r"\.?[0-9a-f]{64}\.safetensors(\.[0-9a-f]{12}\.tmp|\.damaged)?"
)  # of the files that are this module's


class DiskCache:
    """Features in <folder>/<fingerprint>/<2 hex digits>/<SHA-256 of the image>.safetensors.

    fingerprint: gives what the features depend on; asked for once, when first needed.
    limit: bytes of the whole folder; least recently used files go first. Each further process may exceed it by 1/SHARE.
    Raises ModelError where the folder cannot be written.
    """

    def __init__(self, folder: Path, fingerprint: Callable[[], str], limit: int = DISK_BYTES) -> None:
        self._folder, self._fingerprint, self._limit = folder, fingerprint, limit
        self._written: int | None = None  # bytes written since the folder was looked through
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            reason = f"feature cache folder {folder} cannot be written ({error.strerror})"
            raise ModelError(f"{reason}; name another, or none") from error

    def __contains__(self, key: str) -> bool:
        return self.path(key).exists()

    def touch(self, key: str) -> None:
        """Have it count as used now."""
        with suppress(OSError):  # another process has just removed it, or owns it
            os.utime(self.path(key))

    def path(self, key: str) -> Path:
        """Where the features of the image with this SHA-256 are or would be."""
        return self._version_folder / key[:2] / f"{key}.safetensors"

    def get(self, key: str) -> ImageFeatures | None:
        """None where there is no file, or a damaged one, which is set aside."""
        try:
            features = _decode(self.path(key).read_bytes())
        except OSError:
            return None
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError):
            set_damaged_aside(self.path(key))
            return None
        self.touch(key)
        return features

    def put(self, key: str, features: ImageFeatures) -> None:
        """Write the file, over one that is there. A full disk is a warning: the run does not need the file."""
        content, path = _encode(features), self.path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, content)
        except OSError as error:
            warnings.warn(f"image features are not kept in {self._folder}: {error.strerror}", stacklevel=2)
            return
        if self._written is None or self._written + len(content) > self._limit // SHARE:
            self._shrink()
            self._written = 0
        self._written += len(content)

    @cached_property
    def _version_folder(self) -> Path:
        return self._folder / self._fingerprint()

    def _shrink(self) -> None:
        """Leave room for what is written until the next look."""
        files = sorted(self._files(), key=lambda file: file[1].st_mtime_ns)
        excess = sum(stat.st_size for _, stat in files) - (self._limit - self._limit // SHARE)
        for path, stat in files:
            unfinished = path.suffix != ".safetensors"
            if time.time() - stat.st_mtime > STALE if unfinished else excess > 0:
                with suppress(OSError):
                    path.unlink(missing_ok=True)
                excess -= stat.st_size

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """What this module wrote, and nothing else that may lie in the folder."""
        for path in self._folder.glob("*/[0-9a-f][0-9a-f]/*"):
            if _NAME.fullmatch(path.name):
                with suppress(FileNotFoundError):
                    yield path, path.stat()


def fingerprint(visual: Any, processor: Any) -> str:
    """32 hex digits for all that an image's features depend on: the tower's weights and configuration, the processor's
    settings, the number format, the device, and the libraries between the bytes of an image and its features."""
    weight = next(visual.parameters())
    cuda = weight.device.type == "cuda"
    facts = {
        "format": FORMAT,
        "weights": tensor_digest(visual.state_dict()),
        "tower": {name: value for name, value in visual.config.to_dict().items() if name != "_name_or_path"},
        "processor": processor.to_dict(),
        "dtype": weight.dtype,
        "device": torch.cuda.get_device_name(weight.device) if cuda else torch.backends.cpu.get_cpu_capability(),
        "device_type": weight.device.type,
        "libraries": {name: version(name) for name in LIBRARIES},
    }
    return facts_digest(facts)


def _encode(features: ImageFeatures) -> bytes:
    tensors = {"grid": torch.tensor(features.grid), "values": features.values.contiguous()}
    check = torch.frombuffer(bytearray.fromhex(tensor_digest(tensors)), dtype=torch.uint8)
    return safetensors.torch.save({**tensors, "sha256": check})


def _decode(content: bytes) -> ImageFeatures:
    """Raises SafetensorError, KeyError, TypeError, ValueError or RuntimeError for anything but what `_encode` made."""
    tensors = safetensors.torch.load(content)
    check = bytes(tensors.pop("sha256").tolist())
    if check.hex() != tensor_digest(tensors):
        raise ValueError("the content is not what was written")
    time_, height, width = tensors["grid"].tolist()
    return ImageFeatures((time_, height, width), tensors["values"])
