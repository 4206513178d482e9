"""A trained classifier on DINOv2 as a folder: a linear head on frozen features, or LoRA with its head (`lora`)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from baselines.features import Encoder
from baselines.heads.inputs import Linear, Scaler
from baselines.lora import RECORD, WEIGHTS, LoraHeadClient, read_record
from kshot.errors import InputError, ModelError
from kshot.files import write_folder
from kshot.untrusted import check_regular

TENSORS = "mean", "deviation", "weights", "bias"


class Classifier(Protocol):
    """What gives scores to images. log_probs: whether they are log-probabilities; else they rank the classes."""

    n_classes: int
    log_probs: bool

    def scores(self, images: Sequence[bytes]) -> np.ndarray:
        """(N, n_classes) float64 of N JPEG or PNG files, higher is better. Raises ImageError, NotFiniteError."""


class LinearClassifier:
    """A linear head on frozen features. record: model, readout and size of the `Encoder`. Raises ModelError where the
    model has features of another size."""

    def __init__(self, linear: Linear, record: dict[str, Any], device: str = "cpu") -> None:
        self._linear, self.log_probs, self.n_classes = linear, linear.log_probs, len(linear.bias)
        self._encoder = Encoder(**record, device=device)
        if self._encoder.dim != len(linear.weights):
            dims = f"has {self._encoder.dim} features, and the head is of {len(linear.weights)}"
            raise ModelError(f"backbone {record['model']} {dims}: give the one that it was trained on")

    def scores(self, images: Sequence[bytes]) -> np.ndarray:
        return self._linear(self._encoder.features(images))


class LoraClassifier:
    """A trained `LoraHeadClient`."""

    log_probs = True

    def __init__(self, client: LoraHeadClient) -> None:
        self.scores, self.n_classes = client.class_log_probs, client.n_classes


def save_linear(folder: Path, linear: Linear, *, model: str, readout: str, size: int | None) -> None:
    """Write a new folder, complete or not there: the head's arrays and a record that names its encoder.

    Raises InputError where the folder exists. OSError.
    """
    arrays = linear.scaler.mean, linear.scaler.deviation, linear.weights, linear.bias
    record = {"model": model, "readout": readout, "size": size, "log_probs": linear.log_probs}

    def fill(new: Path) -> None:
        save_file({name: np.ascontiguousarray(each) for name, each in zip(TENSORS, arrays, strict=True)}, new / WEIGHTS)
        (new / RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")

    if folder.exists():
        raise InputError(f"{folder} exists; give another name")
    write_folder(folder, fill)


def load(folder: Path, model: str | None = None, device: str = "cpu") -> Classifier:
    """The classifier of a folder. model: where its backbone is now; None: where it was.

    Raises ModelError where it is missing or damaged; as `baselines.backbone.load` does.
    """
    try:
        record = read_record(folder)
        if "rank" in record:
            return LoraClassifier(LoraHeadClient.load(folder, device, model))
        log_probs = record.pop("log_probs")
        if {*record} != {"model", "readout", "size"}:
            raise ValueError(f"{RECORD} has other fields")
        mean, deviation, weights, bias = _arrays(folder)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise _damaged(folder, error) from error
    moved = record if model is None else record | {"model": model}
    return LinearClassifier(Linear(Scaler(mean, deviation), weights, bias, log_probs), moved, device)


def recorded_backbone(folder: Path) -> str:
    """The name of the backbone that a folder's classifier was trained on. Raises ModelError as `load` does."""
    try:
        return str(read_record(folder)["model"])
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(folder, error) from error


def _arrays(folder: Path) -> list[np.ndarray]:
    """The arrays of a linear head, in the order of TENSORS. Raises as `load_file` does, KeyError, and ValueError for
    those of no head."""
    check_regular(folder / WEIGHTS)
    stored = load_file(folder / WEIGHTS)
    mean, deviation, weights, bias = arrays = [stored[name] for name in TENSORS]
    if mean.ndim != 1 or bias.ndim != 1 or mean.shape != deviation.shape or weights.shape != (len(mean), len(bias)):
        raise ValueError("the shapes of its arrays do not fit")
    if other := next((name for name, each in zip(TENSORS, arrays, strict=True) if each.dtype.kind != "f"), None):
        raise ValueError(f"{other} has no floating-point numbers")
    for name, each in zip(TENSORS, (mean, deviation, weights, bias[bias != -np.inf]), strict=True):
        if not len(each) or not np.isfinite(each).all():  # of the bias -inf is one of a class without an image
            raise ValueError(f"{name} has numbers that are not finite")
    if not (deviation > 0).all():
        raise ValueError("deviation has numbers that are not positive")
    return arrays


def _damaged(folder: Path, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())
    return ModelError(f"{folder} holds no trained head, or a damaged one ({reason}); train it again")
