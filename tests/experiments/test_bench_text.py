"""The benchmark of text training on a tiny model: its pairs, equal losses of all programs, and the record."""

from pathlib import Path

import pytest

from experiments.bench import text
from experiments.bench.text import LONGEST, SHORTEST, TASKS, TRL, TextCase, pairs, summary, with_adapter
from experiments.bench.train import train
from experiments.bench.train_implementations import OURS, PLAIN
from kshot.errors import KshotError
from tests.vlm.checkpoints import text_model
from vlm.service import tokenizer


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> TextCase:
    folder = str(text_model(tmp_path_factory.mktemp("llama"), "llama"))
    batches = pairs(tokenizer(folder), 3, 4)
    return with_adapter(TextCase(folder, batches, tmp_path_factory.mktemp("state")))


def test_pairs_are_of_mixed_length_and_the_answers_are_right(case: TextCase) -> None:
    encoder = tokenizer(case.model)
    assert pairs(encoder, 3, 4) == case.batches
    lengths = [len(prompt) + len(answer) for batch in case.batches for prompt, answer in batch]
    assert min(lengths) >= SHORTEST
    assert max(lengths) <= LONGEST
    assert max(lengths) > 4 * min(lengths)
    for prompt, answer in case.batches[0]:
        name, words = encoder.decode(prompt).removeprefix("<|im_start|>user\n").split("<|im_end|>")[0].split(": ")
        expected = " ".join(TASKS[name](words.split(" "))) + "<|im_end|>\n"
        assert expected.startswith(encoder.decode(answer))


@pytest.mark.filterwarnings("ignore")  # of TRL and of what it calls
def test_everybody_trains_the_same_and_it_is_said(case: TextCase) -> None:
    trained = {name: train(each, case) for name, each in ((OURS, text.ours), (PLAIN, text.plain), (TRL, text.trl))}
    values = {name: each.value for name, each in trained.items()}
    made = summary(case, {name: [each.seconds] for name, each in trained.items()}, values)
    assert made["ratios"].keys() == {"vs_plain", "vs_trl", "vs_plain_processor", "vs_trl_processor"}
    assert all(ratio > 0 for ratio in made["ratios"].values())
    assert made["rows"][0]["padded"] > made["rows"][0]["tokens"] > 0
    assert len(values[OURS].losses) == 3
    values[PLAIN].losses[1] += 1e-3
    with pytest.raises(KshotError, match="at step 2 our loss and that of 'plain transformers"):
        summary(case, {name: [each.seconds] for name, each in trained.items()}, values)
    assert isinstance(case.adapter, Path)
