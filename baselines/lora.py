"""LoRA and a linear head on a frozen backbone: the module of the baseline that trains, from pixels to logits.

Knows neither images' bytes nor requests nor an optimizer. Every random number comes from `seed`, and the global
generators are left as they were.

TODO An image and its class as the training API writes them: a sequence of one position, whose vocabulary is the classes.

Knows no model and decodes no image.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import tinker
import torch
from peft import LoraConfig, inject_adapter_in_model
from tinker import types
from torch import Tensor, nn

from baselines.backbone import Backbone, load
from baselines.features import size_groups
from kshot.errors import ImageError, InputError, ModelError, RequestError

# ---- LoRA and a linear head on a frozen backbone: the module of the baseline that trains, from pixels to logits.

ALPHA = 32
# Images in one forward, at most. Fixed, since the low bits of a batched product depend on the size of the batch.
CHUNK = 32


@dataclass(frozen=True)
class Shape:
    """What a head is made for; weights fit heads of one shape alone.

    model, readout: see `baselines.backbone.load`. n_classes: at least 2. rank: of LoRA, at least 1. size: side in
    pixels to which every image is resized, square; None keeps each image's own size, rounded to whole patches.

    Raises:
        InputError: n_classes or rank out of range.
    """

    model: str
    n_classes: int
    rank: int = 32
    readout: str = "cls"
    size: int | None = None

    def __post_init__(self) -> None:
        if self.n_classes < 2 or self.rank < 1:
            raise InputError(f"{self.n_classes} classes at LoRA rank {self.rank}; give at least 2 classes and rank 1")


class LoraHead:
    """A backbone with LoRA adapters and a linear head on its feature; untrained, it predicts uniformly.

    The head starts at zero, so the first step moves the head alone. LoRA's A is drawn from `seed` (PEFT's Kaiming
    uniform), B starts at zero; alpha is 32 at any rank, dropout 0.

    Args:
        device: see `baselines.backbone.load`, which also lists what is raised. seed: 0 to 2^63 - 1.

    Raises:
        InputError: the size does not fit the model, or seed out of range. ModelError: the model has no blocks with
            linear layers, or computes past some of them.
    """

    def __init__(self, shape: Shape, *, seed: int, device: str = "cpu") -> None:
        if not 0 <= seed < 2**63:
            raise InputError(f"seed {seed} must be a whole number from 0 to 2^63 - 1")
        self.shape, self.backbone = shape, load(shape.model, device, shape.readout)
        self.backbone.check_size(shape.size)
        self._adapted = _adapted(self.backbone, shape.rank, seed)
        self._linear = nn.utils.skip_init(nn.Linear, self.backbone.dim, shape.n_classes, device=device)
        for parameter in self._linear.parameters():
            nn.init.zeros_(parameter)

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes: of the adapters by their names in timm's module, and of the head as
        head.weight and head.bias."""
        named = (*self._adapted.named_parameters(), *self._linear.named_parameters(prefix="head"))
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    def logits(self, pixels: Sequence[np.ndarray]) -> Iterator[tuple[list[int], Tensor]]:
        """(indices, (B, n_classes) logits) of arrays (H, W, 3) uint8: those of one size together, CHUNK at a time."""
        for group in size_groups(pixels):
            for start in range(0, len(group), CHUNK):
                members = group[start : start + CHUNK]
                batch = self.backbone.normalised([pixels[n] for n in members])
                yield members, self._linear(self.backbone.features(self._adapted, batch))

    def snapshot(self) -> "LoraHead":
        """The head with its numbers as they are now: what is trained is copied, what is frozen shared."""
        other, frozen = copy.copy(self), (p for p in self._adapted.parameters() if not p.requires_grad)
        other._adapted, other._linear = copy.deepcopy((self._adapted, self._linear), {id(p): p for p in frozen})
        return other

    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Take the numbers of another head of this shape, named as `trained` names them.

        Raises:
            ModelError: other tensors; nothing is changed then.
        """
        own = self.trained()
        check_tensors("the head", own, weights)
        for name, parameter in own.items():
            parameter.detach().copy_(weights[name])


def check_tensors(what: str, wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raises ModelError unless both have the same names, shapes and dtypes."""
    expected, found = ({name: (t.shape, t.dtype) for name, t in each.items()} for each in (wanted, given))
    if wrong := sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name)):
        raise ModelError(f"checkpoint does not fit {what} in {len(wrong)} tensors: first {wrong[0]!r}")


def _adapted(backbone: Backbone, rank: int, seed: int) -> nn.Module:
    """The backbone with LoRA (Hu et al. 2021, arXiv:2106.09685) on every linear layer of its blocks."""
    module = backbone.copy()
    layers = ((name, layer) for name, layer in module.named_modules() if name.startswith("blocks."))
    targets = [name for name, layer in layers if isinstance(layer, nn.Linear)]
    if not targets:
        way_out = "use a vision transformer of timm, such as DINOv2"
        raise ModelError(f"model {backbone.name!r} has no blocks with linear layers to put LoRA on; {way_out}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=targets), module)
    _check_reached(backbone, module, targets)
    return module


def _check_reached(backbone: Backbone, module: nn.Module, layers: Sequence[str]) -> None:
    """Raises ModelError where the model does not call one of its layers but uses its weight, as the EVA models of timm
    do: an adapter there would have no effect."""
    unreached = set(layers)
    hooks = [
        module.get_submodule(name).register_forward_hook(lambda *_, name=name: unreached.discard(name))
        for name in layers
    ]
    height, width = backbone.fixed or (backbone.patch, backbone.patch)
    with torch.no_grad():
        backbone.features(module, torch.zeros(1, 3, height, width, device=backbone.mean.device))
    for hook in hooks:
        hook.remove()
    if unreached:
        first = min(unreached)
        raise ModelError(
            f"model {backbone.name!r} computes past {first}, where LoRA then does nothing; use a DINOv2 model"
        )


# ---- An image and its class as the training API writes them: a sequence of one position, whose vocabulary is the

FIELDS = ("target_tokens", "weights")
Format = Literal["png", "jpeg"]


class Item(NamedTuple):
    """A datum as the loss reads it."""

    image: bytes
    label: int
    weight: float


def datum(image: bytes, label: int) -> tinker.Datum:
    """Train the class index `label` for a JPEG or PNG file: one image, one target, weight 1.

    Raises:
        ImageError: bytes of another kind.
    """
    targets = tinker.TensorData.from_numpy(np.array([label], np.int64))
    return tinker.Datum(model_input=question(image), loss_fn_inputs={"target_tokens": targets})


def question(image: bytes) -> tinker.ModelInput:
    """The prompt that asks for the class of a JPEG or PNG file. Raises ImageError for bytes of another kind."""
    chunk = types.ImageChunk(data=image, format=_format(image), expected_tokens=1)
    return tinker.ModelInput(chunks=[chunk])


def items_of(data: Sequence[tinker.Datum], n_classes: int) -> list[Item]:
    """The data as the loss reads them.

    Raises:
        RequestError: no data, or a datum that is not one image with one target (and one weight). ImageError: an image
            that is neither JPEG nor PNG. Both name the datum by its number.
    """
    if not data:
        raise RequestError("no data given; a forward pass needs at least one datum")
    items = []
    for number, each in enumerate(data):
        with named(f"datum {number}"):
            items.append(_item(each, n_classes))
    return items


def image_of(given: tinker.ModelInput) -> bytes:
    """The file of a prompt's one image. Raises RequestError for any other prompt, ImageError for bytes of no image."""
    chunks = given.chunks
    if len(chunks) != 1 or not isinstance(chunks[0], types.ImageChunk):
        kinds = ", ".join(type(chunk).__name__ for chunk in chunks) or "nothing"
        raise RequestError(f"a classifier's input is exactly one ImageChunk, got {kinds}")
    chunk = chunks[0]
    if chunk.expected_tokens not in (None, 1):
        raise RequestError(f"an image is 1 position to a classifier, expected_tokens is {chunk.expected_tokens}")
    if (format := _format(chunk.data)) != chunk.format:
        raise RequestError(f"the image's format is given as {chunk.format}, its bytes are {format}")
    return chunk.data


@contextmanager
def named(what: str) -> Iterator[None]:
    """Put `what` before the message of an error about a request or an image."""
    try:
        yield
    except (RequestError, ImageError) as error:
        raise type(error)(f"{what}: {error}") from error


def _format(image: bytes) -> Format:
    """The format that an image's first bytes say, as every decoder tells it."""
    if image.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if image.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    raise ImageError("an image is neither JPEG nor PNG; save it as one of them")


def _item(datum: tinker.Datum, n_classes: int) -> Item:
    fields = datum.loss_fn_inputs
    if unknown := sorted(set(fields) - set(FIELDS)):
        raise RequestError(f"cross_entropy reads {' and '.join(FIELDS)}, this one also has {unknown}; drop them")
    if "target_tokens" not in fields:
        raise RequestError("target_tokens, the class index, is missing")
    if fields["target_tokens"].dtype != "int64":
        raise RequestError(f"target_tokens must be int64, got {fields['target_tokens'].dtype}")
    label = int(_number("target_tokens", fields["target_tokens"]))
    if not 0 <= label < n_classes:
        raise RequestError(
            f"target {label} is not one of {n_classes} classes; class indices go from 0 to {n_classes - 1}"
        )
    weight = _number("weights", fields["weights"]) if "weights" in fields else 1.0
    return Item(image_of(datum.model_input), label, weight)


def _number(name: str, data: tinker.TensorData) -> float:
    """The one number of a field. Class indices are far below 2^53, so a float holds them."""
    shape = data.shape if data.sparse_crow_indices is not None else list(data.to_numpy().shape)
    if data.sparse_crow_indices is not None or shape != [1]:
        raise RequestError(f"{name} must be one number, of shape [1], got shape {shape}")
    value = float(data.to_numpy()[0])
    if not math.isfinite(value):
        raise RequestError(f"{name} is {value}, not a finite number")
    return value
