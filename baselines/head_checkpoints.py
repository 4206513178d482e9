"""Checkpoints of trained heads on disk: weights, optimizer and a record of what they are of. Knows no run in memory.

`tinker://<run>/weights/<name>` and `/sampler_weights/<name>` are folders below one state folder; nothing a name says
leads out of it. Written to a temporary folder, then renamed. The rules of names are those of the language model's
checkpoints. Frozen weights are not stored: the record names the backbone.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from baselines.lora import Shape
from kshot_errors import InputError, KshotError, ModelError, RequestError
from kshot_files import write_folder
from kshot_training import folder_of

WEIGHTS, OPTIMIZER, RECORD = "head.safetensors", "optimizer.safetensors", "kshot.json"
_RECORDED = {"model": str, "n_classes": int, "rank": int, "readout": str, "size": int | None}


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds. optimizer: the optimizer's tensors, or None where only weights were saved."""

    shape: Shape
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor] | None = None


def save(state: Path, path: str, checkpoint: Checkpoint) -> None:
    """Write a checkpoint. Raises RequestError where one of this name exists, KshotError where it cannot be written."""
    target = folder_of(state, path)
    if target.exists():
        raise RequestError(f"checkpoint {path} exists; give another name")
    try:
        write_folder(target, lambda folder: _write(folder, checkpoint))
    except OSError as error:
        reason = error.strerror or error
        raise KshotError(f"checkpoint {path} cannot be written to {state} ({reason}); make room there") from error


def load(state: Path, path: str) -> Checkpoint:
    """Read a checkpoint. Raises ModelError where there is none or it is damaged."""
    source = folder_of(state, path)
    if not source.is_dir():
        raise ModelError(f"checkpoint {path} does not exist in the state folder {str(state)!r}")
    try:
        record = json.loads((source / RECORD).read_text(encoding="utf-8"))
        optimizer = load_file(source / OPTIMIZER) if (source / OPTIMIZER).exists() else None
        return Checkpoint(_shape(record), load_file(source / WEIGHTS), optimizer)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError, InputError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ModelError(f"checkpoint {path} is damaged ({reason}); restore it, or train and save it again") from error


def _shape(record: Any) -> Shape:
    """The recorded shape, each value of its kind. Raises KeyError, TypeError or InputError for another record."""
    shape = Shape(**{name: record[name] for name in _RECORDED})
    for name, kind in _RECORDED.items():
        if not isinstance(getattr(shape, name), kind):
            raise TypeError(f"{name} is {getattr(shape, name)!r}")
    return shape


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    save_file(dict(checkpoint.weights), folder / WEIGHTS)
    if checkpoint.optimizer is not None:
        save_file(dict(checkpoint.optimizer), folder / OPTIMIZER)
    (folder / RECORD).write_text(json.dumps(asdict(checkpoint.shape), indent=2), encoding="utf-8")
