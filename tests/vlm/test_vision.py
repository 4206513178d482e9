"""Image features: the frozen tower's, computed once, exact, and the same whatever else is asked for."""

from typing import Any

import torch

from tests.vlm.helpers import Pictured
from vlm.inputs import ImageRule, image_chunk
from vlm.local.model import LinearPatchEmbed
from vlm.local.training_client import LocalTrainingClient
from vlm.local.vision import Vision
from vlm.prompts import Prompt


def test_a_second_epoch_runs_the_tower_zero_times(
    client: LocalTrainingClient, prompt: Prompt, examples: list[Pictured]
) -> None:
    vision = client._engine.vision
    data = [prompt.datum(e.image, e.label) for e in examples]
    client.forward_backward(data, "cross_entropy").result()
    seen = vision.forwards
    client.forward_backward(data, "cross_entropy").result()
    assert vision.forwards == seen


def test_images_of_one_size_may_share_a_pass(client: LocalTrainingClient, examples: list[Pictured]) -> None:
    """As they do where there is no need for equal bits."""
    vision = Vision(client._engine.model)
    shared = vision._grouped([vision._pixels(e.image) for e in examples])
    for one, other in zip(shared, vision._encode([e.image for e in examples]), strict=True):
        assert one.grid == other.grid
        assert torch.allclose(one.embeds, other.embeds, atol=1e-4)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(one.deepstack, other.deepstack, strict=True))


def test_the_feature_cache_is_bounded(client: LocalTrainingClient, rule: ImageRule, examples: list[Pictured]) -> None:
    chunks = [image_chunk(e.image, rule) for e in examples[::3]]  # of one size
    vision = Vision(client._engine.model, cache_bytes=2 * Vision(client._engine.model).features(chunks[:1])[0].bytes)
    for _ in range(2):
        vision.features(chunks[:2])
    assert vision.forwards == 2
    vision.features(chunks[2:3])  # drops the oldest
    vision.features(chunks[1:2])
    assert vision.forwards == 3
    vision.features(chunks[:1])
    assert vision.forwards == 4


def test_the_linear_patch_embedding_equals_the_convolution(stock: Any) -> None:
    convolution = stock.model.visual.patch_embed
    patches = torch.randn(10, 3 * 2 * 8 * 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(LinearPatchEmbed(convolution)(patches), convolution(patches), atol=1e-5)
