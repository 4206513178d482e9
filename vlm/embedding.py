"""Features of the vision-language model itself, a vector for each prompt, for a head of one's own.

"tower": the vision tower's output after its merger, which is what is put into the text at the image's positions
(deepstack layers left out), as the mean over the image's tokens. "hidden": the text model's last hidden state at the
prompt's last position, after the final norm: what the head would turn into the next token. Zhang et al., "Why are
visually-grounded language models bad at image classification?" (NeurIPS 2024, arXiv:2405.18415), find that such states
hold what is needed to classify where the answers in text do not say it.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import tinker
from tinker import types

from kshot.errors import RequestError, UnknownNameError
from vlm.classifier import WINDOW, questions
from vlm.inputs import ImageRule, image_chunk
from vlm.prompts import Prompt
from vlm.service import SamplingClient

FEATURES = {"tower": (True, False), "hidden": (False, True), "tower+hidden": (True, True)}  # which of the two


@runtime_checkable
class Embedder(Protocol):
    """A sampling client that gives features of its model."""

    def embed_prompts(self, prompts: Sequence[tinker.ModelInput], *, tower: bool, hidden: bool) -> np.ndarray:
        """(prompts, D) float32: the requested features, the tower's first."""


@runtime_checkable
class ImageEncoder(Protocol):
    """A sampling client that caches the vision tower's features of images."""

    @property
    def tower_forwards(self) -> int:
        """Images that went through the tower of its model in this process."""

    def encode_images(self, images: Sequence[types.ImageChunk]) -> None:
        """Have these images' features ready, in memory or on disk; those that are cost nothing."""


def encode(sampler: ImageEncoder, images: Sequence[bytes], rule: ImageRule) -> None:
    """Put the tower's features of images where later requests, also of other processes, find them: `connect` names
    the folder. Raises ImageError for bytes that are no image."""
    for start in range(0, len(images), WINDOW):
        sampler.encode_images([image_chunk(image, rule) for image in images[start : start + WINDOW]])


def embed(sampler: SamplingClient, prompts: Sequence[tinker.ModelInput], what: str) -> np.ndarray:
    """(prompts, D) float32 features of each prompt, in order. what: a row of FEATURES; D is the width of the text
    model, twice that for "tower+hidden".

    On a CPU "tower" is a function of the image alone, bit for bit, and an image seen before costs nothing; both unless
    the sampler's LoRA covers the vision tower. Otherwise prompts of one call share matrix products: their
    number changes a prompt's features by rounding, and no more.
    Raises UnknownNameError for another name, and RequestError for a service that gives no features and, where the
    tower's are asked for, for a prompt that does not hold exactly one image.
    """
    if what not in FEATURES:
        raise UnknownNameError("features", what, FEATURES)
    if not isinstance(sampler, Embedder):
        raise RequestError(
            f"features {what!r} need the local service: the Tinker API gives none of its models; use --service local"
        )
    tower, hidden = FEATURES[what]
    return sampler.embed_prompts(prompts, tower=tower, hidden=hidden)


def embed_images(sampler: SamplingClient, images: Sequence[bytes], prompt: Prompt, what: str) -> np.ndarray:
    """(images, D) float32 features of the question about each image, its prefill at the end, so that "hidden" is the
    state that the class name is written from. Raises as `embed` does, and ImageError for bytes that are no image."""
    return np.concatenate([embed(sampler, window, what) for window in questions(images, prompt)])
