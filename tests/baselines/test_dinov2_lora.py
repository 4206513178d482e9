"""LoRA against the same mathematics written with merged weights, torch's autograd and Adam by hand."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.func import functional_call

from baselines import nano
from baselines.backbone import load
from baselines.lora import ALPHA, Adam, LoraClassifier
from baselines.pixels import resized
from kshot_errors import ImageError, InputError

LINEARS = [f"blocks.{i}.{name}" for i in range(4) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


@pytest.fixture
def images(make_image: Callable[..., bytes]) -> list[bytes]:
    return [make_image(seed, *((96, 48) if seed in (1, 5) else (64, 64))) for seed in range(8)]


def trained(classifier: LoraClassifier) -> dict[str, torch.Tensor]:
    named = [*classifier.vit.named_parameters(), *classifier.head.named_parameters(prefix="head")]
    return {name: p.detach().clone() for name, p in named if p.requires_grad}


def reference_loss(state: dict[str, torch.Tensor], images: list[bytes], labels: list[int], rank: int) -> torch.Tensor:
    """Sum of cross-entropies with W + (alpha / rank) B A in place of W, one image at a time."""
    backbone = load(nano.NAME)
    merged = dict(backbone.vit.named_parameters())
    for name in LINEARS:
        a, b = (state[f"{name}.lora_{half}.default.weight"] for half in "AB")
        merged[f"{name}.weight"] = merged[f"{name}.weight"] + ALPHA / rank * b @ a
    losses = []
    for image, label in zip(images, labels, strict=True):
        pixels = backbone.normalised([resized(image, backbone.patch)])
        cls = functional_call(backbone.vit, merged, (pixels,))
        losses.append(-(cls @ state["head.weight"].T + state["head.bias"]).log_softmax(1)[0, label])
    return torch.stack(losses).sum()


def adam_by_hand(
    state: dict[str, torch.Tensor], moments: dict[str, list[torch.Tensor]], step: int, adam: Adam
) -> dict[str, torch.Tensor]:
    updated = {}
    for name, p in state.items():
        first, second = moments.setdefault(name, [torch.zeros_like(p), torch.zeros_like(p)])
        first = adam.beta1 * first + (1 - adam.beta1) * p.grad
        second = adam.beta2 * second + (1 - adam.beta2) * p.grad**2
        moments[name] = [first, second]
        m, v = first / (1 - adam.beta1**step), second / (1 - adam.beta2**step)
        updated[name] = (p - adam.learning_rate * m / (v.sqrt() + adam.eps)).detach()
    return updated


def test_steps_are_plain_torch_and_adam_by_hand(images: list[bytes]) -> None:
    """eps is large here: with 1e-8 Adam makes whole steps of gradients that are rounding noise."""
    labels, rank, adam = [0, 1, 2, 0, 1, 2, 0, 1], 4, Adam(1e-2, eps=1e-3)
    classifier = LoraClassifier(nano.NAME, 3, rank=rank, seed=0)
    state, moments = trained(classifier), {}
    for step in (1, 2, 3):
        state = {name: p.requires_grad_() for name, p in state.items()}
        loss = reference_loss(state, images, labels, rank)
        loss.backward()
        state = adam_by_hand(state, moments, step, adam)
        assert classifier.step(images, labels, adam) == pytest.approx(loss.item(), rel=1e-5)
        for name, value in trained(classifier).items():
            torch.testing.assert_close(value, state[name], rtol=1e-4, atol=1e-5, msg=name)


def test_adapters_sit_on_every_linear_of_every_block() -> None:
    classifier = LoraClassifier(nano.NAME, 3, rank=5, seed=0)
    expected = {f"{name}.lora_{half}.default.weight" for name in LINEARS for half in "AB"}
    assert set(trained(classifier)) == expected | {"head.weight", "head.bias"}
    assert trained(classifier)["blocks.0.attn.qkv.lora_A.default.weight"].shape == (5, 128)


def test_untrained_is_uniform_and_the_base_stays_untouched(images: list[bytes]) -> None:
    before = {name: p.clone() for name, p in load(nano.NAME).vit.state_dict().items()}
    classifier = LoraClassifier(nano.NAME, 5, seed=0)
    np.testing.assert_allclose(classifier.log_probs(images), -np.log(5))
    classifier.step(images, [0] * 8, Adam(1e-2))
    after = load(nano.NAME).vit.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_seed_reproduces_bit_for_bit(images: list[bytes]) -> None:
    def run(seed: int) -> tuple[list[float], np.ndarray]:
        torch.manual_seed(torch.initial_seed() + 1)  # the global generator must not matter
        classifier = LoraClassifier(nano.NAME, 4, seed=seed)
        losses = [classifier.step(images, [0, 1, 2, 3] * 2, Adam(1e-3)) for _ in range(4)]
        return losses, classifier.log_probs(images)

    with torch.random.fork_rng(devices=[]):
        (first, one), (second, two), (other, three) = run(0), run(0), run(1)
    assert first == second
    assert first != other
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, three)


def test_the_global_generator_is_left_alone(images: list[bytes]) -> None:
    before = torch.get_rng_state()
    LoraClassifier(nano.NAME, 4, seed=3).step(images, [0] * 8)
    assert torch.equal(torch.get_rng_state(), before)


def test_eight_images_are_learnt_by_heart(images: list[bytes]) -> None:
    labels = [0, 1, 2, 3, 3, 2, 1, 0]
    classifier = LoraClassifier(nano.NAME, 4, seed=0)
    losses = [classifier.step(images, labels, Adam(3e-3)) for _ in range(30)]
    assert losses[0] == pytest.approx(8 * np.log(4), rel=1e-6)
    assert losses[-1] < 0.5
    log_probs = classifier.log_probs(images)
    np.testing.assert_array_equal(log_probs.argmax(axis=1), labels)
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=1), 1)


def test_log_probs_come_in_the_given_order(images: list[bytes]) -> None:
    classifier = LoraClassifier(nano.NAME, 4, seed=0)
    classifier.step(images, [0, 1, 2, 3] * 2, Adam(1e-2))
    alone = np.concatenate([classifier.log_probs([image]) for image in images])
    np.testing.assert_allclose(classifier.log_probs(images * 6), np.tile(alone, (6, 1)), atol=1e-5)
    assert classifier.log_probs([]).shape == (0, 4)


def test_what_cannot_be_used(images: list[bytes]) -> None:
    with pytest.raises(InputError, match="1 classes"):
        LoraClassifier(nano.NAME, 1, seed=0)
    with pytest.raises(InputError, match="rank 0"):
        LoraClassifier(nano.NAME, 2, rank=0, seed=0)
    with pytest.raises(InputError, match="size 30"):
        LoraClassifier(nano.NAME, 2, size=30, seed=0)
    classifier = LoraClassifier(nano.NAME, 2, seed=0)
    with pytest.raises(InputError, match="label 2"):
        classifier.step(images, [2] * 8)
    with pytest.raises(InputError, match="one label per image"):
        classifier.step([], [])
    with pytest.raises(ImageError):
        classifier.step([b"x"], [0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_agrees_with_cpu(images: list[bytes]) -> None:
    def run(device: str) -> tuple[dict[str, torch.Tensor], list[float], np.ndarray]:
        classifier = LoraClassifier(nano.NAME, 4, seed=0, device=device)
        start = {name: p.cpu() for name, p in trained(classifier).items()}
        losses = [classifier.step(images, [0, 1, 2, 3] * 2, Adam(1e-3)) for _ in range(3)]
        return start, losses, classifier.log_probs(images)

    (start, losses, log_probs), (gpu_start, gpu_losses, gpu_log_probs) = run("cpu"), run("cuda")
    assert all(torch.equal(start[name], gpu_start[name]) for name in start)
    assert gpu_losses == pytest.approx(losses, rel=1e-2)
    np.testing.assert_allclose(gpu_log_probs, log_probs, atol=5e-2)
