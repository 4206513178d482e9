"""A DINOv2 backbone by name: find it, load it once per process, turn pixels into its CLS token.

Knows neither heads nor training. The loaded module is shared by everything that asks for it, frozen and in eval mode:
who wants to add to it takes `copy`, which shares the weights.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path

import numpy as np
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import VisionTransformer

from baselines import nano
from kshot_errors import InputError, ModelError, UnknownNameError


@dataclass(frozen=True)
class Backbone:
    """A vision transformer with what its input needs.

    Attributes:
        vit: timm's module, frozen, without a head; takes any input of whole patches.
        patch: side of a patch, pixels.
        mean, std: (3, 1, 1), of pixels scaled to 0..1.
    """

    vit: VisionTransformer
    patch: int
    mean: torch.Tensor
    std: torch.Tensor

    @property
    def dim(self) -> int:
        """Length of a feature."""
        return int(self.vit.num_features)

    def copy(self) -> VisionTransformer:
        """The module again, to add adapters to; its parameters are the same tensors, not copies."""
        return copy.deepcopy(self.vit, {id(p): p for p in self.vit.parameters()})

    def normalised(self, pixels: Sequence[np.ndarray]) -> torch.Tensor:
        """(B, 3, H, W) float32 on the backbone's device, of B arrays (H, W, 3) uint8 of one size."""
        batch = torch.from_numpy(np.stack(pixels)).to(self.mean.device).permute(0, 3, 1, 2)
        return (batch.float() / 255 - self.mean) / self.std


def cls_tokens(vit: VisionTransformer, batch: torch.Tensor) -> torch.Tensor:
    """(B, D): the CLS token after the final norm, DINOv2's image feature (Oquab et al. 2023, arXiv:2304.07193)."""
    return vit.forward_features(batch)[:, 0]


def load(model: str, device: str = "cpu") -> Backbone:
    """The backbone `model`: "kshot/nano-dinov2", a folder in timm's hub layout (with or without "local-dir:"),
    "hf-hub:OWNER/NAME", or the name of a vision transformer in timm, whose weights come from the hub.

    Raises:
        UnknownNameError: timm has no vision transformer of this name.
        ModelError: the folder or the weights cannot be loaded, or the model has no CLS token.
        InputError: the device is not there.
    """
    kind = device.split(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise InputError(f"device {device!r} is not available here; use device 'cpu'")
    return _load(_source(model), device)


def check(model: str) -> None:
    """Raise, as `load` does, for a name that cannot be a backbone; loads and downloads nothing."""
    if model != nano.NAME:
        _source(model)


def check_size(size: int | None, patch: int) -> None:
    """Raises InputError unless `size` pixels are whole patches."""
    if size is not None and (size <= 0 or size % patch):
        raise InputError(f"size {size} is no multiple of the model's patch size {patch}; give a multiple of {patch}")


# Two: a sweep compares at most a small and a large one, and a ViT-L has 1.2 GB.
@lru_cache(maxsize=2)
def _load(source: str, device: str) -> Backbone:
    vit = _create(source)
    if not isinstance(vit, VisionTransformer) or vit.cls_token is None or isinstance(vit.norm, torch.nn.Identity):
        raise ModelError(f"model {source!r} has no CLS token after a final norm; use a DINOv2 model of timm")
    vit.requires_grad_(False).eval().to(device)
    config = resolve_model_data_config(vit)
    mean, std = (torch.tensor(config[key], device=device).view(3, 1, 1) for key in ("mean", "std"))
    return Backbone(vit, vit.patch_embed.patch_size[0], mean, std)


def _create(source: str) -> torch.nn.Module:
    # timm draws random weights before it loads the real ones.
    with torch.random.fork_rng(devices=[]):
        try:
            return timm.create_model(source, pretrained=True, num_classes=0, dynamic_img_size=True)
        except Exception as error:  # timm, safetensors and the hub's client have no common exception
            way_out = (
                "its config.json and model.safetensors must be of one architecture of timm"
                if source.startswith("local-dir:")
                else "weights come from the Hugging Face hub: go online once, or give a local folder in timm's layout"
            )
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".:")
            raise ModelError(f"cannot load model {source!r} ({reason}); {way_out}") from error


def _source(model: str) -> str:
    """The name under which timm loads `model`."""
    if model == nano.NAME:
        return f"local-dir:{nano.folder()}"
    folder = Path(model.removeprefix("local-dir:"))
    if model.startswith("local-dir:") or folder.is_dir():
        return _folder_source(folder)
    if not model.startswith("hf-hub:"):
        _check_known(model)
    return model


def _folder_source(folder: Path) -> str:
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ModelError(f"model folder {str(folder)!r} has no {name}; give a folder in timm's hub layout")
    return f"local-dir:{folder.resolve()}"


def _check_known(model: str) -> None:
    tagged = timm.list_models(module="vision_transformer", pretrained=True)
    if model not in tagged and model not in timm.list_models(module="vision_transformer"):
        names = [nano.NAME, *tagged]
        near = get_close_matches(model, names, n=5) or [name for name in names if "dinov2" in name]
        raise UnknownNameError("model (a folder, or a vision transformer of timm)", model, near)
