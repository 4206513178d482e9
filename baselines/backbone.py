"""Loads a backbone of timm by name, folder or file, once per process, and turns pixels into its feature.

The loaded module is shared, frozen and in eval mode.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import VisionTransformer
from timm.models.eva import Eva
from torch import Tensor, nn

from baselines import nano, weights
from baselines.hub import COMMIT, HUB, hub_id_of
from kshot.errors import InputError, ModelError, UnknownNameError

TRANSFORMERS = (VisionTransformer, Eva)  # those that take any number of patches: their position embedding is resampled
STRIDE = 32  # of a convolutional network that does not state its own


class Readout(NamedTuple):
    """What is joined into a feature: the CLS tokens of the last `blocks` blocks, and with `mean` the mean of the last
    one's patch tokens; all after the final norm."""

    blocks: int
    mean: bool


# The linear evaluation of DINOv2 tries these four (Oquab et al. 2023, arXiv:2304.07193, and its published code).
READOUTS = {
    "cls": Readout(1, mean=False),
    "cls+mean": Readout(1, mean=True),
    "last4": Readout(4, mean=False),
    "last4+mean": Readout(4, mean=True),
}
POOLED = "pooled"  # what timm's own classifier of the model reads: for models without a CLS token


@dataclass(frozen=True)
class Backbone:
    """A model of timm with what its input needs.

    Attributes:
        name: as the user gave it.
        module: timm's module, frozen, without a head.
        readout: a row of READOUTS, or POOLED.
        patch: both sides of the input are multiples of so many pixels.
        fixed_size: (height, width) in pixels where the input has one size alone, else None.
        mean, std: (3, 1, 1), of pixels scaled to 0..1.
    """

    name: str
    module: nn.Module
    readout: str
    patch: int
    fixed_size: tuple[int, int] | None
    mean: Tensor
    std: Tensor

    @property
    def dim(self) -> int:
        """Length of a feature."""
        module: Any = self.module
        if self.readout == POOLED:
            return int(getattr(module, "head_hidden_size", module.num_features))
        blocks, mean = READOUTS[self.readout]
        return int(module.num_features) * (blocks + mean)

    def check_size(self, size: int | None) -> None:
        """Raises InputError unless images of `size` pixels, square, can go in; None is each image's own size."""
        if self.fixed_size is not None and (size, size) != self.fixed_size:
            height, width = self.fixed_size
            requested = "images of their own sizes were asked for" if size is None else f"{size} pixels were asked for"
            way_out = f"give image size {height}" if height == width else "use another model: kshot makes squares"
            limit = f"has a fixed position embedding and takes {height}x{width} pixels alone"
            raise InputError(f"model {self.name!r} {limit}, {requested}; {way_out}")
        if size is not None and (size <= 0 or size % self.patch):
            patch = f"{self.patch}, the patch size of model {self.name!r}"
            raise InputError(f"image size {size} is no multiple of {patch}; give a multiple of {self.patch}")

    def normalised(self, pixels: Sequence[np.ndarray]) -> Tensor:
        """(B, 3, H, W) float32 on the backbone's device, of B arrays (H, W, 3) uint8 of one size."""
        batch = torch.from_numpy(np.stack(pixels)).to(self.mean.device).permute(0, 3, 1, 2)
        return (batch.float() / 255 - self.mean) / self.std

    def features(self, module: nn.Module, batch: Tensor) -> Tensor:
        """(B, dim): what `readout` takes of `module` (this one or a copy of it with adapters) on normalised pixels."""
        if self.readout == POOLED:
            pooled: Tensor = module(batch)
            return pooled
        blocks, mean = READOUTS[self.readout]
        states = _last_blocks(module, batch, blocks)
        parts = [prefix[:, 0] for _, prefix in states] + ([states[-1][0].mean(dim=1)] if mean else [])
        return torch.cat(parts, dim=1)


def load(model: str, device: str = "cpu", readout: str = "cls") -> Backbone:
    """The backbone `model`: "kshot/nano-dinov2"; a folder in the hub layout of timm (with or without "local-dir:") or
    of transformers; a file of DINOv2 weights (see `baselines.weights`); "hf-hub:OWNER/NAME" or any name of timm, whose
    weights come from the hub, with @COMMIT behind it those of this commit.

    Raises:
        UnknownNameError: timm has no model of this name; no such readout.
        ModelError: the folder or the weights cannot be loaded, or the model has no CLS token or too few blocks
            for this readout.
        InputError: the device is not there.
    """
    cuda = ("cuda", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))) if torch.cuda.is_available() else ()
    if device not in ("cpu", *cuda):
        raise InputError(f"device {device!r} is not available here; use device 'cpu'")
    return _backbone(model, _module(_source(model), device), device, readout)


def check(model: str, readout: str = "cls", size: int | None = None) -> None:
    """Raise what `load` and `Backbone.check_size` would, before a start. Downloads nothing: of a model that only the
    hub knows nothing is checked; of timm's models all but the weights; local files and folders are read whole."""
    source = _source(model)
    if isinstance(source, Path):
        module = _module(source, "cpu")
    elif source.startswith(HUB):
        return
    else:
        with torch.device("meta"):
            module = _create(source, pretrained=False)
    _backbone(model, module, "cpu", readout).check_size(size)
    if str(source).startswith("local-dir:"):
        _module(source, "cpu")


def _backbone(name: str, module: nn.Module, device: str, readout: str) -> Backbone:
    if readout not in READOUTS and readout != POOLED:
        raise UnknownNameError("readout", readout, [*READOUTS, POOLED])
    tokens = isinstance(module, TRANSFORMERS) and not isinstance(module.norm, nn.Identity)
    if readout != POOLED and not (tokens and module.cls_token is not None):
        raise ModelError(f"model {name!r} has no CLS token after a final norm; use a DINOv2 model or readout {POOLED}")
    if readout in READOUTS and READOUTS[readout].blocks > (depth := len(module.blocks)):  # type: ignore[arg-type]
        takes = READOUTS[readout].blocks
        raise ModelError(f"model {name!r} has {depth} blocks, readout {readout} takes {takes}; use cls")
    config = resolve_model_data_config(module)
    mean, std = (torch.tensor(config[key], device=device).view(3, 1, 1) for key in ("mean", "std"))
    patch, fixed = _input(module)
    return Backbone(name, module, readout, patch, fixed, mean, std)


def _input(module: Any) -> tuple[int, tuple[int, int] | None]:
    """Of which number of pixels the sides are multiples, and the one size (height, width) that goes in, if any."""
    if isinstance(module, TRANSFORMERS):
        return int(module.patch_embed.patch_size[0]), None
    embed = getattr(module, "patch_embed", None)
    if module.pretrained_cfg.get("fixed_input_size", False) or getattr(embed, "strict_img_size", False):
        height, width = getattr(embed, "img_size", None) or module.pretrained_cfg["input_size"][1:]
        return 1, (height, width)
    stages = getattr(module, "feature_info", None) or [{"reduction": STRIDE}]
    return int(stages[-1]["reduction"]), None


def _last_blocks(vit: Any, batch: Tensor, blocks: int) -> list[tuple[Tensor, Tensor]]:
    """(patch tokens, prefix tokens) after each of the last `blocks` blocks and the final norm."""
    if blocks == 1:
        tokens, prefix = vit.forward_features(batch), vit.num_prefix_tokens
        return [(tokens[:, prefix:], tokens[:, :prefix])]
    wanted = {"return_prefix_tokens": True, "norm": True, "output_fmt": "NLC", "intermediates_only": True}
    states: list[tuple[Tensor, Tensor]] = vit.forward_intermediates(batch, indices=blocks, **wanted)
    return states


# Two: a sweep compares at most a small and a large one, and a ViT-L has 1.2 GB.
@lru_cache(maxsize=2)
def _module(source: str | Path, device: str) -> nn.Module:
    module: nn.Module
    module = weights.vision_transformer(source) if isinstance(source, Path) else _create(source, pretrained=True)
    return module.requires_grad_(False).eval().to(device)


def _create(name: str, *, pretrained: bool) -> nn.Module:
    """timm's module; a transformer that can resample its position embedding is set to do so."""
    plain, at = name, dict[str, Any]()
    if COMMIT.search(name) and not name.startswith((HUB, "local-dir:")):  # of a name of its own timm reads no commit
        plain, at = name.partition("@")[0], {"pretrained_cfg_overlay": {"hf_hub_id": hub_id_of(name)}}
    # timm draws random weights before it loads the real ones.
    with torch.random.fork_rng(devices=[]):
        try:
            try:
                return timm.create_model(plain, pretrained=pretrained, num_classes=0, dynamic_img_size=True, **at)
            except TypeError:  # of another family: its constructor has no such argument
                return timm.create_model(plain, pretrained=pretrained, num_classes=0, **at)
        except Exception as error:  # timm, safetensors and the hub's client have no common exception
            way_out = (
                "its config.json and model.safetensors must be of one architecture of timm"
                if name.startswith("local-dir:")
                else "weights come from the Hugging Face hub: go online once, or give a local folder or file of weights"
            )
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".:")
            raise ModelError(f"cannot load model {name!r} ({reason}); {way_out}") from error


def _source(model: str) -> str | Path:
    """Where a module comes from: timm's name for it, or the path of weights."""
    if model == nano.NAME:
        return _timm_folder(nano.HERE, "install kshot again")
    path = Path(model.removeprefix("local-dir:"))
    if weights.is_weights(path):
        return path.resolve()
    if model.startswith("local-dir:") or path.is_dir():
        return _timm_folder(path)
    if not model.startswith(HUB):
        _check_timm_has(model.partition("@")[0] if COMMIT.search(model) else model)
    return model


def _timm_folder(folder: Path, way_out: str = "give a folder in the hub layout") -> str:
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ModelError(f"model folder {str(folder)!r} has no {name}; {way_out}")
    return f"local-dir:{folder.resolve()}"


def _check_timm_has(model: str) -> None:
    tagged = timm.list_models(pretrained=True)
    if model not in tagged and model not in timm.list_models():
        names = [nano.NAME, *tagged]
        near = get_close_matches(model, names, n=5) or [name for name in names if "patch14_dinov2" in name]
        raise UnknownNameError("model (a folder, a file of weights, or a model of timm)", model, near)
    if not timm.is_model_pretrained(model):
        way_out = "give a folder or a file of weights, or another model"
        raise ModelError(f"timm has no weights of model {model!r}; {way_out}")
