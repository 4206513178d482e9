"""What a large model takes on several GPUs, against a count by hand from its published sizes."""

import pytest

from experiments.plan import ranks
from experiments.plan.memory import vlm_size
from kshot.errors import InputError

LAYERS, HIDDEN, EXPERTS, INNER, WORDS = 94, 4096, 128, 1536, 151936  # of Qwen3-VL-235B-A22B's config.json
HEADS, KEY_HEADS, DIM = 64, 4, 128


def test_235b_on_eight_gpus() -> None:
    size = vlm_size("235B-A22B")
    assert size is not None
    attention = HIDDEN * DIM * (2 * HEADS + 2 * KEY_HEADS)
    layer = attention + EXPERTS * 3 * HIDDEN * INNER
    assert size.layer == pytest.approx(layer, rel=1e-3)
    assert size.weights == pytest.approx(LAYERS * layer + 2 * WORDS * HIDDEN, rel=5e-3)  # and a tower of 0.6e9
    of_experts = EXPERTS * ((HIDDEN + 2 * INNER) + (INNER + HIDDEN))
    of_attention = 2 * (HIDDEN + HEADS * DIM) + 2 * (HIDDEN + KEY_HEADS * DIM)
    adapter = LAYERS * (of_experts + of_attention) + HIDDEN + WORDS
    assert size.adapter_bytes(8) == pytest.approx(8 * adapter * (4 * 4 + 4 + 3 * 2), rel=1e-3)
    large, small = (ranks.plan(size, 8, memory * 1e9, 8) for memory in (141, 80))
    assert large.divided
    assert large.weights == pytest.approx((LAYERS * layer + 2 * WORDS * HIDDEN) * 2 / 8, rel=5e-3)
    assert large.fits
    assert not small.fits
    assert 95e9 < large.needed < 115e9
    assert not ranks.plan(size, 8, 141e9, 32).fits


def test_what_fits_is_not_divided() -> None:
    size = vlm_size("2B")
    assert size is not None
    found = ranks.plan(size, 2, 80e9, 32)
    assert found.fits
    assert not found.divided
    assert ranks.parsed("8x141GB") == (8, 141e9)
    with pytest.raises(InputError, match="8x141GB"):
        ranks.parsed("8 GPUs")
