"""Image features: the frozen tower's, computed once, exact, and the same whatever else is asked for; and images decoded
ahead of time: once, within bounds, and by whoever gets to it first."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tinker import types
from torch import Tensor

from kshot.errors import ImageError, RequestError
from tests.vlm.helpers import Pictured
from vlm.inputs import ImageRule
from vlm.local import vision
from vlm.local.clients import LocalTrainingClient
from vlm.local.model import tower
from vlm.local.model.tower import ImageFeatures
from vlm.local.vision import Vision
from vlm.prompts import Prompt


def close(one: ImageFeatures, other: ImageFeatures) -> bool:
    return one.grid == other.grid and torch.allclose(one.values, other.values, atol=1e-4)


def same(some: list[ImageFeatures], others: list[ImageFeatures]) -> bool:
    """Bit for bit."""
    return all(a.grid == b.grid and torch.equal(a.values, b.values) for a, b in zip(some, others, strict=True))


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
    shared = together._together({vision._key(chunk): chunk.data for chunk in chunks})
    assert passes == [3, 1, 2, 2, 1, 1, 1, 1]
    assert together._tables.cache_info().misses == 3  # made once a size
    assert all(close(shared[vision._key(chunk)], other) for chunk, other in zip(chunks, alone, strict=True))


@pytest.mark.parametrize("place", ["cache_bytes", "device_bytes"])
def test_a_feature_cache_is_bounded(model: Any, chunks: list[types.ImageChunk], place: str) -> None:
    chunks = chunks[::3]  # of one size
    expected = Vision(model).features(chunks[:3])
    limits = {"cache_bytes": 0, place: 2 * expected[0].values.nbytes}
    vision = Vision(model, **limits)
    vision.features(chunks[:2])
    assert same(vision.features(chunks[:2]), expected[:2])
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
    original = vision.open_image
    monkeypatch.setattr(vision, "open_image", noted)
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
            vision.features([chunk], tower.plain)
    assert not vision._pixels._started
    wrong = types.ImageChunk(data=good, format="png", expected_tokens=3)
    for linear in (None, tower.plain):
        with pytest.raises(RequestError, match="Expected 3 tokens, got 16 from image"):
            vision.features([wrong], linear)


def test_live_features_have_gradients_and_are_not_kept(model: Any, chunks: list[types.ImageChunk]) -> None:
    vision, seen = Vision(model), set[str]()
    scale = torch.ones((), requires_grad=True)

    def linear(name: str, layer: torch.nn.Module, x: Tensor) -> Tensor:
        seen.add(name)
        return layer(x) * scale

    with torch.inference_mode():
        expected = vision.features(chunks)
    live = vision.features([*chunks, chunks[0]], linear)
    assert vision.forwards == 2 * len(chunks)
    assert live[-1] is live[0]
    assert all(close(one, other) for one, other in zip(live, [*expected, expected[0]], strict=True))
    sum(each.values.sum() for each in live).backward()
    assert scale.grad is not None
    assert len(seen) == 22  # of the blocks and the mergers
    assert not expected[0].values.requires_grad


def test_decoding_ahead_takes_no_core_from_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for used, spare in ((1, 0), (2, 4), (6, 2), (8, 0), (16, 0)):
        monkeypatch.setattr(torch, "get_num_threads", lambda used=used: used)
        assert vision.spare_threads(torch.device("cpu")) == spare
        assert vision.spare_threads(torch.device("cuda")) == 4


def test_what_nobody_takes_does_not_pile_up(
    rule: ImageRule, chunks: list[types.ImageChunk], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(vision.PixelLoader(rule, 0).take(b"", chunks[0].data).pixels.flatten()) * 4
    loader = vision.PixelLoader(rule, threads=1, limit=2 * size)
    for number, chunk in enumerate(chunks[::3]):  # of one size
        loader.start(bytes([number]), chunk.data)
    assert (len(loader._started), loader._held) == (2, 2 * size)
    monkeypatch.setattr(vision, "ABANDONED", -1)
    loader.start("later", chunks[9].data)
    assert list(loader._started) == ["later"]
    loader.drop("later")
    assert loader._held == 0


def test_an_image_that_two_requests_wait_for_is_decoded_once(
    rule: ImageRule, chunks: list[types.ImageChunk], monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = vision.PixelLoader(rule, threads=1)
    for _ in range(2):
        loader.start("key", chunks[0].data)
    first = loader._started["key"].future.result()
    monkeypatch.setattr(loader, "_make", None)
    assert loader.take("key", chunks[0].data) is loader.take("key", chunks[0].data) is first
    assert not loader._held


def test_an_image_that_no_thread_has_begun_is_decoded_by_who_needs_it(
    rule: ImageRule, chunks: list[types.ImageChunk]
) -> None:
    loader, gate = vision.PixelLoader(rule, threads=1), threading.Event()
    loader._pool.submit(gate.wait)
    loader.start("key", chunks[0].data)
    try:
        assert torch.equal(loader.take("key", chunks[0].data).pixels, loader._make(chunks[0].data).pixels)
    finally:
        gate.set()
