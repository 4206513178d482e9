"""LoRA and a linear head on DINOv2: the baseline that trains, with the same optimiser as the language model's side.

Knows neither data sets nor budgets: the caller makes the batches and picks the learning rate. Every random number
comes from `seed`, and the global generators are left as they were.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from timm.models import VisionTransformer
from torch.nn import functional

from baselines.backbone import Backbone, check_size, cls_tokens, load
from baselines.inputs import check_labels
from baselines.pixels import PixelCache, size_groups
from kshot_errors import InputError, ModelError

ALPHA = 32
LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
# Images predicted at a time. Fixed, since the low bits of a batched product depend on the size of the batch.
CHUNK = 32


@dataclass(frozen=True)
class Adam:
    """Adam without weight decay or clipping (Kingma & Ba 2015); defaults are the blog's, names are Tinker's."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8


def _adapted(backbone: Backbone, rank: int, seed: int) -> VisionTransformer:
    """The backbone with LoRA (Hu et al. 2021, arXiv:2106.09685) on every linear layer of its blocks."""
    vit = backbone.copy()
    targets = [f"blocks.{block}.{linear}" for block in range(len(vit.blocks)) for linear in LINEARS]
    if missing := sorted(set(targets) - {name for name, _ in vit.named_modules()}):
        raise ModelError(f"the model has no {missing[0]} to put LoRA on; use a DINOv2 model of timm")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=targets), vit)
    return vit


class LoraClassifier:
    """A DINOv2 backbone with LoRA adapters and a linear head on the CLS token; untrained, it predicts uniformly.

    The head starts at zero, so the first step moves the head alone. LoRA's A is drawn from `seed` (PEFT's Kaiming
    uniform), B starts at zero; alpha is 32 at any rank, dropout 0. Predictions are the same bit for bit for the same
    images in the same order.

    Args:
        model, device: see `baselines.backbone.load`, which also lists what is raised. size: see `features.Encoder`.
        n_classes: at least 2. rank: at least 1.

    Raises:
        InputError: n_classes, rank or size out of range. ModelError: the blocks are not DINOv2's.
    """

    def __init__(
        self, model: str, n_classes: int, *, seed: int, rank: int = 32, size: int | None = None, device: str = "cpu"
    ) -> None:
        if n_classes < 2 or rank < 1:
            raise InputError(f"{n_classes} classes at LoRA rank {rank}; give at least 2 classes and rank 1")
        self._backbone = load(model, device)
        check_size(size, self._backbone.patch)
        self._pixels = PixelCache(self._backbone.patch, size)
        self._n_classes = n_classes
        self.vit = _adapted(self._backbone, rank, seed)
        self.head = torch.nn.utils.skip_init(torch.nn.Linear, self._backbone.dim, n_classes, device=device)
        for parameter in self.head.parameters():
            torch.nn.init.zeros_(parameter)
        trained = [p for p in (*self.vit.parameters(), *self.head.parameters()) if p.requires_grad]
        self._optimizer = torch.optim.Adam(trained)

    def step(self, images: Sequence[bytes], labels: Sequence[int], adam: Adam = Adam()) -> float:
        """One Adam step on N images; returns their cross-entropy before it, in nats, the sum and not the mean.

        The sum is Tinker's definition, as on the language model's side; Adam does not see the factor N but for eps.

        Raises:
            InputError: labels that do not fit. ImageError: bytes that are no image.
        """
        targets = np.asarray(labels)
        check_labels(targets, self._n_classes, len(images))
        self._optimizer.zero_grad()
        total = 0.0
        for group, logits in self._logits(images):
            target = torch.from_numpy(targets[group]).long().to(logits.device)
            loss = functional.cross_entropy(logits, target, reduction="sum")
            loss.backward()
            total += loss.item()
        self._optimizer.param_groups[0].update(lr=adam.learning_rate, betas=(adam.beta1, adam.beta2), eps=adam.eps)
        self._optimizer.step()
        return total

    @torch.inference_mode()
    def log_probs(self, images: Sequence[bytes]) -> np.ndarray:
        """(N, n_classes) float64 log-probabilities, in nats.

        Raises:
            ImageError: bytes that are no image.
        """
        result = np.empty((len(images), self._n_classes))
        for start in range(0, len(images), CHUNK):
            rows = result[start : start + CHUNK]
            for group, logits in self._logits(images[start : start + CHUNK]):
                rows[group] = logits.double().log_softmax(dim=1).cpu().numpy()
        return result

    def _logits(self, images: Sequence[bytes]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """(indices, logits) of the images of one size, one size after the other: each is one forward."""
        pixels = [self._pixels(image) for image in images]
        for group in size_groups(pixels):
            batch = self._backbone.normalised([pixels[i] for i in group])
            yield group, self.head(cls_tokens(self.vit, batch))
