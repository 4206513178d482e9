"""The weight files of a checkpoint's folder, by their headers: all there, whole, and what they hold. Reads no weight.

A safetensors file is 8 bytes with the length of its header, the header (JSON: name → dtype, shape, offsets), and the
tensors. Knows no architecture and no device.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kshot_errors import ModelError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
MAX_HEADER = 100 << 20  # bytes, as the format allows
LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class StoredTensor:
    """dtype: as the format writes it, such as BF16."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def stored_tensors(name: str, folder: Path) -> dict[str, StoredTensor]:
    """What a whole checkpoint holds. Raises ModelError, with the model's name, where files are missing or broken."""
    files = _files(name, folder)
    missing = sorted(file for file in files if not (folder / file).is_file())
    if missing:
        count = f"{len(missing)} of {len(files)} weight files are missing, first {missing[0]}"
        raise ModelError(f"checkpoint {name} is incomplete: {count}; download it again")
    return {key: tensor for file in files for key, tensor in _header(name, folder / file).items()}


def _files(name: str, folder: Path) -> list[str]:
    """The names that the folder says its weights have, as transformers chooses them."""
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if not (folder / INDEX).is_file():
        raise ModelError(_no_weights(name, folder))
    try:
        return sorted({str(file) for file in json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{INDEX} of checkpoint {name} is broken ({error!r}); download it again") from error


def _no_weights(name: str, folder: Path) -> str:
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        way_out = "load it elsewhere and save it with save_pretrained"
        return f"checkpoint {name} has pickled weights ({pickles[0]}), but only safetensors are read; {way_out}"
    return f"model {name} cannot be loaded: it has no weights as safetensors ({SINGLE} or {INDEX}), all that is read"


def _header(name: str, path: Path) -> dict[str, StoredTensor]:
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        text = file.read(length) if length <= MAX_HEADER else b""
    if LFS.startswith(start) and start:
        raise ModelError(f"{path.name} of checkpoint {name} is a Git LFS pointer; run `git lfs pull` in {path.parent}")
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        tensors = {key: StoredTensor(entry["dtype"], tuple(entry["shape"])) for key, entry in entries.items()}
        size = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{path.name} of checkpoint {name} is no safetensors file; {_again(path)}") from error
    _check_size(name, path, size)
    return tensors


def _check_size(name: str, path: Path, size: Any) -> None:
    has = path.stat().st_size
    if has != size:
        what = "cut short" if has < size else "broken"
        raise ModelError(f"checkpoint {name} is {what}: {path.name} has {has:,} of {size:,} bytes; {_again(path)}")


def _again(path: Path) -> str:
    """The hub's cache keeps the content elsewhere, and takes it for whole as long as it is there."""
    return f"delete {path.resolve()} and download it again"
