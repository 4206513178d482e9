"""Figures, how methods look in them, and how names from the outside are shown."""

import re

import pytest
from reported import cell, grid

from experiments.report.figures import write_dataset_figure
from experiments.sweep.provenance import TOGETHER, file_stem, name, without_paths
from experiments.sweep.series import STYLES, ordered, style
from kshot.errors import ResultsError


@pytest.mark.parametrize(
    "cells",
    [
        [cell("vlm-lora", 4, 0, 0.5)],
        [cell("vlm-zero-shot", 0, 0, 1.0)],
        [cell("made-up", 1, s, 0.0) for s in (0, 1)],
        [c for c in grid() if c["method"] != "vlm-lora" or c["shots"] == 1],
        [cell("vlm-zero-shot", 0, 0, a) | {"test_images": 10} for a in (0.0, 1.0)],
        [cell("vlm-lora", 1, 0, a) | {"test_images": 3} for a in (0.0,)],
    ],
    ids=["one seed", "zero-shot only", "unknown method", "gaps", "two zero-shot runs", "none right"],
)
def test_figure_of_little(tmp_path, cells):
    png, svg = write_dataset_figure(cells, "icons", tmp_path / "deep" / "er", n_classes=10)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in svg.read_text()


def test_a_curve_is_drawn_from_the_model_untuned_on(tmp_path):
    """The lines of the SVG in the colour of VLM + LoRA: from 0 to the gap, and from the gap to 1."""
    colour = style("vlm-lora").colour.lower()
    counts = []
    for number, cells in enumerate((grid(), [c for c in grid() if c["shots"]])):
        _, svg = write_dataset_figure(cells, "icons", tmp_path / str(number))
        counts.append(
            len(re.findall(rf'<path d="[^"]*" clip-path="[^"]*" style="fill: none; stroke: {colour}', svg.read_text()))
        )
    assert counts[0] - counts[1] == 2


def test_figure_of_a_name_in_another_script_and_of_nothing(tmp_path):
    assert write_dataset_figure([cell("vlm-lora", 1, 0, 0.5, "$\\frac$ 猫")], "$\\frac$ 猫", tmp_path)
    with pytest.raises(ResultsError, match="no cell of data set 'pets'"):
        write_dataset_figure(grid(), "pets", tmp_path)


def test_styles_can_be_told_apart():
    assert len({look.colour for look in STYLES.values()}) == len({look.marker for look in STYLES.values()}) == 11
    assert style("made-up").title == "made-up"
    assert ordered(["zz", "pixel-knn", "aa", "vlm-lora"]) == ["vlm-lora", "pixel-knn", "aa", "zz"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("--root /home/lovelace/data --k 1", "--root …/data --k 1"),
        ("--out=/tmp/x", "--out=…/x"),
        ("Qwen/Qwen3-VL at http://localhost:8000/v1 is n/a, 1/40", None),
        ("./runs/x ../y ~/z", None),
        ("file:///home/lovelace/x", "file://…/x"),
        (r"C:\Users\ada\x", "…/x"),
        ('"/home/lovelace/x"', '"…/x"'),
    ],
)
def test_without_paths(text, shown):
    shown = shown or text
    assert without_paths(text) == shown
    assert without_paths(shown) == shown


def test_names_with_spaces_and_file_stems():
    assert name("folder:/home/lovelace/my photos") == "folder:…/my photos"
    assert name("folder:my/photos") == "folder:my/photos"
    assert file_stem("oxford_flowers102") == "oxford_flowers102"
    odd = ("folder:my/photos", "folder:my-photos", "folder:/a/my/photos", "..", "猫", "Icons", "together")
    stems = {TOGETHER, *map(file_stem, odd)}
    assert len(stems) == 8
    assert all(re.fullmatch(r"[a-z0-9_-]+", stem) for stem in stems)
