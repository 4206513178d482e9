"""Drawings to pictures: plain ones to the pixel, colours against WCAG and colorsys, shapes against scipy, and seeds."""

import colorsys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats
from torch import Tensor
from torch.nn import functional

from experiments.pretrain import views
from experiments.pretrain.views import DARK, MIN_CONTRAST, Pictures
from tests.experiments.nano.drawn import masks

SEEDS = st.integers(0, 2**31)
SHARES = st.floats(0, 1)


def pictures(seed: int, side: int = 64, variety: float = 1.0) -> Pictures:
    made = Pictures(seed, side)
    made.variety = variety
    return made


def luminance(colours: np.ndarray) -> np.ndarray:
    """Relative luminance as WCAG 2.1 defines it. colours: (N, 3) of 0 to 1."""
    linear = np.where(colours <= 0.03928, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def contrast(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    low, high = np.sort([luminance(one), luminance(other)], axis=0)
    return (high + 0.05) / (low + 0.05)


def some(n: int, share: float = 0.35) -> Tensor:
    return torch.from_numpy(np.random.default_rng(n).random(n) < share)


@given(seed=SEEDS, variety=SHARES, side=st.sampled_from([48, 64, 80]), count=st.integers(1, 4))
@settings(deadline=None)
def test_pictures_are_of_0_to_1(seed: int, variety: float, side: int, count: int) -> None:
    drawn = pictures(seed, side, variety)(masks()[:count])
    assert drawn.shape == (count, 3, side, side)
    assert drawn.dtype == torch.float32
    assert drawn.isfinite().all()
    assert 0 <= drawn.min() <= drawn.max() <= 1


def test_one_seed_one_sequence_of_pictures() -> None:
    before = torch.get_rng_state()
    one, again, other = (pictures(seed) for seed in (3, 3, 4))
    first, second = one(masks()), one(masks())
    assert torch.equal(again(masks()), first)
    assert torch.equal(again(masks()), second)
    assert not torch.isclose(second, first).all((1, 2, 3)).any()
    assert not torch.isclose(other(masks()), first).all((1, 2, 3)).any()
    assert torch.equal(torch.get_rng_state(), before)


def test_without_variety_a_picture_is_the_drawing_in_black_on_white() -> None:
    """On 80 pixels a drawing takes 64: each pixel of its mask is one of the picture, but for the sampling's blur."""
    coverage = 1 - pictures(0, 80, 0.0)(masks()).numpy()
    expected = masks().numpy() / 255
    for axis in (1, 2):  # bilinear at twice the size, and the mean of two
        expected = ndimage.correlate1d(expected, [1 / 8, 3 / 4, 1 / 8], axis, mode="constant")
    assert np.allclose(coverage[:, :, 8:72, 8:72], expected[:, None], atol=1e-5)
    assert coverage[:, :, 7].max() <= 1 / 8  # the frame is white, up to that blur
    coverage[:, :, 7:73, 7:73] = 0
    assert abs(coverage).max() < 1e-6


@given(seed=SEEDS, variety=SHARES, side=st.sampled_from([48, 64]))
@settings(deadline=None)
def test_photographs_are_of_0_to_1(seed: int, variety: float, side: int) -> None:
    rng = np.random.default_rng(seed)
    seen = pictures(seed, side, variety)(torch.from_numpy(rng.integers(0, 256, (3, 3, 96, 96), dtype=np.uint8)))
    assert seen.shape == (3, 3, side, side)
    assert 0 <= seen.min() <= seen.max() <= 1


def test_without_variety_a_photograph_is_whole_or_its_mirror_image() -> None:
    """Of 96 pixels at 48: each pixel the mean of four."""
    whole = np.random.default_rng(0).integers(0, 256, (40, 3, 96, 96), dtype=np.uint8)
    seen = pictures(0, 48, variety=0.0)(torch.from_numpy(whole)).numpy()
    expected = whole.reshape(40, 3, 48, 2, 48, 2).mean((3, 5)) / 255
    as_it_is = np.isclose(seen, expected, atol=1e-4).all((1, 2, 3))
    mirrored = np.isclose(seen, expected[..., ::-1], atol=1e-4).all((1, 2, 3))
    assert (as_it_is ^ mirrored).all()
    assert 8 <= mirrored.sum() <= 32


def test_a_photograph_shows_most_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ramps: the part that is seen is inside, and at least 0.6 of it each way."""
    monkeypatch.setattr(Pictures, "degrade", lambda _, picture: picture)
    line = np.linspace(80, 180, 96).round().astype(np.uint8)
    ramps = np.stack(
        [np.broadcast_to(line, (96, 96)), np.broadcast_to(line[:, None], (96, 96)), np.full((96, 96), 130)]
    )
    seen = pictures(0)(torch.from_numpy(np.stack([ramps] * 60).astype(np.uint8))).numpy()
    across = abs(seen[:, 0, 32, -1] - seen[:, 0, 32, 0])
    along = abs(seen[:, 1, -1, 32] - seen[:, 1, 0, 32])
    np.testing.assert_allclose(across, along, rtol=0.15)  # one extent both ways, as far as clipping and rounding let
    assert across.min() > 0.6 * 100 / 255 * np.exp(-0.9) * 0.95  # light, contrast and colour take at most that


def test_half_the_variety_is_half_the_chance() -> None:
    drawn = pictures(0, variety=0.5)
    assert drawn.chance(20_000, 0.4).float().mean() == pytest.approx(0.2, abs=0.015)
    assert not pictures(0, variety=0.0).chance(1000, 0.4).any()


def test_a_drawing_stays_in_the_frame_but_for_corners_that_tilt_and_stretch_push_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The share of a drawing's ink that lies beyond the picture, by the same drawing on a ground of twice the side."""
    grids: list[tuple[Tensor, Tensor]] = []
    stock = views.sampling_grid
    monkeypatch.setattr(views, "sampling_grid", lambda *grid: grids.append(grid[:2]) or stock(*grid))
    ink = masks().float().div(255)[:, None].repeat(50, 1, 1, 1)
    glyph, _ = pictures(0).place(ink, some(len(ink)))
    matrix, place = grids[0]
    theta = torch.cat([2 * matrix, -matrix @ place[..., None]], 2)
    wide = functional.affine_grid(theta, [len(ink), 1, 256, 256], align_corners=False)
    whole = functional.grid_sample(ink, wide, align_corners=False).sum((1, 2, 3)) / 4
    lost = 1 - glyph.sum((1, 2, 3)) / whole
    assert lost.max() < 0.3
    assert lost.mean() < 0.015


def test_the_drawing_lies_on_its_button() -> None:
    ink = masks().float().div(255)[:, None].repeat(50, 1, 1, 1)
    glyph, plate = pictures(1).place(ink, torch.ones(len(ink), dtype=torch.bool))
    beyond = (glyph * (1 - plate)).sum((1, 2, 3)) / glyph.sum((1, 2, 3))
    assert beyond.max() < 0.05
    none = pictures(1).place(ink, torch.zeros(len(ink), dtype=torch.bool))
    assert torch.equal(none[0], glyph)  # the button moves nothing
    assert not none[1].any()


@given(seed=SEEDS, variety=SHARES)
@settings(deadline=None)
def test_the_ink_stands_out_from_what_is_behind_it(seed: int, variety: float) -> None:
    button = some(100)
    ground, fill, ink = (c.double().numpy() for c in pictures(seed, variety=variety).colours(button))
    assert ground.shape == fill.shape == ink.shape == (100, 3, 1, 1)
    behind = np.where(button.numpy()[:, None], fill[..., 0, 0], ground[..., 0, 0])
    assert MIN_CONTRAST == 4.5
    assert contrast(ink[..., 0, 0], behind).min() >= 4.5 - 1e-4
    assert min(c.min() for c in (ground, fill, ink)) > -1e-6
    assert max(c.max() for c in (ground, fill, ink)) < 1 + 1e-6


def test_grounds_are_light_or_dark_in_their_shares() -> None:
    ground = pictures(0).colours(some(4000))[0].numpy()[..., 0, 0]
    lightness = np.array([colorsys.rgb_to_hls(*colour)[1] for colour in ground])
    assert not ((lightness > 0.3001) & (lightness < 0.7999)).any()
    assert (lightness < 0.5).mean() == pytest.approx(DARK, abs=0.03)


@given(seed=SEEDS, light=st.floats(0, 1), strong=SHARES)
@settings(deadline=None)
def test_colours_are_those_of_colorsys(seed: int, light: float, strong: float) -> None:
    """Whatever hue was drawn: the colour is that of its hue, at the lightness and saturation asked for, or a grey."""
    made = pictures(seed).random_hues(torch.full((20,), light), torch.full((20,), strong)).double().numpy()
    for colour in made:
        hue = colorsys.rgb_to_hls(*colour)[0]
        expected = [colorsys.hls_to_rgb(hue, light, s) for s in (0.0, strong)]
        assert min(abs(colour - e).max() for e in expected) < 1e-5


def test_hues_are_uniform_and_half_the_colours_are_greys() -> None:
    made = pictures(0).random_hues(torch.full((4000,), 0.5), torch.full((4000,), 1.0)).double().numpy()
    hues = [colorsys.rgb_to_hls(*colour)[0] for colour in made if np.ptp(colour) > 0]
    assert len(hues) / len(made) == pytest.approx(0.5, abs=0.03)
    assert stats.kstest(hues, "uniform").pvalue > 0.001


@given(seed=SEEDS)
@settings(deadline=None)
def test_contrast_is_that_of_wcag(seed: int) -> None:
    rng = np.random.default_rng(seed)
    one, other = rng.random((2, 50, 3)) ** rng.integers(1, 6)  # dark ones as well
    contrasts = views.contrast(torch.from_numpy(one).float(), torch.from_numpy(other).float())
    assert np.allclose(contrasts, contrast(one, other), rtol=1e-4)


@given(seed=SEEDS)
@settings(deadline=None)
def test_thicker_thinner_and_outlined_strokes(seed: int) -> None:
    """Against scipy's filters. An outline closes at a mask's edge; thinning takes nothing from there."""
    rng, ink = np.random.default_rng(seed), np.zeros((4, 32, 32), np.float32)
    for each in ink:
        for _ in range(2):  # overlapping boxes, thick enough to be thinned
            (top, left), (height, width) = rng.integers(0, 16, 2), rng.integers(12, 32, 2)
            box = each[top : top + height, left : left + width]
            np.maximum(box, rng.uniform(0.5, 1), out=box)
    for change, expected in (
        (views.dilated, [ndimage.maximum_filter(each, 3, mode="nearest") for each in ink]),
        (views.eroded, [ndimage.minimum_filter(each, 3, mode="nearest") for each in ink]),
        (views.outlined, [each - ndimage.minimum_filter(each, 5, mode="constant") for each in ink]),
    ):
        assert np.allclose(change(torch.from_numpy(ink)[:, None])[:, 0], expected)


def test_hairlines_are_not_thinned_away() -> None:
    ink = torch.zeros(2, 1, 64, 64)
    ink[0, :, 30:32] = 1
    ink[1, :, 20:40] = 1
    thin = views.eroded(ink)
    assert torch.equal(thin[0], ink[0])
    assert thin[1].sum() == 18 * 64


def coverage(half: float, corner: float, scale: float, side: int) -> np.ndarray:
    """Share of each pixel inside a square with rounded corners, by 16 x 16 points in it."""
    fine = (np.arange(16 * side) + 0.5) / (16 * scale) - side / (2 * scale)
    beyond = abs(np.stack(np.meshgrid(fine, fine))) - (half - corner)
    inside = (beyond.max(0) <= corner) & ((np.hypot(*beyond.clip(min=0)) <= corner) | (beyond.min(0) <= 0))
    return inside.reshape(side, 16, side, 16).mean((1, 3))


@given(half=st.floats(0.3, 0.9), roundness=st.sampled_from([1.0, 0.5, 0.2, 0.01]))
@settings(deadline=None)
def test_buttons_are_rounded_squares_and_discs(half: float, roundness: float) -> None:
    side = 64
    line = (torch.arange(side) + 0.5) * 2 / side - 1
    at = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)[None]
    values = (torch.tensor([v], dtype=torch.float32) for v in (half, half * roundness, side / 2))
    square = views.rounded_square(at, *values).numpy()[0]
    assert square.shape == (side, side)
    apart = abs(square - coverage(half, half * roundness, side / 2, side))
    assert apart.max() < 0.3  # a sharp corner covers a quarter of its pixel
    area = 4 * half**2 - (4 - np.pi) * (half * roundness) ** 2
    assert square.sum() / (side / 2) ** 2 == pytest.approx(area, rel=0.02)


def test_what_spoils_a_picture_leaves_most_of_it() -> None:
    """Noise of at most 0.08, a blur over three pixels, and a patch of one colour of at most 0.35 by 0.35."""
    grey = torch.full((400, 3, 64, 64), 0.5)
    spoilt = pictures(0).degrade(grey)
    patch = pictures(0).hide_patch(grey) - grey
    hidden = (patch.abs().amax(1) > 0).float().mean((1, 2))
    assert (hidden > 0).float().mean() == pytest.approx(views.HIDDEN, abs=0.06)
    assert hidden.max() <= 0.36**2
    assert (spoilt - grey).abs().flatten(1).median(1).values.max() < 0.08
    assert (spoilt == grey).all((1, 2, 3)).float().mean() == pytest.approx(
        (1 - views.NOISY) * (1 - views.HIDDEN), abs=0.07
    )
