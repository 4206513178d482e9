"""Reports of sweeps that compare: series by what cells were run with, and how they are named, drawn and counted."""

import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reported import SWEEP, Page, cell, store_predictions, written

from experiments.cli.sweep import print_summary
from experiments.report.figures import series_shifts
from experiments.report.tables import full_grid
from experiments.sweep.methods import METHODS
from experiments.sweep.series import (
    STYLES,
    Choice,
    Series,
    by_series,
    choices_of,
    from_zero,
    method_of,
    number_of,
    ordered,
    style,
    zero_shot_of,
)
from kshot.errors import ResultsError

COMPARE: dict[str, list[Any]] = {
    "backbone": ["vit_small_patch14_dinov2.lvd142m", "vit_base_patch14_dinov2.lvd142m"],
    "image_size": [None, 518],
    "readout": ["cls", "last4"],
}
TWO = {"image_size": [None, 518], "readout": ["cls", "last4"]}
WORDS = ["own size, cls", "own size, last4", "518 px, cls", "518 px, last4"]
METHOD = "dinov2-logreg"


def sweep(compare: dict[str, list[Any]], **more: Any) -> dict[str, Any]:
    methods = ["vlm-zero-shot", "vlm-lora", METHOD, "pixel-knn"]
    return {**SWEEP, "methods": methods, "settings": compare, "compare": compare, **more}


def grid(compare: dict[str, list[Any]], seeds: int = 2) -> list[dict[str, Any]]:
    """Cells of all methods at 1 and 4 shots; the n-th values (from 0) add n points."""
    cells = [cell("vlm-zero-shot", 0, 0, 0.1)]
    for k, seed in product((1, 4), range(seeds)):
        cells += [cell("vlm-lora", k, seed, 0.2 + 0.1 * k), cell("pixel-knn", k, seed, 0.05 * k)]
        for n, values in enumerate(product(*compare.values())):
            under = dict(zip(compare, values, strict=True))
            one = cell(METHOD, k, seed, 0.3 + 0.1 * k + 0.01 * n)
            cells.append({**one, "key": f"{one['key']}-{n}", "settings": {"rank": 1, **under}})
    return cells


def choices(place: int = 0) -> list[Choice]:
    return [Choice("readout", TWO["readout"][place], place, 2)]


def test_what_reads_compared_settings_becomes_series() -> None:
    after, cells = by_series(sweep(TWO), grid(TWO))
    assert [method_of(m) for m in after["methods"]] == ["vlm-zero-shot", "vlm-lora", *[METHOD] * 4, "pixel-knn"]
    assert len(set(after["methods"])) == 7
    assert [number_of(m) for m in after["methods"][2:6]] == [0, 1, 2, 3]
    for before, found in zip(grid(TWO), cells, strict=True):
        values = {choice.setting: choice.value for choice in choices_of(found["method"])}
        assert values == {name: value for name, value in before["settings"].items() if name in TWO}
        assert found["method"] in after["methods"]
        assert found | {"method": None} == before | {"method": None}
    assert by_series(after, cells) == (after, cells)  # done once, done for good


def test_prompts_and_settings_are_compared_side_by_side() -> None:
    both = sweep({"vlm_features": ["tower", "hidden"]}, prompts=["recipe", "other"], methods=["vlm-vision-linear"])
    asking = replace(METHODS["vlm-vision-linear"], settings=("prompt", "vlm_features"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "vlm-vision-linear", asking)
        series = by_series(both, [])[0]["methods"]
    titles = ["prompt 1, tower", "prompt 1, hidden", "prompt 2, tower", "prompt 2, hidden"]
    assert [style(each).title for each in series] == [f"VLM features + linear ({words})" for words in titles]


@pytest.mark.parametrize(
    ("settings", "has"),
    [
        ({"readout": "cls+mean", "image_size": None}, "readout 'cls+mean'; the sweep's are: ['cls', 'last4']"),
        ({"readout": "cls", "image_size": 64}, "image_size 64; the sweep's are: [None, 518]"),
        ({"readout": "cls"}, "no image_size; the sweep's are: [None, 518]"),
    ],
)
def test_a_cell_of_another_value_is_refused(settings: dict[str, Any], has: str) -> None:
    odd = cell(METHOD, 1, 0, 0.5) | {"settings": settings}
    with pytest.raises(ResultsError, match=re.escape(f"cell {METHOD}-1-0 has {has}")):
        by_series(sweep(TWO), [odd])


def test_one_value_makes_no_series() -> None:
    one = sweep({"readout": ["cls"]})
    assert by_series(one, grid({})) == (one, grid({}))


def test_the_untuned_model_is_that_of_the_choices_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = Choice("prompt", "recipe", 0, 2)
    tuned = Series("vlm-lora", [prompt, *choices(1)])
    untuned = zero_shot_of(tuned)
    assert untuned == Series("vlm-zero-shot", [prompt])
    assert choices_of(untuned) == (prompt,)
    assert type(zero_shot_of(Series("vlm-lora", choices()))) is str
    table = {"vlm-zero-shot": {0: 1}, Series("vlm-lora", choices(0)): {1: 2}, Series("vlm-lora", choices(1)): {1: 3}}
    assert [*from_zero(table).values()] == [{0: 1}, {0: 1, 1: 2}, {0: 1, 1: 3}]
    row = METHODS["vlm-zero-shot"]
    monkeypatch.setitem(METHODS, "vlm-zero-shot", replace(row, settings=(*row.settings, "readout")))
    assert zero_shot_of(tuned) == Series("vlm-zero-shot", [prompt, *choices(1)])


def test_titles_say_what_is_compared_alone() -> None:
    series, _ = by_series(sweep(TWO), [])
    assert [style(m).title for m in series["methods"][2:6]] == [f"DINOv2 + logistic regression ({w})" for w in WORDS]
    sizes, _ = by_series(sweep({"image_size": [None, 518]}), [])
    assert style(sizes["methods"][3]).title == "DINOv2 + logistic regression (518 px)"
    models, _ = by_series(sweep({"backbone": COMPARE["backbone"]}), [])
    assert style(models["methods"][2]).title == "DINOv2 + logistic regression (vit_small_patch14_dinov2.lvd142m)"
    assert style("vlm-lora") == STYLES["vlm-lora"]


@pytest.mark.parametrize("sizes", [(20,), (5, 4), (4, 5), (2, 2, 2), (2, 2, 5), (3, 3, 2)])
@pytest.mark.parametrize("method", [*STYLES, "made-up"])
def test_twenty_series_of_a_method_look_different(method: str, sizes: tuple[int, ...]) -> None:
    each = [[Choice(f"setting {n}", value, value, of) for value in range(of)] for n, of in enumerate(sizes)]
    looks = [style(Series(method, under)) for under in product(*each)]
    assert len({(look.colour, look.hollow, look.line) for look in looks}) == len(looks) == np.prod(sizes)
    assert len({look.title for look in looks}) == len(looks)
    assert {look.marker for look in looks} == {style(method).marker}
    assert looks[0]._replace(title="") == style(method)._replace(title="")


def test_a_line_stands_for_the_first_setting() -> None:
    series = by_series(sweep(COMPARE), [])[0]["methods"][2:10]
    lines = [style(each).line for each in series]
    assert lines[:4] == [lines[0]] * 4 != lines[4:] == [lines[4]] * 4
    shades = [(look.colour, look.hollow) for look in map(style, series)]
    assert shades[:4] == shades[4:]


def test_the_report_names_every_series(tmp_path: Path) -> None:
    gone = f"{METHOD}-4-1-3"
    there = [c for c in grid(TWO) if c["key"] != gone]
    text, page = written(tmp_path, sweep(TWO, seeds=[0, 1]), there, n_classes={"icons": 20})
    assert "4 methods were compared on icons with 1 to 4 labelled examples per class (2 seeds, 2 image sizes," in text
    assert "2 readouts)" in text
    assert f"at 1 per class, DINOv2 + logistic regression ({WORDS[3]}) is best with 43.0" in text
    assert "Cells not run yet: 1." in text
    assert f"| icons | DINOv2 + logistic regression ({WORDS[3]}) | 1 | 4 |" in text
    for n, words in enumerate(WORDS):
        start = f"| DINOv2 + logistic regression ({words}) | "
        row = next(line for line in text.splitlines() if line.startswith(start))
        assert [field.strip(" *")[:4] for field in row.split("|")[3:5]] == [f"{40 + n}.0", f"{70 + n}.0"]
    assert "| pixel kNN | \N{EN DASH} | 5.0 ± 0.0 | 20.0 ± 0.0 |" in text
    assert "| VLM + LoRA | 10.0 | 30.0 ± 0.0 | 60.0 ± 0.0 |" in text
    assert "(n=1)" in text
    assert not Page(page).open
    assert f"DINOv2 + logistic regression ({WORDS[1]})" in page


def test_every_series_is_planned() -> None:
    compared = sweep(TWO, seeds=[0, 1])
    plan = full_grid(compared, grid(TWO))
    assert len(plan) == len(set(plan)) == 1 + 4 + 4 * 4 + 4
    assert {(c["dataset"], c["method"], c["shots"], c["seed"]) for c in by_series(compared, grid(TWO))[1]} == set(plan)


def test_differences_and_confusions_are_of_series(tmp_path: Path) -> None:
    cells = [c for c in grid(TWO) if c["method"] == METHOD]
    store_predictions(tmp_path, cells)
    named = sweep(TWO, classes={"icons": [f"kind {n}" for n in range(10)]}, methods=[METHOD])
    text, _ = written(tmp_path, named, cells)
    assert f"(DINOv2 + logistic regression ({WORDS[3]})) minus each other" in text
    rows = re.findall(r"\| DINOv2 \+ logistic regression \((.*)\) \| (\d) \| 2 \| \+(\d\.\d) \|", text)
    assert rows == [(words, k, f"{3 - n}.0") for k in "14" for n, words in enumerate(WORDS[:3])]
    assert re.findall(r"(.*) at k = 4: the most frequent", text) == [f"DINOv2 + logistic regression ({WORDS[3]})"]


def test_no_series_leaves_the_place_of_its_shots() -> None:
    many = {Series(METHOD, [Choice("image_size", n, n, 40)]): {1: None} for n in range(40)}
    shifts = series_shifts(many).values()
    assert max(shifts) - min(shifts) <= 0.5
    assert len(set(shifts)) == 40


def test_the_summary_fits_into_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    shots = (1, 2, 4, 8, 16)
    wide = [{**c, "shots": k, "key": f"{c['key']}-{k}"} for c in grid(COMPARE) if c["shots"] == 1 for k in shots]
    print_summary(sweep(COMPARE, notes=[], shots=list(shots)), wide)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-8])) <= 80
    assert [line.split()[:2] for line in lines[4:12]] == [[METHOD, f"#{n}"] for n in range(1, 9)]
    assert lines[-8] == "#1: vit_small_patch14_dinov2.lvd142m, own size, cls"
    assert lines[-1] == "#8: vit_base_patch14_dinov2.lvd142m, 518 px, last4"
    both = sweep(TWO, prompts=["recipe", "{image}? => {label}"], methods=[METHOD, "vlm-lora"], notes=[])
    print_summary(both, [])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-6:-3] == ["#1: prompt recipe", "#2: prompt {image}? => {label}", "#3: own size, cls"]


def test_series_are_in_the_order_of_their_values() -> None:
    series = by_series(sweep(COMPARE), [])[0]["methods"]
    assert ordered(series[::-1]) == series
