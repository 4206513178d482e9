"""How many labelled examples an accuracy takes: against numpy's interpolation, and what must always hold."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reported import SWEEP, cell, grid, written

from experiments.report.comparisons import ShotsNeeded, efficiency_table, shots_needed, target_accuracies
from experiments.report.tables import NONE

SHOTS = (0, 1, 2, 3, 4, 8, 10, 16)
shares = st.integers(0, 200).map(lambda n: n / 200)
curves = st.dictionaries(st.sampled_from(SHOTS), shares, min_size=1)


@given(curves, shares, shares)
def test_a_higher_accuracy_never_takes_fewer(curve: dict[int, float], one: float, other: float) -> None:
    low, high = shots_needed(curve, min(one, other)), shots_needed(curve, max(one, other))
    if high is None:
        assert max(curve.values()) < max(one, other)
    else:
        assert low is not None
        assert low.measured <= high.measured
        assert low.shots <= high.shots + 1e-9


@given(curves, shares)
def test_the_least_measured_is_that_of_a_plain_search(curve: dict[int, float], other: float) -> None:
    """For what was measured and for another accuracy; at the accuracy of some shots, it is exact."""
    for target in (*curve.values(), other):
        reached = sorted(k for k, mean in curve.items() if mean >= target)
        found = shots_needed(curve, target)
        assert (found.measured if found else None) == (reached[0] if reached else None)
        if found:
            before = max((k for k in curve if k < found.measured), default=0)
            assert found.at_most or found.measured <= 1 or before <= found.shots
            assert found.shots <= found.measured
            assert found.shots == found.measured or curve[found.measured] != target


def test_between_measured_points_it_is_what_numpy_interpolates() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        shots = np.sort(rng.choice(np.arange(1, 33), 5, replace=False))
        means = np.sort(rng.random(5))
        for target in rng.uniform(means[0], means[-1], 5):
            found = shots_needed(dict(zip(shots.tolist(), means.tolist(), strict=True)), target)
            assert found is not None
            assert found.shots == pytest.approx(2 ** np.interp(target, means, np.log2(shots)))


def test_where_there_is_nothing_to_draw_a_line_from() -> None:
    assert shots_needed({4: 0.5, 8: 0.7}, 0.4) == ShotsNeeded(4, 4.0, at_most=True)
    assert shots_needed({0: 0.3, 4: 0.5}, 0.4) == ShotsNeeded(4, 4.0, at_most=True)  # 0 has no logarithm
    assert shots_needed({1: 0.5}, 0.4) == ShotsNeeded(1, 1.0)  # there are no fewer than 1
    assert shots_needed({0: 0.5, 1: 0.7}, 0.4) == ShotsNeeded(0, 0.0)
    assert shots_needed({1: 0.5, 2: 0.3, 4: 0.7}, 0.6) == ShotsNeeded(4, pytest.approx(2 * 2**0.75))
    assert shots_needed({1: 0.5, 4: 0.1 + 0.2}, 0.3) == ShotsNeeded(1, 1.0)
    assert shots_needed({1: 0.1, 4: 0.7 + 0.1 - 1e-12}, 0.8) == ShotsNeeded(4, 4.0)  # but for rounding
    assert shots_needed({1: 0.5}, 0.6) is None


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ((0.55, 0.96), [60, 70, 80, 90]),
        ((0.30, 0.70), [30, 40, 50, 60, 70]),
        ((0.08, 0.82), [20, 40, 60, 80]),
        ((0.93, 0.984), [94, 96, 98]),
        ((0.88, 0.96), [90, 95]),
        ((0.942, 0.948), []),
        ((0.0, 0.004), []),
    ],
)
def test_targets_are_round_and_few(means: tuple[float, float], expected: list[int]) -> None:
    assert target_accuracies([{1: means[0], 4: means[1]}]) == expected
    assert target_accuracies([{0: 0.01, 1: means[0]}, {4: means[1]}]) == expected


@given(st.lists(st.dictionaries(st.sampled_from(SHOTS[1:]), shares, min_size=1), min_size=1, max_size=4))
def test_targets_are_at_most_five_and_reached_by_somebody(several: list[dict[int, float]]) -> None:
    found = target_accuracies(several)
    assert len(found) <= 5
    assert found == sorted(set(found))
    assert all(0 < target <= 100 for target in found)
    assert all(any(shots_needed(curve, target / 100) for curve in several) for target in found)


def test_the_table_of_a_report(tmp_path) -> None:
    """grid(): VLM + LoRA 25, 32, 82 % at 0, 1, 4; pixel kNN 33, 42 % at 1, 4."""
    text, _ = written(tmp_path, SWEEP, grid())
    at = [2 ** np.interp(target, (32, 82), (0, 2)) for target in (40, 50, 60, 70, 80)]
    vlm = " | ".join(f"4 ({shots:.1f})" for shots in at)
    knn = f"4 ({2 ** np.interp(40, (33, 42), (0, 2)):.1f})"
    assert "| method | 40 % | 50 % | 60 % | 70 % | 80 % |" in text
    assert f"| VLM + LoRA | {vlm} |" in text
    assert f"| pixel kNN | {knn} | {' | '.join([NONE] * 4)} |" in text
    assert "ratio of" not in text
    assert "straight in log2" in text


def test_the_ratio_of_the_two_main_methods() -> None:
    vlm, dino = {1: 0.5, 4: 0.9}, {1: 0.4, 4: 0.6, 16: 0.8}
    cells = [cell("vlm-lora", k, 0, mean) for k, mean in vlm.items()]
    cells += [cell("dinov2-lora", k, 0, mean) for k, mean in dino.items()]
    table = efficiency_table(cells, "icons")
    assert table is not None
    assert table.header == ("method", "40 %", "60 %", "80 %")
    ours = [1, *(2 ** np.interp(target, (0.5, 0.9), (0, 2)) for target in (0.6, 0.8))]
    theirs = [2 ** np.interp(target, (0.4, 0.6, 0.8), (0, 2, 4)) for target in (0.4, 0.6, 0.8)]
    ratios = [f"{a / b:.2f}" for a, b in zip(ours, theirs, strict=True)]
    assert [*table.rows[-1]] == ["ratio of VLM + LoRA to DINOv2 + LoRA", *ratios]
    assert "below 1, the first method needs fewer" in table.caption


def test_a_ratio_of_what_is_only_bounded_is_a_bound() -> None:
    cells = [cell("vlm-lora", k, 0, mean) for k, mean in ((4, 0.7), (8, 0.9))]
    cells += [cell("dinov2-lora", k, 0, mean) for k, mean in ((4, 0.5), (8, 0.7))]
    table = efficiency_table(cells, "icons")
    assert table is not None
    assert table.header[1:] == ("50 %", "60 %", "70 %", "80 %", "90 %")
    shown = [[*row[1:]] for row in table.rows]
    assert shown[0][:3] == ["≤ 4", "≤ 4", "4"]
    assert shown[1] == ["4", f"8 ({4 * 2**0.5:.1f})", "8", NONE, NONE]
    assert shown[2] == ["≤ 1.00", f"≤ {2**-0.5:.2f}", "0.50", NONE, NONE]


def test_nothing_learns_nothing_needed() -> None:
    assert efficiency_table([cell("vlm-zero-shot", 0, 0, 0.5)], "icons") is None
    assert efficiency_table([cell("vlm-lora", 1, 0, 0.0)], "icons") is None
