"""Published rows in figures: which are drawn, where, and that our own curves keep their room; all sets together."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from reported import axes_height, cell, grid

from experiments.report.figures import (
    COLOUR,
    draw_dataset,
    draw_overview,
    fit_to_axis,
    legend_label,
    published_note,
    value_range,
    visible_values,
)
from experiments.report.references import ALL, Reference, published, references_to_draw
from experiments.sweep.metrics import scores
from experiments.sweep.series import Choice, Series, style

VIT_B = "vit_base_patch14_dinov2.lvd142m"
BENCHMARKS = ("caltech101", "cars", "flowers", "pets")


def curve(method: str, means: dict[int, float], dataset: str = "cars") -> list[dict]:
    return [cell(method, k, seed, mean, dataset) for k, mean in means.items() for seed in (0, 1)]


def lines(drawn: Figure) -> dict[str, np.ndarray]:
    """The grey lines: legend's name → (points, 2)."""
    return {
        str(line.get_label()): np.asarray(line.get_xydata())
        for line in drawn.axes[0].lines
        if line.get_color() == COLOUR
    }


@pytest.mark.parametrize("dataset", BENCHMARKS)
def test_a_few_rows_are_chosen(dataset: str) -> None:
    clip = ["zero-shot CLIP", "Tip-Adapter-F"]
    assert [row.method for row in references_to_draw(dataset, ["kshot/nano-dinov2"])] == clip
    assert [row.method for row in references_to_draw(dataset, [VIT_B])] == [*clip, "DINOv2 ViT-B/14"]
    two = ["vit_small_patch14_dinov2.lvd142m", "vit_giant_patch14_dinov2.lvd142m"]
    assert [row.method for row in references_to_draw(dataset, two)] == [*clip, "DINOv2 ViT-S/14", "DINOv2 ViT-g/14"]
    assert {row.dataset for row in references_to_draw(dataset, two)} == {dataset}


def test_other_sets_have_none() -> None:
    assert references_to_draw("icons", [VIT_B]) == references_to_draw("folder:cars", [VIT_B]) == []


def test_they_lie_where_they_were_published() -> None:
    ours = scores(curve("vlm-lora", {1: 0.6, 16: 0.86}) + curve("vlm-zero-shot", {0: 0.5}), "cars")
    drawn = lines(draw_dataset(ours, "title", 196, references_to_draw("cars", [VIT_B])))
    values = {row.method: row.values for row in published("cars")}
    tip = values["Tip-Adapter-F"]
    assert [*drawn] == [
        "zero-shot CLIP (published)",
        "Tip-Adapter-F (published)",
        "DINOv2 ViT-B/14, full data (published)",
    ]
    assert drawn["Tip-Adapter-F (published)"] == pytest.approx(np.array([(np.log2(k), v) for k, v in tip.items()]))
    assert set(drawn["zero-shot CLIP (published)"][:, 1]) == {values["zero-shot CLIP"][0]}
    assert set(drawn["DINOv2 ViT-B/14, full data (published)"][:, 1]) == {values["DINOv2 ViT-B/14"][ALL]}


def test_the_axis_has_room_for_them_but_ours_keep_half() -> None:
    for dataset in BENCHMARKS:
        for means in ({1: 0.10, 16: 0.3}, {1: 0.6, 16: 0.9}, {4: 0.95, 16: 0.97}, {1: 0.02, 2: 0.99}):
            ours = scores(curve("vlm-lora", means, dataset), dataset)
            low, high = value_range(ours, None)
            rows = references_to_draw(dataset, [VIT_B])
            figure = draw_dataset(ours, "title", None, rows)
            bottom, top = figure.axes[0].get_ylim()
            assert bottom <= low <= high <= top
            assert top - bottom <= 1.05 * 2 * max(20, 10 * np.ceil(high / 10 + 0.1) - 10 * np.floor(low / 10 - 0.1))
            inside, outside = fit_to_axis(rows, (low, high), [*means])
            assert sorted(map(legend_label, inside)) == sorted(lines(figure))
            for row in inside:
                assert all(bottom <= value <= top for value in visible_values(row, [*means]))
            assert {row.method for row in (*inside, *outside)} == {row.method for row in rows}


def test_what_is_beyond_the_axis_is_named_with_its_numbers() -> None:
    ours = scores(curve("vlm-lora", {1: 0.1, 16: 0.3}, "caltech101"), "caltech101")
    figure = draw_dataset(ours, "title", 101, references_to_draw("caltech101", []))
    assert lines(figure) == {}
    (legend,) = figure.legends
    note = legend.get_title().get_text().replace("\n", " ")
    assert note == (
        "Published by others under other protocols, beyond the axis: zero-shot CLIP 85.9; Tip-Adapter-F 89.3 to 92.9."
    )
    assert not any("published" in text.get_text() for text in legend.get_texts())


def test_only_what_the_axis_shows_of_a_row_counts() -> None:
    row = Reference("cars", "m", "p", "s", {1: 20.0, 4: 40.0, 16: 80.0}, 1)
    assert visible_values(row, [1, 16]) == pytest.approx([20, 40, 80])
    assert visible_values(row, [0, 2, 8]) == pytest.approx([30, 40, 60])  # straight in log2
    assert visible_values(row, [10]) == pytest.approx([np.interp(np.log2(10), (0, 2, 4), (20, 40, 80))])
    assert visible_values(row, [32]) == visible_values(row, [0]) == []
    assert fit_to_axis([row], (10, 90), [32]) == ([], [])
    assert visible_values(Reference("cars", "m", "p", "s", {ALL: 90.0}, 1), [0]) == [90.0]
    assert published_note([], [], [1]) == ""


def test_the_axes_keep_their_size_with_many_series_and_with_published_rows() -> None:
    """What is below them gets room of its own."""
    row = scores(curve("vlm-lora", {1: 0.6, 16: 0.86}), "cars")["vlm-lora"]
    heights = []
    published_rows = references_to_draw("cars", [VIT_B])
    for count, rows in ((1, []), (1, published_rows), (8, published_rows), (16, [])):
        table = {Series("dinov2-logreg", [Choice("image_size", 14 * n, n, count)]): row for n in range(count)}
        figure = draw_dataset(table, "title", 10, rows)
        heights.append(axes_height(figure))
        assert {text.get_text() for text in figure.legends[0].get_texts()} >= {style(series).title for series in table}
    assert heights == pytest.approx([heights[0]] * 4, rel=0.3)
    assert min(heights) > 3


@pytest.mark.parametrize("count", [2, 3, 7])
def test_all_sets_on_one_page_with_one_legend(count: int) -> None:
    names = [f"set {n} {'x' * 60}" for n in range(count)]
    tables = {name: scores(grid(name), name) for name in names}
    tables[names[0]] = {m: row for m, row in tables[names[0]].items() if m != "vlm-lora"}
    figure = draw_overview(tables, "title", {names[0]: 10})
    figure.draw_without_rendering()
    assert len(figure.axes) == count
    assert len({axes.get_xlim() for axes in figure.axes}) == 1
    assert len({tuple(axes.get_xticks()) for axes in figure.axes}) == 1
    panels = ["".join(axes.get_title(loc="left").split()) for axes in figure.axes]
    assert panels == ["".join(name.split()) for name in names]
    (legend,) = figure.legends
    titles = [style(m).title for m in ("vlm-zero-shot", "vlm-lora", "pixel-knn")]
    assert [text.get_text() for text in legend.get_texts()] == [*titles, "chance"]
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    for n, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.width + 1
        assert box.y0 >= legend.get_window_extent().y1 - 1
        assert not any(box.overlaps(other) for other in boxes[:n])
    labelled = [axes.get_xlabel() != "" for axes in figure.axes]
    assert sum(labelled) == min(3, int(np.ceil(np.sqrt(count))))
