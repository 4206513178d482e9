"""LoRA with a linear head against the same mathematics written with merged weights and plain torch."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_dinov2 import timm_folder
from tinker import types

from baselines import nano
from baselines.backbone import load
from baselines.features import resized
from baselines.lora import LoraHeadClient
from kshot.errors import ImageError, InputError, ModelError
from tests.baselines.plain_lora import LINEARS, adamw, data_of, gradients, log_probs, merged, step, trained


@pytest.fixture
def images(make_image: Callable[..., bytes]) -> list[bytes]:
    return [make_image(seed, *((96, 48) if seed in (1, 5) else (64, 64))) for seed in range(8)]


def adam(learning_rate: float, eps: float = 1e-8, **others: float) -> types.AdamParams:
    return types.AdamParams(learning_rate=learning_rate, eps=eps, **others)


@pytest.mark.parametrize("others", [{}, {"weight_decay": 0.1, "grad_clip_norm": 2.0, "beta1": 0.8, "beta2": 0.99}])
def test_passes_and_steps_are_plain_torch_and_adamw_by_hand(images: list[bytes], others: dict[str, float]) -> None:
    """eps is large here: with 1e-8 Adam makes whole steps of gradients that are rounding noise."""
    labels, params = [0, 1, 2, 0, 1, 2, 0, 1], adam(1e-2, eps=1e-3, **others)
    client = LoraHeadClient(nano.NAME, 3, rank=4, seed=0)
    moments: dict[str, list[torch.Tensor]] = {}
    for number in (1, 2, 3):  # the first leaves B at zero
        state = {name: p.requires_grad_() for name, p in trained(client).items()}
        expected = log_probs(state, images)
        losses = -expected[torch.arange(8), torch.tensor(labels)]
        losses.sum().backward()
        np.testing.assert_allclose(client.class_log_probs(images), expected.detach().numpy(), atol=1e-5)
        answer = client.forward_backward(data_of(images, labels), "cross_entropy").result()
        assert answer.metrics["loss:sum"] == pytest.approx(losses.sum().item(), rel=1e-5)
        assert answer.loss_fn_output_type == "ArrayRecord"
        for output, loss in zip(answer.loss_fn_outputs, losses.tolist(), strict=True):
            assert output["logprobs"].shape == [1]
            assert output["logprobs"].data[0] == pytest.approx(-loss, abs=1e-5)
        for name, gradient in gradients(client).items():
            torch.testing.assert_close(gradient, state[name].grad, rtol=1e-3, atol=1e-4, msg=name)
        state, norm = adamw(state, moments, number, params)
        stepped = client.optim_step(params).result()
        assert norm > 2  # so that the clipping is of some effect
        assert stepped.metrics["grad_norm:mean"] == pytest.approx(norm, rel=1e-4)
        for name, value in trained(client).items():
            torch.testing.assert_close(value, state[name], rtol=1e-4, atol=1e-5, msg=name)


def test_adapters_sit_on_every_linear_of_every_block() -> None:
    weights = trained(LoraHeadClient(nano.NAME, 3, rank=5, seed=0))
    expected = {f"{name}.lora_{half}.default.weight" for name in LINEARS for half in "AB"}
    assert set(weights) == expected | {"head.weight", "head.bias"}
    assert weights["blocks.0.attn.qkv.lora_A.default.weight"].shape == (5, 128)


def test_another_readout_is_what_timm_gives(images: list[bytes]) -> None:
    """CLS and mean patch token of the merged model, stock timm."""
    client = LoraHeadClient(nano.NAME, 3, rank=4, seed=0, readout="cls+mean")
    for _ in range(2):
        step(client, data_of(images, [0, 1, 2, 0, 1, 2, 0, 1]), adam(1e-2))
    state, backbone = trained(client), load(nano.NAME)
    plain: Any = copy.deepcopy(backbone.module)
    plain.load_state_dict(merged(state))
    with torch.no_grad():
        rows = [plain.forward_features(backbone.normalised([resized(image, backbone.patch)])) for image in images]
        features = torch.cat([torch.cat([t[:, 0], t[:, plain.num_prefix_tokens :].mean(1)], 1) for t in rows])
        expected = (features @ state["head.weight"].T + state["head.bias"]).log_softmax(1)
    assert state["head.weight"].shape == (3, 256)
    np.testing.assert_allclose(client.class_log_probs(images), expected.numpy(), atol=1e-5)


def test_size_is_that_of_images_resized_before(images: list[bytes]) -> None:
    def small(image: bytes) -> bytes:
        stream = io.BytesIO()
        Image.open(io.BytesIO(image)).resize((40, 40), Image.Resampling.BICUBIC).save(stream, "PNG")
        return stream.getvalue()

    labels, before = [0, 1, 2, 0, 1, 2, 0, 1], [small(image) for image in images]
    sized, plain = (LoraHeadClient(nano.NAME, 3, seed=0, size=size) for size in (40, None))
    assert step(sized, data_of(images, labels), adam(1e-2)) == step(plain, data_of(before, labels), adam(1e-2))
    np.testing.assert_array_equal(sized.class_log_probs(images), plain.class_log_probs(before))
    assert not np.array_equal(sized.class_log_probs(images), plain.class_log_probs(images))


def test_untrained_is_uniform_and_the_base_stays_untouched(images: list[bytes]) -> None:
    before = {name: p.clone() for name, p in load(nano.NAME).module.state_dict().items()}
    client = LoraHeadClient(nano.NAME, 5, seed=0)
    np.testing.assert_allclose(client.class_log_probs(images), -np.log(5))
    step(client, data_of(images, [0] * 8), adam(1e-2))
    after = load(nano.NAME).module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_seed_reproduces_bit_for_bit(images: list[bytes]) -> None:
    data = data_of(images, [0, 1, 2, 3] * 2)

    def run(seed: int) -> tuple[list[float], np.ndarray]:
        torch.manual_seed(torch.initial_seed() + 1)  # the global generator must not matter, and is left alone
        before = torch.get_rng_state()
        client = LoraHeadClient(nano.NAME, 4, seed=seed)
        result = [step(client, data, adam(1e-3)) for _ in range(3)], client.class_log_probs(images)
        assert torch.equal(torch.get_rng_state(), before)
        return result

    with torch.random.fork_rng(devices=[]):
        (first, one), (second, two), (other, three) = run(0), run(0), run(1)
    assert first == second
    assert first != other
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, three)


def test_eight_images_are_learnt_by_heart(images: list[bytes]) -> None:
    labels = [0, 1, 2, 3, 3, 2, 1, 0]
    client = LoraHeadClient(nano.NAME, 4, seed=0)
    losses = [step(client, data_of(images, labels), adam(1e-2)) for _ in range(9)]
    assert losses[0] == pytest.approx(8 * np.log(4), rel=1e-6)
    assert losses[-1] < 0.5
    log_probs = client.class_log_probs(images)
    np.testing.assert_array_equal(log_probs.argmax(axis=1), labels)
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=1), 1)


def test_log_probs_come_in_the_given_order(images: list[bytes]) -> None:
    client, labels = LoraHeadClient(nano.NAME, 4, seed=0), [0, 1, 2, 3] * 2
    step(client, data_of(images, labels), adam(1e-2))
    alone = np.concatenate([client.class_log_probs([image]) for image in images])
    np.testing.assert_allclose(client.class_log_probs(images * 6), np.tile(alone, (6, 1)), atol=1e-5)
    assert client.class_log_probs([]).shape == (0, 4)
    answer = client.forward_backward(data_of(images * 6, labels * 6), "cross_entropy").result()  # two passes
    targets = np.tile(alone[np.arange(8), labels], 6)
    np.testing.assert_allclose([o["logprobs"].data[0] for o in answer.loss_fn_outputs], targets, atol=1e-5)


def test_what_cannot_be_made() -> None:
    good = {"model": nano.NAME, "n_classes": 2, "seed": 0}
    wrong = {"1 classes": ("n_classes", 1), "rank 0": ("rank", 0), "size 30": ("size", 30), "seed -1": ("seed", -1)}
    for message, (name, value) in {**wrong, "readout 'mean'": ("readout", "mean")}.items():
        with pytest.raises(InputError, match=message):
            LoraHeadClient(**{**good, name: value})
    with pytest.raises(ImageError):
        LoraHeadClient(nano.NAME, 2, seed=0).class_log_probs([b"x"])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("eva02_tiny_patch14_224", {"embed_dim": 32, "depth": 2, "num_heads": 2}, r"computes past blocks\.0\.attn"),
        ("resnet10t", {"block_args": {}}, "no blocks with linear layers"),
    ],
)
def test_a_model_that_takes_no_adapters_is_named(name: str, arguments: dict, message: str, tmp_path: Path) -> None:
    """EVA computes its keys, queries and values with the layer's weight, not with the layer."""
    with pytest.raises(ModelError, match=message):
        LoraHeadClient(timm_folder(tmp_path, name, **arguments)[0], 2, readout="pooled", seed=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_agrees_with_cpu(images: list[bytes]) -> None:
    def run(device: str) -> tuple[dict[str, torch.Tensor], list[float], np.ndarray]:
        client = LoraHeadClient(nano.NAME, 4, seed=0, device=device)
        start = {name: p.cpu() for name, p in trained(client).items()}
        losses = [step(client, data_of(images, [0, 1, 2, 3] * 2), adam(1e-3)) for _ in range(3)]
        return start, losses, client.class_log_probs(images)

    (start, losses, log_probs), (gpu_start, gpu_losses, gpu_log_probs) = run("cpu"), run("cuda")
    assert all(torch.equal(start[name], gpu_start[name]) for name in start)
    assert gpu_losses == pytest.approx(losses, rel=1e-2)
    np.testing.assert_allclose(gpu_log_probs, log_probs, atol=5e-2)
