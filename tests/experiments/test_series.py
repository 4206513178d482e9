"""Series of prompts: methods where a sweep has one prompt, methods with a prompt where it has several."""

import re
from pathlib import Path

import pytest
import reported

from experiments.cli.sweep import print_summary
from experiments.report.figures import write_dataset_figure
from experiments.report.report import headline
from experiments.report.tables import full_grid
from experiments.sweep.series import (
    Choice,
    Series,
    by_series,
    choices_of,
    from_zero,
    method_of,
    ordered,
    style,
    zero_shot_of,
)
from kshot.errors import ResultsError

PROMPTS = ["recipe", "{image}What is it? => It is a {label}"]
SWEEP = reported.SWEEP | {"seeds": [0, 1], "settings": {}, "notes": [], "prompts": PROMPTS}


def cell(method: str, shots: int, seed: int, accuracy: float, prompt: str | None = None) -> dict:
    answers = dict.fromkeys(("accuracy_constrained", "accuracy_strict"), accuracy) if prompt else {}
    more = {"settings": {"prompt": prompt} if prompt else {}, "metrics": {"accuracy": accuracy, **answers}}
    record = reported.cell(method, shots, seed, accuracy)
    return record | more | {"key": f"{record['key']}-{prompt}", "test_images": 100}


def asked(method: str, number: int, of: int = 5) -> Series:
    """The series of a method with the prompt of this number."""
    return Series(method, [Choice("prompt", f"words {number}", number - 1, of)])


def prompt_of(series: str) -> int | None:
    """The number of its prompt, of several."""
    return next((choice.number + 1 for choice in choices_of(series) if choice.setting == "prompt"), None)


def grid() -> list[dict]:
    runs = [cell("vlm-zero-shot", 0, 0, 0.1 + 0.1 * n, prompt) for n, prompt in enumerate(PROMPTS)]
    for k in (1, 4):
        for seed in (0, 1):
            runs += [cell("vlm-lora", k, seed, 0.1 * (k + n) + 0.02 * seed, p) for n, p in enumerate(PROMPTS)]
            runs.append(cell("pixel-knn", k, seed, 0.05 * k + 0.02 * seed))
    return runs


@pytest.mark.parametrize("more", [{}, {"prompts": []}, {"prompts": PROMPTS[:1]}])
def test_with_one_prompt_nothing_changes(more):
    sweep = {**{key: value for key, value in SWEEP.items() if key != "prompts"}, **more}
    assert by_series(sweep, grid()) == (sweep, grid())
    assert all(type(c["method"]) is str for c in by_series(sweep, grid())[1])


def test_with_several_prompts_what_asks_becomes_series():
    sweep, cells = by_series(SWEEP, grid())
    series = [(method, number) for method in ("vlm-zero-shot", "vlm-lora") for number in (1, 2)]
    assert [(method_of(m), prompt_of(m)) for m in sweep["methods"]] == [*series, ("pixel-knn", None)]
    assert len(set(sweep["methods"])) == 5
    for before, after in zip(grid(), cells, strict=True):
        assert method_of(after["method"]) == before["method"]
        number = prompt_of(after["method"])
        assert before["settings"].get("prompt") == (PROMPTS[number - 1] if number else None)
        assert after | {"method": None} == before | {"method": None}
    assert by_series(sweep, cells) == (sweep, cells)  # done once, done for good
    assert SWEEP["methods"] == ["vlm-zero-shot", "vlm-lora", "pixel-knn"]


@pytest.mark.parametrize(("prompt", "has"), [("another", "prompt 'another'"), (None, "no prompt")])
def test_a_prompt_that_is_not_of_the_sweep_is_refused(prompt, has):
    with pytest.raises(ResultsError, match=rf"^cell vlm-lora-1-0-{prompt} has {has}; the sweep's are: \['recipe', "):
        by_series(SWEEP, [cell("vlm-lora", 1, 0, 0.5, prompt)])


def test_the_untuned_model_is_asked_in_the_same_words():
    assert zero_shot_of("vlm-lora") == "vlm-zero-shot"
    assert prompt_of(zero_shot_of(asked("vlm-lora", 2))) == 2
    assert zero_shot_of(asked("vlm-lora", 2)) == asked("vlm-zero-shot", 2) != asked("vlm-zero-shot", 1)
    assert zero_shot_of("vlm-zero-shot") is zero_shot_of("pixel-knn") is zero_shot_of("made-up") is None


def test_curves_begin_at_zero_where_that_is_known():
    table = {asked("vlm-zero-shot", 1): {0: "a"}, asked("vlm-lora", 1): {1: "b"}, asked("vlm-lora", 2): {1: "c"}}
    expected = {**table, asked("vlm-lora", 1): {0: "a", 1: "b"}}
    assert from_zero(table) == expected
    assert from_zero(expected) == expected
    unrelated = {"vlm-zero-shot": {0: 1}, "dinov2-logreg": {1: 2}}
    assert from_zero(unrelated) == unrelated


def test_looks_are_of_the_method_and_differ_by_prompt():
    looks = [style(asked("vlm-lora", n)) for n in (1, 2, 3, 4, 5)]
    assert len({(look.colour, look.hollow) for look in looks}) == 5
    assert {look.marker for look in looks} == {style("vlm-lora").marker}
    assert looks[0].colour == style("vlm-lora").colour
    assert looks[1].title == "VLM + LoRA (prompt 2)"
    assert all(re.fullmatch("#[0-9A-F]{6}", look.colour) for look in looks)
    assert style(asked("made-up", 1)).title == "made-up (prompt 1)"
    series = [asked("vlm-lora", 10), "pixel-knn", asked("vlm-lora", 2), asked("vlm-zero-shot", 1), "made-up"]
    assert ordered(series) == [series[3], series[2], series[0], series[1], series[4]]


def test_every_prompt_is_planned():
    plan = full_grid(SWEEP, [])
    assert len(plan) == len(set(plan)) == 2 + 2 * 2 * 2 + 2 * 2
    there = {(c["dataset"], c["method"], c["shots"], c["seed"]) for c in by_series(SWEEP, grid())[1]}
    assert set(full_grid(SWEEP, grid())) == there


def test_the_report_tells_prompts_apart(tmp_path: Path):
    cells = [c for c in grid() if c["key"] != f"vlm-lora-4-1-{PROMPTS[1]}"]
    text, _ = reported.written(tmp_path, SWEEP, cells)
    assert "| 1 | recipe |\n| 2 | {image}What is it? =&gt; It is a {label} |" in text
    assert re.search(r"\| VLM \+ LoRA \(prompt 1\) \| 10\.0 [^|]* \| 11\.0 ± ", text)
    assert re.search(r"\| VLM \+ LoRA \(prompt 2\) \| \*\*20\.0 [^|]* \| \*\*21\.0 ± ", text)
    assert "| VLM + LoRA (prompt 2) | 0 | 20.0 " in text
    assert "Cells not run yet: 1." in text
    assert "| icons | VLM + LoRA (prompt 2) | 1 | 4 |" in text
    assert "3 methods were compared on icons with 1 to 4 labelled examples per class (2 seeds, 2 prompts)" in text


def test_the_report_of_one_prompt_has_no_numbers(tmp_path: Path):
    cells = [c for c in grid() if c["settings"].get("prompt") != PROMPTS[1]]
    without = {key: value for key, value in SWEEP.items() if key != "prompts"}
    texts = [reported.written(tmp_path, without | prompts, cells) for prompts in ({}, {"prompts": PROMPTS[:1]})]
    assert texts[0] == texts[1]
    assert "prompt" not in texts[0][0]
    assert "(2 seeds)" in headline(cells, "icons")


def test_the_figure_has_a_line_per_prompt(tmp_path: Path):
    _, svg = write_dataset_figure(by_series(SWEEP, grid())[1], "icons", tmp_path)
    assert style(asked("vlm-lora", 2)).colour.lower() in svg.read_text()


def test_the_summary_fits_into_80_columns(capsys: pytest.CaptureFixture[str]):
    shots = (1, 2, 4, 8, 16)
    drawn = [cell("vlm-lora", k, s, 0.5 + 0.1 * s, p) for k in shots for s in (0, 1, 2) for p in PROMPTS]
    print_summary(SWEEP | {"shots": list(shots)}, [*grid()[:2], *drawn])
    said = capsys.readouterr().out.splitlines()
    assert said[4].split() == ["vlm-lora", "#1", "10.0", *["60.0±24.8"] * 5]
    assert said[5].split() == ["vlm-lora", "#2", "20.0", *["60.0±24.8"] * 5]
    assert max(map(len, said)) <= 80
    assert said[-2:] == [f"#1: prompt {PROMPTS[0]}", f"#2: prompt {PROMPTS[1]}"]
