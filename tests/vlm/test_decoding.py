"""Images decoded ahead of time: once, within bounds, and by whoever gets to it first."""

import threading

import pytest
import torch
from tinker import types

from vlm.inputs import ImageRule
from vlm.local import vision


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
