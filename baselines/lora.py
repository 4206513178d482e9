"""LoRA and a linear head on a frozen backbone: the module of the baseline that trains, from pixels to logits.

Knows neither images' bytes nor requests nor an optimizer. Every random number comes from `seed`, and the global
generators are left as they were.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from baselines.backbone import Backbone, load
from baselines.pixels import size_groups
from kshot_errors import InputError, ModelError

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
