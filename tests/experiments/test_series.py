"""Series of a report: methods where a sweep compares nothing, methods under a prompt or settings where it does; how
they are named, drawn and counted."""

import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reported import SWEEP, Page, cell, store_predictions, written

from experiments.cli.report import print_summary
from experiments.report.figures import series_shifts, write_dataset_figure
from experiments.report.runs import full_grid
from experiments.report.tables import NONE
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
PROMPTS = {"prompt": ["recipe", "{image}What is it? => It is a {label}"]}
METHOD = "dinov2-logreg"
ACCURACY = {"vlm-zero-shot": 0.1, "vlm-lora": 0.2, METHOD: 0.3, "pixel-knn": 0.0}  # of zero shots
TITLE = "DINOv2 + logistic regression"


def sweep(compare: dict[str, list[Any]], **more: Any) -> dict[str, Any]:
    compared = {"prompts": compare["prompt"]} if "prompt" in compare else {"compare": compare}
    return {**SWEEP, "methods": [*ACCURACY], "seeds": [0, 1], "settings": compare, **compared, **more}


def grid(compare: dict[str, list[Any]], shots: tuple[int, ...] = (1, 4)) -> list[dict[str, Any]]:
    """Cells of all methods under two seeds; a shot adds ten points, the n-th values (from 0) n."""
    cells = []
    for (method, start), k, seed in product(ACCURACY.items(), (0, *shots), (0, 1)):
        if (k == 0) == (method == "vlm-zero-shot") and (k or not seed):
            read = compare if {*compare} <= {*METHODS[method].settings} else {}
            for n, values in enumerate(product(*read.values())):
                one = cell(method, k, seed, start + 0.1 * k + 0.01 * n)
                under = {"rank": 1, **dict(zip(read, values, strict=True))}
                cells.append({**one, "key": f"{one['key']}-{n}", "settings": under})
    return cells


def choices(place: int = 0) -> list[Choice]:
    return [Choice("readout", TWO["readout"][place], place, 2)]


def asked(method: str, number: int) -> Series:
    """The series of a method with the prompt of this number."""
    return Series(method, [Choice("prompt", f"words {number}", number - 1, 12)])


@pytest.mark.parametrize(
    ("compare", "methods", "numbers"),
    [
        (TWO, ["vlm-zero-shot", "vlm-lora", *[METHOD] * 4, "pixel-knn"], [0, 0, 0, 1, 2, 3, 0]),
        (PROMPTS, [*["vlm-zero-shot"] * 2, *["vlm-lora"] * 2, METHOD, "pixel-knn"], [0, 1, 0, 1, 0, 0]),
    ],
    ids=["settings", "prompts"],
)
def test_what_reads_compared_settings_becomes_series(
    compare: dict[str, list[Any]], methods: list[str], numbers: list[int]
) -> None:
    before = sweep(compare)
    after, cells = by_series(before, grid(compare))
    assert [*map(method_of, after["methods"])] == methods
    assert [*map(number_of, after["methods"])] == numbers
    assert len(set(after["methods"])) == len(methods)
    assert before["methods"] == [*ACCURACY]
    for record, found in zip(grid(compare), cells, strict=True):
        values = {choice.setting: choice.value for choice in choices_of(found["method"])}
        assert values == {name: value for name, value in record["settings"].items() if name in compare}
        assert found["method"] in after["methods"]
        assert method_of(found["method"]) == record["method"]
        assert found | {"method": None} == record | {"method": None}
    assert by_series(after, cells) == (after, cells)  # done once, done for good
    plan = full_grid(before, grid(compare))
    assert len(plan) == len(set(plan)) == len(full_grid(before, []))
    assert {(c["dataset"], c["method"], c["shots"], c["seed"]) for c in cells} == {*plan}


def test_prompts_and_settings_are_compared_side_by_side() -> None:
    both = sweep({"vlm_features": ["tower", "hidden"]}, prompts=["recipe", "other"], methods=["vlm-vision-linear"])
    asking = replace(METHODS["vlm-vision-linear"], settings=("prompt", "vlm_features"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "vlm-vision-linear", asking)
        series = by_series(both, [])[0]["methods"]
    titles = ["prompt 1, tower", "prompt 1, hidden", "prompt 2, tower", "prompt 2, hidden"]
    assert [style(each).title for each in series] == [f"VLM features + linear ({words})" for words in titles]


@pytest.mark.parametrize(
    ("method", "settings", "has"),
    [
        (METHOD, {"readout": "cls+mean", "image_size": None}, "readout 'cls+mean'; the sweep's are: ['cls', 'last4']"),
        (METHOD, {"readout": "cls", "image_size": 64}, "image_size 64; the sweep's are: [None, 518]"),
        (METHOD, {"readout": "cls"}, "no image_size; the sweep's are: [None, 518]"),
        ("vlm-lora", {"prompt": "another"}, "prompt 'another'; the sweep's are: ['recipe', "),
        ("vlm-lora", {}, "no prompt; the sweep's are: ['recipe', "),
    ],
)
def test_a_cell_of_another_value_is_refused(method: str, settings: dict[str, Any], has: str) -> None:
    odd = cell(method, 1, 0, 0.5) | {"settings": settings}
    with pytest.raises(ResultsError, match=re.escape(f"cell {method}-1-0 has {has}")):
        by_series(sweep(TWO if method == METHOD else PROMPTS), [odd])


@pytest.mark.parametrize("more", [{}, {"prompts": []}, {"prompts": ["recipe"]}, {"compare": {"readout": ["cls"]}}])
def test_one_value_makes_no_series(more: dict[str, Any]) -> None:
    one = SWEEP | {"methods": [*ACCURACY]} | more
    assert by_series(one, grid({})) == (one, grid({}))
    assert all(type(c["method"]) is str for c in by_series(one, grid({}))[1])


def test_the_untuned_model_is_that_of_the_choices_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = Choice("prompt", "recipe", 0, 2)
    tuned = Series("vlm-lora", [prompt, *choices(1)])
    untuned = zero_shot_of(tuned)
    assert untuned == Series("vlm-zero-shot", [prompt])
    assert choices_of(untuned) == (prompt,)
    assert type(zero_shot_of(Series("vlm-lora", choices()))) is str
    assert zero_shot_of("vlm-lora") == "vlm-zero-shot"
    assert zero_shot_of("vlm-zero-shot") is zero_shot_of("pixel-knn") is zero_shot_of("made-up") is None
    row = METHODS["vlm-zero-shot"]
    monkeypatch.setitem(METHODS, "vlm-zero-shot", replace(row, settings=(*row.settings, "readout")))
    assert zero_shot_of(tuned) == Series("vlm-zero-shot", [prompt, *choices(1)])


def test_curves_begin_at_zero_where_that_is_known() -> None:
    table = {"vlm-zero-shot": {0: 1}, Series("vlm-lora", choices(0)): {1: 2}, Series("vlm-lora", choices(1)): {1: 3}}
    assert [*from_zero(table).values()] == [{0: 1}, {0: 1, 1: 2}, {0: 1, 1: 3}]
    words = {asked("vlm-zero-shot", 1): {0: 1}, asked("vlm-lora", 1): {1: 2}, asked("vlm-lora", 2): {1: 3}}
    expected = {**words, asked("vlm-lora", 1): {0: 1, 1: 2}}
    assert from_zero(words) == from_zero(expected) == expected
    unrelated = {"vlm-zero-shot": {0: 1}, METHOD: {1: 2}}
    assert from_zero(unrelated) == unrelated


def test_titles_say_what_is_compared_alone() -> None:
    series, _ = by_series(sweep(TWO), [])
    assert [style(m).title for m in series["methods"][2:6]] == [f"{TITLE} ({w})" for w in WORDS]
    sizes, _ = by_series(sweep({"image_size": [None, 518]}), [])
    assert style(sizes["methods"][3]).title == f"{TITLE} (518 px)"
    models, _ = by_series(sweep({"backbone": COMPARE["backbone"]}), [])
    assert style(models["methods"][2]).title == f"{TITLE} (vit_small_patch14_dinov2.lvd142m)"
    assert style(asked("made-up", 1)).title == "made-up (prompt 1)"
    assert style("vlm-lora") == STYLES["vlm-lora"]


@pytest.mark.parametrize("sizes", [(20,), (5, 4), (4, 5), (2, 2, 2), (2, 2, 5), (3, 3, 2)])
@pytest.mark.parametrize("method", [*STYLES, "made-up"])
def test_twenty_series_of_a_method_look_different(method: str, sizes: tuple[int, ...]) -> None:
    each = [[Choice(f"setting {n}", value, value, of) for value in range(of)] for n, of in enumerate(sizes)]
    looks = [style(Series(method, under)) for under in product(*each)]
    assert len({(look.colour, look.hollow, look.line) for look in looks}) == len(looks) == np.prod(sizes)
    assert len({look.title for look in looks}) == len(looks)
    assert {look.marker for look in looks} == {style(method).marker}
    assert all(re.fullmatch("#[0-9A-F]{6}", look.colour) for look in looks)
    assert looks[0]._replace(title="") == style(method)._replace(title="")


def test_a_line_stands_for_the_first_setting(tmp_path: Path) -> None:
    series = by_series(sweep(COMPARE), [])[0]["methods"][2:10]
    lines = [style(each).line for each in series]
    assert lines[:4] == [lines[0]] * 4 != lines[4:] == [lines[4]] * 4
    shades = [(look.colour, look.hollow) for look in map(style, series)]
    assert shades[:4] == shades[4:]
    _, svg = write_dataset_figure(by_series(sweep(PROMPTS), grid(PROMPTS))[1], "icons", tmp_path)
    looks = [style(Series("vlm-lora", [Choice("prompt", "", n, 2)])) for n in (0, 1)]
    assert all(look.colour.lower() in svg.read_text() for look in looks)


@pytest.mark.parametrize(
    ("compare", "method", "words", "counted", "first"),
    [
        (TWO, METHOD, WORDS, "2 image sizes, 2 readouts", None),
        (PROMPTS, "vlm-lora", ["prompt 1", "prompt 2"], "2 prompts", 10),
    ],
    ids=["settings", "prompts"],
)
def test_the_report_names_every_series(
    compare: dict[str, list[Any]], method: str, words: list[str], counted: str, first: int | None, tmp_path: Path
) -> None:
    there = [c for c in grid(compare) if c["key"] != f"{method}-4-1-{len(words) - 1}"]
    text, page = written(tmp_path, sweep(compare), there, n_classes={"icons": 20})
    title, best = STYLES[method].title, 30 if method == "vlm-lora" else 40
    assert "4 methods were compared on icons with 1 to 4 labelled examples per class" in text
    assert f"(2 seeds, {counted})" in text
    assert "Cells not run yet: 1." in text
    assert f"| icons | {title} ({words[-1]}) | 1 | 4 |" in text
    for n, each in enumerate(words):
        row = next(line for line in text.splitlines() if line.startswith(f"| {title} ({each}) | "))
        shown = [field.strip(" *")[:4] for field in row.split("|")[2:5]]
        assert shown == [NONE if first is None else f"{first + n}.0", f"{best + n}.0", f"{best + 30 + n}.0"]
    assert "| pixel kNN | \N{EN DASH} | 10.0 ± 0.0 | 40.0 ± 0.0 |" in text
    assert "(n=1)" in text
    assert not Page(page).open
    assert f"{title} ({words[1]})" in page
    if compare is TWO:
        assert f"At 1 per class, {title} ({WORDS[3]}) is best with 43.0" in text
        assert "| VLM + LoRA | 10.0 | 30.0 ± 0.0 | 60.0 ± 0.0 |" in text
    else:
        assert "| 1 | recipe |\n| 2 | {image}What is it? =&gt; It is a {label} |" in text
        assert "| VLM + LoRA (prompt 2) | 0 | 11.0 " in text


def test_the_report_of_one_prompt_has_no_numbers(tmp_path: Path) -> None:
    without = SWEEP | {"methods": [*ACCURACY], "seeds": [0, 1], "settings": {}, "notes": []}
    texts = [written(tmp_path, without | more, grid({})) for more in ({}, {"prompts": ["recipe"]})]
    assert texts[0] == texts[1]
    assert "prompt" not in texts[0][0]
    assert "(2 seeds)" in texts[0][0]


def test_differences_and_confusions_are_of_series(tmp_path: Path) -> None:
    cells = [c for c in grid(TWO) if c["method"] == METHOD]
    store_predictions(tmp_path, cells)
    named = sweep(TWO, classes={"icons": [f"kind {n}" for n in range(10)]}, methods=[METHOD])
    text, _ = written(tmp_path, named, cells)
    assert f"({TITLE} ({WORDS[3]})) minus each other" in text
    rows = re.findall(r"\| DINOv2 \+ logistic regression \((.*)\) \| (\d) \| 2 \| \+(\d\.\d) \|", text)
    assert rows == [(words, k, f"{3 - n}.0") for k in "14" for n, words in enumerate(WORDS[:3])]
    assert re.findall(r"(.*) at k = 4: the most frequent", text) == [f"{TITLE} ({WORDS[3]})"]


def test_no_series_leaves_the_place_of_its_shots() -> None:
    many = {Series(METHOD, [Choice("image_size", n, n, 40)]): {1: None} for n in range(40)}
    shifts = series_shifts(many).values()
    assert max(shifts) - min(shifts) <= 0.5
    assert len(set(shifts)) == 40


def test_the_summary_fits_into_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    shots = (1, 2, 3, 4, 5)
    cells = grid(COMPARE, shots)
    for each in cells:
        each["metrics"] = each["metrics"] | {"accuracy": 0.5 + 0.1 * each["seed"]}
    print_summary(sweep(COMPARE, notes=[], shots=list(shots)), cells)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-8])) <= 80
    assert [line.split() for line in lines[5:21:2]] == [[METHOD, f"#{n}", *["55.0"] * 5] for n in range(1, 9)]
    assert [line.split() for line in lines[6:21:2]] == [["-9-119"] * 5] * 8  # of two seeds, whose images nobody knows
    assert lines[-8] == "#1: vit_small_patch14_dinov2.lvd142m, own size, cls"
    assert lines[-1] == "#8: vit_base_patch14_dinov2.lvd142m, 518 px, last4"
    both = sweep(TWO, prompts=["recipe", "{image}? => {label}"], methods=[METHOD, "vlm-lora"], notes=[])
    print_summary(both, [])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-6:-3] == ["#1: prompt recipe", "#2: prompt {image}? => {label}", "#3: own size, cls"]


def test_series_are_in_the_order_of_their_values() -> None:
    series = by_series(sweep(COMPARE), [])[0]["methods"]
    assert ordered(series[::-1]) == series
    others = [asked("vlm-lora", 10), "pixel-knn", asked("vlm-lora", 2), asked("vlm-zero-shot", 1), "made-up"]
    assert ordered(others) == [others[3], others[2], others[0], others[1], others[4]]
