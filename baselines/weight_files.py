"""Tensors by name from a file of weights: .pth and .pt, .safetensors, .onnx, or a folder as transformers saves it.

Runs nothing that a file holds, and reads nothing but what was named. Knows no layout and no architecture.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from baselines import weight_onnx
from kshot_errors import ModelError

MODEL_TYPES = ("dinov2", "dinov2_with_registers")
# What training scripts put a state dict under, beside an optimizer, an epoch, ...; DINOv2's own is the teacher's.
WRAPPERS = ("model", "state_dict", "teacher")


def read(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file or folder, on the CPU, as it is stored (of an .onnx file: those of its backbone).

    Raises:
        ModelError: it is not there, damaged, of another kind, or holds more than tensors.
    """
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise ModelError(
            f"checkpoint {path} does not exist; give {', '.join(READERS)} or a folder as transformers saves it"
        )
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ModelError(f"checkpoint {path} is of no known kind; give {', '.join(READERS)}")
    try:
        return reader(path)
    except ModelError:
        raise
    except Exception as error:  # torch, safetensors and onnx have no common exception
        reason = (str(error).splitlines() or [""])[0].rstrip(".:") or type(error).__name__
        raise ModelError(f"checkpoint {path} cannot be read ({reason}); download it again or give another") from error


def config(folder: Path) -> dict[str, Any] | None:
    """The config.json of a folder that transformers saved a DINOv2 to; None of every other path."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.get("model_type") in MODEL_TYPES else None


def _folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors, or of the files that model.safetensors.index.json names."""
    if config(folder) is None:
        types = " or ".join(MODEL_TYPES)
        raise ModelError(
            f"checkpoint {folder} has no config.json with model_type {types}; give a file or such a folder"
        )
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return read(folder / "model.safetensors")
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        beside = all(name == Path(name).name and name.endswith(".safetensors") for name in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"checkpoint {index} is no index of files of weights; save the model again") from error
    if not beside:
        raise ModelError(f"checkpoint {index} names files that are not .safetensors beside it; save the model again")
    return {name: tensor for file in files for name, tensor in read(folder / file).items()}


def _pickle(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch's own reasons advise to run what the file holds
        raise ModelError(
            f"checkpoint {path} is no pickle of tensors alone: damaged, TorchScript, or with other objects, which are "
            "not loaded; where you trust the file, load it and save its state_dict() as .safetensors"
        ) from error
    under = [key for key in WRAPPERS if isinstance(found, dict) and isinstance(found.get(key), dict)]
    if len(under) > 1:
        raise ModelError(f"checkpoint {path} has state dicts under {', '.join(under)}; save one of them alone")
    state = found[under[0]] if under else found
    if not isinstance(state, dict):
        raise ModelError(f"checkpoint {path} is a {type(state).__name__}; save the model's state_dict()")
    others = [str(key) for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if others:
        raise ModelError(f"checkpoint {path} has no tensors under {', '.join(others[:3])}; save a state_dict() alone")
    return state


READERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    ".pth": _pickle,
    ".pt": _pickle,
    ".safetensors": load_file,
    ".onnx": weight_onnx.read,
}
