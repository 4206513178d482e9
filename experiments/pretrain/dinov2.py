"""The nano DINOv2: DINOv2's architecture in timm, taught by what `teacher` says of drawings. It never hears a name."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from baselines.nano import CONFIG
from experiments.pretrain.learning import Plan, Report, distil


class Student(nn.Module):
    """timm's module with pictures of 0 to 1 as its input."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit: Any = vit
        self.mean: Tensor
        self.std: Tensor
        for name, values in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1))

    def forward(self, pictures: Tensor) -> Tensor:
        """(N, 3, side, side) → (N, D): the CLS token after the final norm."""
        features: Tensor = self.vit((pictures - self.mean) / self.std)
        return features


def train(masks: Tensor, described: Tensor, plan: Plan, report: Report) -> dict[str, Tensor]:
    """The weights of a nano DINOv2 that learnt from these drawings and the teacher's descriptions of them."""
    with plain_attention():
        student = Student(create(plan.seed)).to(plan.device)
    distil(student, student.vit.num_features, masks, described, plan, report)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in student.vit.state_dict().items()}


def create(seed: int) -> Any:
    """The architecture of config.json with fresh weights. Xavier's scale: timm's own (0.02) is for wide models."""
    import timm

    config = json.loads(CONFIG.read_text())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        vit: Any = timm.create_model(
            config["architecture"], num_classes=0, dynamic_img_size=True, **config["model_args"]
        )
        for module in vit.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        nn.init.xavier_uniform_(vit.patch_embed.proj.weight.data.flatten(1))
        places = waves(vit.patch_embed.grid_size[0], vit.embed_dim)
        vit.pos_embed.data[:, -len(places) :] = places
    return vit


def waves(side: int, width: int) -> Tensor:
    """(side * side, width): sines and cosines of a patch's column and row, the start of the learnt positions."""
    line = torch.arange(side).float()
    row, column = torch.meshgrid(line, line, indexing="ij")
    frequency = 100.0 ** -(torch.arange(width // 4) / (width // 4))
    angles = [place.flatten()[:, None] * frequency for place in (column, row)]
    return 0.5 * torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1)


@contextmanager
def plain_attention() -> Iterator[None]:
    """timm's attention as two products: on a CPU the backward pass of the fused one takes longer than all the rest."""
    from timm.layers import config

    before = config.use_fused_attn()
    config.set_fused_attn(False)
    try:
        yield
    finally:
        config.set_fused_attn(before)
