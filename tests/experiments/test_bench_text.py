"""The benchmark of text training on a tiny model: its pairs, equal losses of all programs, and the record."""

import json
from dataclasses import replace
from importlib.util import find_spec

import pytest

from experiments.bench import text
from experiments.bench.text import LONGEST, RANK, SHORTEST, TASKS, TRL, TextCase, padded, pairs, summary, with_adapter
from experiments.bench.train import train
from experiments.bench.train_implementations import OURS, PLAIN
from kshot.errors import KshotError
from tests.vlm.checkpoints import text_model
from vlm.service import tokenizer

PEERS = {"plain": PLAIN, "trl": TRL}


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


@pytest.mark.skipif(not find_spec("trl"), reason="trl is not installed (pip install trl==1.16.0)")
@pytest.mark.filterwarnings("ignore")  # of TRL and of what it calls
def test_everybody_trains_the_same_and_it_is_said(case: TextCase) -> None:
    trained = {name: train(each, case) for name, each in ((OURS, text.ours), (PLAIN, text.plain), (TRL, text.trl))}
    values = {name: each.value for name, each in trained.items()}
    seconds = {OURS: [2.0], PLAIN: [3.0], TRL: [5.0]}
    assert all(each.seconds > 0 for each in trained.values())
    made = summary(case, seconds, values)
    processor = {f"vs_{key}_processor": values[name].processor / values[OURS].processor for key, name in PEERS.items()}
    assert made["ratios"] == pytest.approx({"vs_plain": 1.5, "vs_trl": 2.5, **processor})
    shapes = [padded(batch)["attention_mask"] for batch in case.batches]
    assert made["rows"][0]["padded"] == sum(mask.numel() for mask in shapes)
    assert made["rows"][0]["tokens"] == sum(int(mask.sum()) for mask in shapes)
    assert made["rows"][0]["median"] == made["rows"][0]["tokens"] / 2
    values[PLAIN].losses[1] += 1e-3
    with pytest.raises(KshotError, match="at step 2 our loss and that of 'plain transformers"):
        summary(case, seconds, values)


@pytest.mark.filterwarnings("ignore")
def test_the_weights_move_at_every_step(case: TextCase) -> None:
    """Equal losses would say nothing of training where no weight moves."""
    again = replace(case, batches=(case.batches[0],) * 3)
    for each in (text.ours, text.plain):
        losses = train(each, again).value.losses
        assert losses[0] > losses[1] > losses[2]


def test_the_adapter_is_of_the_rank_and_leaves_the_head_alone(case: TextCase) -> None:
    settings = json.loads((case.adapter / "adapter_config.json").read_text())
    assert settings["r"] == RANK
    assert "lm_head" not in settings["target_modules"]
