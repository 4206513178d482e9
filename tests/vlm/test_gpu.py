"""A GPU gives what a CPU does: training, scores and samples of the nano model in float32."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
from tinker import types

from tests.vlm.helpers import Pictured
from vlm import nano
from vlm.classifier import predict
from vlm.local.registry import LocalServiceClient
from vlm.prompts import Prompt

ADAM = types.AdamParams(learning_rate=1e-3, eps=1e-8)
pytestmark = pytest.mark.gpu


def _trained(
    device: str, state: Path, data: list[tinker.Datum], images: list[bytes], prompt: Prompt
) -> tuple[list[float], np.ndarray, Any, int]:
    """Losses of five steps, the scores of images and what is written of one, and images that the tower saw."""
    service = LocalServiceClient(state / device, device=device)
    try:
        client = service.create_lora_training_client(nano.NAME, rank=4, seed=1).result()
        losses = []
        for _ in range(5):
            losses.append(client.forward_backward(data, "cross_entropy").result().metrics["loss:sum"])
            client.optim_step(ADAM).result()
        seen = client._engine.vision.forwards
        sampler = client.save_weights_and_get_sampling_client().result()
        scores = predict(sampler, images, prompt)
        greedy = types.SamplingParams(max_tokens=8, temperature=0.0)
        written = sampler.sample(prompt.question(images[0]), 1, greedy).result().sequences[0]
        return losses, scores, written, seen
    finally:
        service.close()


def test_a_gpu_gives_what_a_cpu_does(
    mixed: list[tinker.Datum], examples: list[Pictured], prompt: Prompt, tmp_path: Path
) -> None:
    images = [example.image for example in examples]
    cpu, gpu = (_trained(device, tmp_path, mixed, images, prompt) for device in ("cpu", "cuda"))
    assert gpu[0] == pytest.approx(cpu[0], rel=1e-4)
    np.testing.assert_allclose(gpu[1], cpu[1], atol=1e-3)
    assert gpu[2].tokens == cpu[2].tokens
    assert gpu[2].logprobs == pytest.approx(cpu[2].logprobs, abs=1e-3)
    assert gpu[3] == cpu[3]  # no image twice
