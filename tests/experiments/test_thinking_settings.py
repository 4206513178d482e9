"""Sweeps, training and prediction with thoughts before the answers, on the nano model with a template that thinks."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trained import TINY, in_this_process, status_of

from experiments.sweep.config import Settings
from experiments.sweep.metrics import metrics
from experiments.sweep.provenance import recorded
from experiments.sweep.store import Results
from tests.vlm import thinkers
from vlm import nano
from vlm.inputs import ImageRule
from vlm.local.registry import LocalServiceClient
from vlm.prompts import Prompt
from vlm.thoughts import Thinking, consider, posteriors

THINK = ("--thinking", "4", "--thoughts", "2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The nano model with a template that begins a thought."""
    folder = tmp_path_factory.mktemp("thinker") / "model"
    shutil.copytree(nano.folder(), folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": thinkers.vision()}))
    return folder


@pytest.fixture(scope="module")
def command(photos: Path, model: Path) -> list[str]:
    methods = ("--method", "vlm-zero-shot", "--method", "vlm-lora")
    data = ("--dataset", f"folder:{photos}", "--model", str(model), "--set", "max_side=40", "--set", "answer_tokens=8")
    return ["sweep", "demo", *data, *methods, "--shots", "1", "--seeds", "0", *TINY]


@pytest.fixture(scope="module")
def thought(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Results:
    out = tmp_path_factory.mktemp("thought") / "out"
    with pytest.MonkeyPatch.context() as patch:
        in_this_process(patch)
        assert status_of(*command, *THINK, "--train-on", "all", "--out", out) == 0
    return Results(out)


def test_records_and_report_say_how_it_was_thought(thought: Results, model: Path, photos: Path) -> None:
    cells = {cell["method"]: cell for cell in thought.cells()}
    assert {name: cells["vlm-zero-shot"]["settings"].get(name) for name in ("thinking", "thoughts", "train_on")} == {
        "thinking": 4,
        "thoughts": 2,
        "train_on": None,
    }
    assert cells["vlm-lora"]["settings"]["train_on"] == "all"
    for cell in cells.values():
        table, values = thought.predictions(cell["key"]), cell["metrics"]
        label, without = (np.array(table[name]) for name in ("label", "prediction_without_thought"))
        assert values["accuracy_without_thought"] == np.mean(label == without)
        assert values["thoughts_closed"] + values["thoughts_unfinished"] == pytest.approx(1)
        assert 1 <= values["thought_tokens"] <= 4
        assert metrics(table, 3) == values
    assert thought.recompute() == 0
    report = (thought.folder / "report.md").read_text()
    assert "Thoughts of at most 4 tokens before the answer" in report
    assert "--set thinking=4" in report


def test_predictions_are_those_of_the_library(thought: Results, model: Path, tmp_path: Path, photos: Path) -> None:
    """The zero-shot cell's, computed again from the images in the order of its predictions."""
    from data import catalog
    from data.preparation import prepare_all

    (cell,) = (each for each in thought.cells() if each["method"] == "vlm-zero-shot")
    dataset, table = catalog.load(f"folder:{photos}", split_seed=0), thought.predictions(cell["key"])
    tests = {each.key: each for each in dataset.test}
    ordered = prepare_all([tests[key] for key in table["key"].to_pylist()], max_side=40, hflip=False)
    service = LocalServiceClient(tmp_path)
    sampler = service.create_sampling_client(base_model=str(model)).result()
    prompt = Prompt(sampler.get_tokenizer(), ImageRule.from_pretrained(str(model)), dataset.classes)
    (window,) = consider(sampler, [each.image for each in ordered], prompt, Thinking(4, 2))
    scores = posteriors(sampler, window, prompt)
    service.close()
    assert table["prediction"].to_pylist() == scores.argmax(1).tolist()
    label = table["label"].to_numpy()
    assert table["label_log_prob"].to_numpy() == pytest.approx(scores[np.arange(len(label)), label], abs=1e-4)
    lengths = [np.mean([each.length for each in own]) for own in window.thoughts]
    assert table["thought_tokens"].to_pylist() == pytest.approx(lengths)


def test_a_resumed_sweep_equals_an_uninterrupted_one(
    command: list[str], thought: Results, tmp_path: Path, kshot: Any, ran: list[Any]
) -> None:
    shutil.copytree(thought.folder, tmp_path / "out")
    lost = next(cell for cell in thought.cells() if cell["method"] == "vlm-lora")
    (tmp_path / "out/cells" / f"{lost['key']}.json").unlink()
    (tmp_path / "out/predictions" / f"{lost['key']}.parquet").unlink()
    again = [*command, *THINK, "--train-on", "all", "--out", tmp_path / "out"]
    assert kshot(*again).status == 0
    assert [job.cell.method for job in ran] == ["vlm-lora"]
    assert Results(tmp_path / "out").predictions(lost["key"]) == thought.predictions(lost["key"])
    for other in (command, [*command, *THINK]):
        ended = kshot(*other, "--out", tmp_path / "out")
        assert ended.status == 2
        assert "another configuration (" in ended.err


def test_a_plan_states_no_time_for_thoughts(command: list[str], kshot: Any, tmp_path: Path) -> None:
    ended = kshot(*command, *THINK, "--plan", "--out", tmp_path / "out")
    assert ended.status == 0, ended.err
    assert "not measured with --thinking" in " ".join(ended.out.split())


def test_settings_of_thoughts_are_stated_only_where_they_are_used() -> None:
    names = {"thinking", "thoughts", "thinking_temperature", "thinking_seed", "train_on"}
    assert not names & recorded(Settings()).keys()
    stated = recorded(Settings(thinking=8, thoughts=2, thinking_temperature=0.6, thinking_seed=1, train_on="all"))
    assert names <= stated.keys()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--thoughts", "2"), "thoughts = 2 is for models that think; give --thinking N too"),
        (("--train-on", "all"), "train_on = all is for models that think"),
        ((*THINK, "--calibration", "pmi"), "calibration pmi is of scores without a thought"),
        ((*THINK, "--train-on", "all", "--loss", "closed-set"), "the loss closed-set is on the answer alone"),
        ((*THINK, "--train-on", "some"), "train_on = 'some'"),
    ],
)
def test_what_does_not_fit_together_is_refused(command: list[str], refused: Any, options: Any, words: str) -> None:
    refused(*command, *options, parts=[words])


def test_a_template_without_a_thinking_mode_is_refused(
    photos: Path, folder: Path, adapter: Path, refused: Any, tmp_path: Path
) -> None:
    words = ["chat template has no thinking mode"]
    data = ("--dataset", f"folder:{photos}")
    named = [f"--thinking 8 with model {nano.NAME}", *words]
    refused("zero-shot", *data, "--thinking", "8", "--out", tmp_path / "out", parts=named)
    refused("sweep", "demo", *data, "--thinking", "8", "--out", tmp_path / "out", parts=named)
    refused("train", *data, "--shots", "1", "--thinking", "8", "--out", tmp_path / "new", parts=named)
    assert not (tmp_path / "out").exists()
    refused("predict", folder, "--adapter", adapter, "--thinking", "8", parts=words)
    refused("predict", folder, "--adapter", adapter, "--thoughts", "2", parts=["thoughts need --thinking N"])


def test_an_adapter_that_learnt_with_thoughts_predicts_with_them(
    photos: Path, model: Path, images: Path, tmp_path: Path, kshot: Any
) -> None:
    out, data = tmp_path / "adapter", ("--dataset", f"folder:{photos}", "--set", "max_side=40")
    made = kshot("train", *data, "--model", model, "--shots", "1", "--thinking", "3", *TINY, "--out", out)
    assert made.status == 0, made.err
    assert json.loads((out / "classifier.json").read_text())["trained"]["settings"]["thinking"] == 3
    first, same, other = (
        kshot("predict", images / "a.png", "--adapter", out, "--json", *more)
        for more in ((), ("--thinking", "3", "--seed", "0"), ("--thinking", "0"))
    )
    assert first.status == same.status == other.status == 0, first.err
    assert first.out == same.out != other.out
    assert "greedy" in other.out
    assert "greedy" not in first.out
