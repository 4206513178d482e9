"""Where a model's weights go: what a checkpoint's files hold, what is free on the devices, which module each one gets.

Weight files are read by their headers alone: a safetensors file is 8 bytes with the length of its header, the header
(JSON: name → dtype, shape, offsets), and the tensors. Only whole modules are placed, on CPU, CUDA or MPS devices:
nothing is offloaded to disk, or to the CPU beside a GPU.
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from kshot.errors import InputError, ModelError
from kshot.untrusted import is_beside, parse_json, read_file
from vlm.local.model.families import Family
from vlm.models import GGUF
from vlm.places import place_of

log = logging.getLogger("kshot")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
MAX_HEADER = 100 << 20  # bytes, as the format allows
LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class StoredTensor:
    """dtype: as the format writes it, such as BF16. file: the name of the one that holds it."""

    dtype: str
    shape: tuple[int, ...]
    file: str = ""

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
        if pickles := sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES):
            reason = f"has pickled weights ({pickles[0]}), but only safetensors are read"
            raise ModelError(f"checkpoint {name} {reason}; load it elsewhere and save it with save_pretrained")
        if ggufs := sorted(file.name for file in folder.glob("*.gguf")):
            raise ModelError(f"model {name} has its weights as GGUF ({ggufs[0]}); {GGUF}")
        reason = f"it has no weights as safetensors ({SINGLE} or {INDEX}), all that is read"
        raise ModelError(f"model {name} cannot be loaded: {reason}")
    try:
        files = sorted({str(file) for file in parse_json(read_file(folder / INDEX))["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{INDEX} of checkpoint {name} is broken ({error!r}); download it again") from error
    if outside := [file for file in files if not is_beside(folder, file)]:
        reason = f"names {outside[0]!r}, which is no file of its folder"
        raise ModelError(f"{INDEX} of checkpoint {name} {reason}; put its weights there, or download it again")
    return files


def _header(name: str, path: Path) -> dict[str, StoredTensor]:
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        text = file.read(length) if length <= MAX_HEADER else b""
    if LFS.startswith(start) and start:
        raise ModelError(f"{path.name} of checkpoint {name} is a Git LFS pointer; run `git lfs pull` in {path.parent}")
    # the hub's cache keeps the content elsewhere, and takes it for whole as long as it is there
    way_out = f"delete {path.resolve()} and download it again"
    try:
        entries = parse_json(text)
        entries.pop("__metadata__", None)
        tensors = {
            key: StoredTensor(entry["dtype"], tuple(entry["shape"]), path.name) for key, entry in entries.items()
        }
        size = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{path.name} of checkpoint {name} is no safetensors file; {way_out}") from error
    if (has := path.stat().st_size) != size:
        what = "cut short" if has < size else "broken"
        raise ModelError(f"checkpoint {name} is {what}: {path.name} has {has:,} of {size:,} bytes; {way_out}")
    return tensors


DEVICES = "cpu, cuda, cuda:N, mps or auto (all GPUs, or the CPU)"
_V1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"  # what a control group says where
_V2 = "memory.max", "memory.current", "inactive_file"
PACK = 4096  # positions of the largest training pass, which has a datum at least
LABELLED = 512  # of them, those whose logits are computed, about
STEPS = 100  # shares of the free memory that are tried, from the smallest


def sizes(
    tensors: Mapping[str, StoredTensor], layers: int, tied: bool, dtype: torch.dtype, family: Family
) -> list[int]:
    """Bytes of the weights in memory as `dtype`, by what stays together: vision tower, embeddings and what else there
    is; each decoder layer; final norm and head, unless that is tied to the embeddings."""
    of = [0] * (layers + 2)
    for name, tensor in tensors.items():
        part = _part(name, family)
        if part <= layers and not (tied and name.startswith(family.head)):
            of[part] += tensor.elements * dtype.itemsize
    return of


def _part(name: str, family: Family) -> int:
    """Where a weight counts in `sizes`."""
    layer = re.match(rf"{re.escape(family.layers)}\.(\d+)\.", name)
    return int(layer[1]) + 1 if layer else (-1 if name.startswith((family.head, family.norm)) else 0)


def training_sizes(
    tensors: Mapping[str, StoredTensor], config: Any, dtype: torch.dtype, family: Family, rank: int
) -> list[int]:
    """Bytes that training needs beside the weights, by part as in `sizes`, as far as it is known before anything is
    loaded: an adapter of this rank on every matrix of the layers and on the head, with its optimizer, and the largest
    pass."""
    text = config.get_text_config()
    layers = text.num_hidden_layers
    kept, logits = _pass_bytes(text, dtype)
    number = 4 * 4 + (0 if dtype == torch.float32 else 2 * dtype.itemsize)  # as Layout.run_bytes
    of = [0, *[kept] * layers, logits + rank * (text.hidden_size + text.vocab_size) * number]
    for name, tensor in tensors.items():
        if 0 < (part := _part(name, family)) <= layers and len(tensor.shape) > 1:
            *experts, rows, columns = tensor.shape
            of[part] += math.prod(experts) * rank * (rows + columns) * number
    return of


def ranks(place: str) -> list[str]:
    """The device of each process that a place means; of `auto` itself, which is one process on all GPUs. Raises
    InputError for what is no place, ModelError for a device that is not here."""
    if place == "auto":
        return [place]
    found = place_of(place)
    if found.kind == "ray":
        raise InputError(f"place {place!r} is one of a Ray cluster; sweeps are run there: kshot sweep --executor ray")
    every = [f"cuda:{n}" for n in range(torch.cuda.device_count())]
    names = (every or ["cuda"]) if found.kind == "all" else [*found.devices]
    for name in {*names}:
        devices(name)
    return names


def devices(device: str) -> list[torch.device]:
    """The devices that a name means: several only for `auto`. Raises ModelError for one that is not here."""
    count = torch.cuda.device_count()
    if device == "auto":
        return [torch.device("cuda", n) for n in range(count)] or [torch.device("cpu")]
    try:
        named = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"unknown device {device!r}; choose {DEVICES}") from error
    if named.type == "cuda" and (named.index or 0) >= count:
        raise ModelError(f"no device {device!r}: torch sees {count} CUDA devices here; choose {DEVICES}")
    if named.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError(f"no device {device!r}: torch sees no MPS device here; choose {DEVICES}")
    if named.type not in ("cpu", "cuda", "mps"):
        raise ModelError(f"device {device!r} is not supported; choose {DEVICES}")
    return [torch.device("cuda", named.index or 0)] if named.type == "cuda" else [torch.device(named.type)]


def free_bytes(device: torch.device) -> int:
    """What new tensors on a device can take."""
    if device.type != "cuda":  # MPS shares the memory of the CPU
        return int(min(psutil.virtual_memory().available, group_free_bytes()))
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def group_free_bytes(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """What the limits of the process's control groups (version 2 or 1, each with those above it) leave."""
    free = math.inf
    for line in own.read_text().splitlines() if own.is_file() else []:
        _, controllers, path = line.split(":", 2)
        top, names = (root / "memory", _V1) if controllers == "memory" else (root, _V2)
        group = top / path.lstrip("/")
        if controllers in ("", "memory"):
            free = min([free, *(_left(folder, *names) for folder in (group, *group.parents) if folder >= top)])
    return free


def _left(group: Path, limit: str, usage: str, cache: str) -> float:
    """The limit less what is in use; cached files are given up when memory is short."""
    try:
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / usage).read_text()) - int(statistics.get(cache, 0))
        return max(int((group / limit).read_text()) - used, 0)
    except (OSError, ValueError):  # no such group, or no limit ("max")
        return math.inf


def reserve(stock: Any, adapter_bytes: int, dtype: torch.dtype) -> int:
    """Bytes that a device needs beside weights: an adapter in training with its optimizer, and the largest pass, as far
    as it is known before."""
    text = stock.config.get_text_config()
    kept, logits = _pass_bytes(text, dtype)
    return adapter_bytes + text.num_hidden_layers * kept + logits


def _pass_bytes(text: Any, dtype: torch.dtype) -> tuple[int, int]:
    """What a layer keeps of PACK positions for the gradient, and logits of LABELLED of them."""
    active = getattr(text, "num_experts_per_tok", None) or 1
    wide = getattr(text, "intermediate_size", None) or 0
    inner = max(active * (getattr(text, "moe_intermediate_size", None) or 0), wide)
    count = getattr(text, "num_attention_heads", None) or 1
    heads = count * (getattr(text, "head_dim", None) or text.hidden_size // count)
    kept = (4 * text.hidden_size + 6 * heads + 3 * inner) * dtype.itemsize
    return PACK * kept, 3 * LABELLED * text.vocab_size * 4


def device_map(
    name: str,
    dtype: torch.dtype,
    size: Sequence[int],
    tied: bool,
    targets: Sequence[torch.device],
    free: Sequence[int],
    family: Family,
    training: Sequence[int] = (),
) -> dict[str, torch.device | int]:
    """Which device each module goes to; decoder layers in order, devices filled to about the same share of what is
    free on them. size: see `sizes`. training: what is needed beside, see `training_sizes`; where only the weights
    fit, that is said in the log. Raises ModelError where they do not, before any is read."""
    places = _evenly([*map(sum, zip(size, training, strict=True))], free) if training else None
    has = ", ".join(f"{bytes / 1e9:.1f} GB on {place}" for place, bytes in zip(targets, free, strict=True))
    if places is None and (places := _evenly(size, free)) and training:
        needed = f"{sum(training) / 1e9:.1f} GB beside its weights ({sum(size) / 1e9:.1f} GB)"
        why = f"an adapter in training and its largest pass ({PACK} positions) may not fit"
        log.warning("model %s: %s: by arithmetic they take %s, and free are %s", name, why, needed, has)
    if places is None:
        ways_out = ["a smaller model", *(["bfloat16"] if dtype.itemsize > 2 else [])]
        ways_out += ["`auto` to spread it over several GPUs"] if [t.type for t in targets] == ["cuda"] else []
        what = f"model {name} needs {sum(size) / 1e9:.1f} GB for its weights in {str(dtype).removeprefix('torch.')}"
        raise ModelError(f"{what}, but free are {has}; use {', or '.join(ways_out)}")
    if len(targets) == 1:
        return {"": targets[0]}
    # as numbers, because accelerate takes a main device out of a set of them: the order must not vary
    first, *layers, last = (targets[n].index for n in places)
    modules = dict.fromkeys(family.first, first) | {f"{family.layers}.{n}": device for n, device in enumerate(layers)}
    return {**modules, family.norm: last, family.head: first if tied else last}


def _evenly(blocks: Sequence[int], free: Sequence[int]) -> list[int] | None:
    """The device of each block, where all are filled to the smallest share of what is free that is enough."""
    shares = ([bytes * step // STEPS for bytes in free] for step in range(1, STEPS + 1))
    return next((places for share in shares if (places := _fill(blocks, share))), None)


def _fill(blocks: Sequence[int], room: Sequence[int]) -> list[int] | None:
    """The device of each block, in order; None where they do not fit."""
    left, device, places = list(room), 0, []
    for block in blocks:
        while device < len(left) and left[device] < block:
            device += 1
        if device == len(left):
            return None
        left[device] -= block
        places.append(device)
    return places
