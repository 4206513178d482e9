"""Image features: the frozen tower's, computed once, exact, and the same whatever else is asked for."""

import copy
import threading
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tinker import types
from torch import Tensor

from kshot.errors import ImageError, RequestError
from tests.vlm.helpers import Pictured
from vlm import nano
from vlm.inputs import ImageRule, image_chunk
from vlm.local import vision
from vlm.local import vision as pixels
from vlm.local.clients import LocalTrainingClient
from vlm.local.model import tower
from vlm.local.model.tower import ImageFeatures
from vlm.local.vision import Vision
from vlm.prompts import Prompt


@pytest.fixture
def model(stock: Any, rule: ImageRule) -> Any:
    """What Vision needs of a model."""
    frozen = copy.deepcopy(stock).requires_grad_(False)
    return SimpleNamespace(
        stock=frozen, device=torch.device("cpu"), rule=rule, name=nano.NAME, timed=lambda _: nullcontext()
    )


@pytest.fixture
def chunks(examples: list[Pictured], rule: ImageRule) -> list[types.ImageChunk]:
    return [image_chunk(e.image, rule) for e in examples]


def same(some: list[ImageFeatures], others: list[ImageFeatures]) -> bool:
    """Bit for bit."""
    return all(
        a.grid == b.grid and all(map(torch.equal, (a.embeds, *a.deepstack), (b.embeds, *b.deepstack)))
        for a, b in zip(some, others, strict=True)
    )


def test_a_second_epoch_runs_the_tower_zero_times(
    client: LocalTrainingClient, prompt: Prompt, examples: list[Pictured]
) -> None:
    vision = client._engine.vision
    data = [prompt.datum(e.image, e.label) for e in examples]
    client.forward_backward(data, "cross_entropy").result()
    seen = vision.forwards
    client.forward_backward(data, "cross_entropy").result()
    assert vision.forwards == seen


def test_images_of_one_size_may_share_a_pass(
    model: Any, chunks: list[types.ImageChunk], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they do where there is no need for equal bits; not more of them than memory is there for."""
    alone = Vision(model).features(chunks)
    monkeypatch.setattr(vision, "PASS_PATCHES", 3 * 64)
    passes: list[int] = []
    monkeypatch.setattr(vision, "tower", lambda *a: (passes.append(a[3]), tower.tower(*a))[1])
    together = Vision(model)
    shared = together._encode({vision._key(chunk): chunk.data for chunk in chunks}, together=True)
    assert passes == [3, 1, 2, 2, 1, 1, 1, 1]
    for chunk, other in zip(chunks, alone, strict=True):
        one = shared[vision._key(chunk)]
        assert one.grid == other.grid
        assert torch.allclose(one.embeds, other.embeds, atol=1e-4)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(one.deepstack, other.deepstack, strict=True))


def test_the_feature_cache_is_bounded(model: Any, chunks: list[types.ImageChunk]) -> None:
    chunks = chunks[::3]  # of one size
    vision = Vision(model, cache_bytes=2 * Vision(model).features(chunks[:1])[0].values.nbytes)
    for _ in range(2):
        vision.features(chunks[:2])
    assert vision.forwards == 2
    vision.features(chunks[2:3])  # drops the oldest
    vision.features(chunks[1:2])
    assert vision.forwards == 3
    vision.features(chunks[:1])
    assert vision.forwards == 4


def test_images_are_decoded_ahead_to_the_same_bits(
    model: Any, chunks: list[types.ImageChunk], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = threading.current_thread()
    decoders: list[threading.Thread] = []

    def noted(data: bytes) -> Any:
        decoders.append(threading.current_thread())
        assert torch.get_num_threads() == 1
        return original(data)

    expected = Vision(model, threads=0).features(chunks)
    original = pixels.open_image
    monkeypatch.setattr(pixels, "open_image", noted)
    ahead = Vision(model, threads=2)
    ahead.prefetch([*chunks, *chunks])
    waiting = list(ahead._pixels._started.values())
    for each in waiting:
        each.future.result()
    assert same(ahead.features(chunks), expected)
    assert len(decoders) == len(waiting) == len(chunks)
    assert here not in decoders
    ahead.prefetch(chunks)  # known already
    assert not ahead._pixels._held
    assert not ahead._pixels._started


def test_torch_keeps_its_threads_outside_the_pool(model: Any, chunks: list[types.ImageChunk]) -> None:
    torch.set_num_threads(2)
    try:
        Vision(model, threads=1).prefetch(chunks)
        seen: list[int] = []
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert (torch.get_num_threads(), seen) == (2, [2])
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("threads", [0, 1])
def test_errors_are_raised_where_features_are_asked_for(
    model: Any, make_image: Callable[..., bytes], threads: int
) -> None:
    vision = Vision(model, threads=threads)
    good = make_image(0)
    for data, said in (
        (b"no image", "not an image"),
        (good[: len(good) // 2], "broken"),
        (make_image(0, 900, 3), "900x3"),
    ):
        chunk = types.ImageChunk(data=data, format="png")
        vision.prefetch([chunk])
        with pytest.raises(ImageError, match=said):
            vision.features([chunk])
        with pytest.raises(ImageError, match=said):
            vision.live([chunk], tower.plain)
    assert not vision._pixels._started
    wrong = types.ImageChunk(data=good, format="png", expected_tokens=3)
    for ask in (vision.features, lambda chunks: vision.live(chunks, tower.plain)):
        with pytest.raises(RequestError, match="Expected 3 tokens, got 16 from image"):
            ask([wrong])


def test_live_features_have_gradients_and_are_not_kept(model: Any, chunks: list[types.ImageChunk]) -> None:
    vision, seen = Vision(model), set[str]()
    scale = torch.ones((), requires_grad=True)

    def linear(name: str, layer: torch.nn.Module, x: Tensor) -> Tensor:
        seen.add(name)
        return layer(x) * scale

    with torch.inference_mode():
        expected = vision.features(chunks)
    live = vision.live([*chunks, chunks[0]], linear)
    assert vision.forwards == 2 * len(chunks)
    assert live[-1] is live[0]
    for one, other in zip(live, expected, strict=False):
        assert one.grid == other.grid
        assert torch.allclose(one.embeds, other.embeds, atol=1e-4)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(one.deepstack, other.deepstack, strict=True))
    torch.cat([layer for each in live for layer in (each.embeds, *each.deepstack)]).sum().backward()
    assert scale.grad is not None
    assert len(seen) == 16
    assert not any(layer.requires_grad for layer in (expected[0].embeds, *expected[0].deepstack))


def test_features_kept_on_the_device_are_found_there_and_bounded(model: Any, chunks: list[types.ImageChunk]) -> None:
    chunks = chunks[::3]  # of one size
    expected = Vision(model).features(chunks[:3])
    vision = Vision(model, cache_bytes=0, device_bytes=2 * expected[0].values.nbytes)  # nothing else keeps them
    vision.features(chunks[:2])
    again = vision.features(chunks[:2])
    assert vision.forwards == 2
    assert all(torch.equal(one.values, other.values) for one, other in zip(again, expected, strict=False))
    vision.features(chunks[2:3])  # drops the oldest
    vision.features(chunks[:1])
    assert vision.forwards == 4
