"""Scores after thoughts: what is sampled, how it is closed, and each label's own forward pass behind it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
from tinker import types
from transformers import AutoModelForCausalLM

from kshot.errors import PromptError
from tests.vlm import brute_force, genuine, thinkers
from tests.vlm.checkpoints import text_model
from tests.vlm.helpers import OtherService
from vlm import classifier
from vlm.classifier import answers, fit
from vlm.local.registry import LocalServiceClient
from vlm.prompts import Prompt, Template
from vlm.thoughts import Considered, Thinking, consider, posteriors

ABOUT = Template("What is this about? {text}", "It is about {label}.")
NAMES = ("cars", "cards", "sea", "sea life")
TEXTS = ["An engine.", "The queen of hearts.", "Waves and salt."]
TEMPLATES = {"qwen": genuine.template("qwen3"), "deepseek": thinkers.DEEPSEEK}
CLOSING = {"qwen": "\n</think>\n\n", "deepseek": "</think>"}
FEW = Thinking(5, thoughts=3, temperature=1.0, seed=4)
NO_RULE: Any = None


@dataclass(frozen=True)
class Side:
    """A model that thinks, behind our service and by transformers alone."""

    kind: str
    folder: Path
    sampler: Any
    prompt: Prompt
    stock: Any


@pytest.fixture(scope="module", params=TEMPLATES)
def side(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    folder = thinkers.model(tmp_path_factory.mktemp("m"), TEMPLATES[request.param])
    service = LocalServiceClient(tmp_path_factory.mktemp("state"))
    sampler = service.create_sampling_client(base_model=str(folder)).result()
    prompt = Prompt(sampler.get_tokenizer(), None, NAMES, ABOUT)
    yield Side(request.param, folder, sampler, prompt, AutoModelForCausalLM.from_pretrained(folder).eval())
    service.close()


def all_of(windows: Iterator[Considered]) -> Considered:
    (only,) = windows
    return only


def test_scores_after_thoughts_are_each_labels_own_forward_pass_and_their_mean(side: Side) -> None:
    considered = all_of(consider(side.sampler, TEXTS, side.prompt, FEW))
    encode, scores = side.prompt.tokenizer.encode, posteriors(side.sampler, considered, side.prompt)
    for text, own, row in zip(TEXTS, considered.thoughts, scores, strict=True):
        assert len({tuple(thought.tokens) for thought in own}) > 1, "thoughts differ"
        expected = np.zeros(len(NAMES))
        for thought in own:
            assert (thought.length, thought.closed) == (5, False), "the random model closes none"
            tokens = [*side.prompt.thinking(text).to_ints(), *thought.tokens, *encode(CLOSING[side.kind])]
            asked = tinker.ModelInput.from_ints([*tokens, *encode("It is about")])
            one = brute_force.scores(side.stock, asked, side.prompt.choices, NO_RULE, -1)["constrained"]
            expected += np.exp(one) / 3
        assert np.exp(row) == pytest.approx(expected, abs=1e-5)
        assert np.exp(row).sum() == pytest.approx(1)


def test_thoughts_are_samples_of_the_model_by_seed(side: Side) -> None:
    """They depend on the image's number, not on the window; and any other service gives the same."""
    whole = all_of(consider(side.sampler, TEXTS, side.prompt, FEW)).thoughts
    last = all_of(consider(side.sampler, TEXTS[2:], side.prompt, FEW, first=2)).thoughts
    other = all_of(consider(OtherService(side.sampler), TEXTS, side.prompt, FEW)).thoughts  # type: ignore[arg-type]
    assert whole[2:] == last
    assert whole == other
    assert whole != all_of(consider(side.sampler, TEXTS, side.prompt, Thinking(5, 3, 1.0, seed=5))).thoughts
    greedy = all_of(consider(side.sampler, TEXTS, side.prompt, Thinking(5, temperature=0.0))).thoughts
    asked = side.prompt.thinking(TEXTS[0])
    params = types.SamplingParams(max_tokens=5, temperature=0.0, stop=[])
    assert list(greedy[0][0].tokens) == side.sampler.sample(asked, 1, params).result().sequences[0].tokens


@dataclass
class Canned:
    """A service that samples what it is told."""

    texts: list[list[int]]
    asked: list[Any] = field(default_factory=list)

    def sample(self, prompt: Any, count: int, params: types.SamplingParams, **_: Any) -> Any:
        self.asked.append(params)
        sequences = [
            types.SampledSequence(
                stop_reason="stop",
                sequence_id="",
                tokens_np=np.array(tokens, np.int32),
                logprobs_np=np.zeros(len(tokens), np.float32),
                topk_logprobs_np=None,
            )
            for tokens in self.texts
        ]
        response = types.SampleResponse(sequences=sequences)
        return type("Done", (), {"result": lambda self: response})()


def test_a_thought_that_the_model_ends_is_closed_as_it_was_written(side: Side) -> None:
    encode = side.prompt.tokenizer.encode
    end = "<|im_end|>" if side.kind == "qwen" else "<|endoftext|>"
    canned = Canned([encode(text) for text in ("wheels\n</think>", "wheels", f"wheels{end}")])
    considered = all_of(consider(canned, TEXTS[:1], side.prompt, FEW))  # type: ignore[arg-type]
    assert [thought.closed for thought in considered.thoughts[0]] == [True, False, False]
    after = "\n\n" if side.kind == "qwen" else ""
    begun = side.prompt.thinking(TEXTS[0]).to_ints()
    expected = [f"wheels\n</think>{after}It is about", *[f"wheels{CLOSING[side.kind]}It is about"] * 2]
    assert [each.to_ints() for each in considered.asked[0]] == [[*begun, *encode(text)] for text in expected]
    assert canned.asked[0].max_tokens == 5
    assert canned.asked[0].stop[0] == "</think>"


def test_windows_go_on_where_the_last_one_ended(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = all_of(consider(side.sampler, TEXTS, side.prompt, FEW))
    monkeypatch.setattr("vlm.thoughts.WINDOW", 2)
    parts = list(consider(side.sampler, TEXTS, side.prompt, FEW))
    assert [thought for part in parts for thought in part.thoughts] == whole.thoughts
    assert len(parts) == 2


@pytest.mark.parametrize("train_on", ["answer", "all"])
def test_it_learns_behind_its_thoughts(side: Side, tmp_path: Path, train_on: str) -> None:
    """With the thought in the loss it learns to write it, too."""
    service = LocalServiceClient(tmp_path)
    client = service.create_lora_training_client(str(side.folder), rank=8, seed=0).result()
    thoughts = {text: side.prompt.thought(f"I see {text[:5]}") for text in TEXTS}
    views = [list(zip(TEXTS, range(3), strict=True))] * 40
    adam = types.AdamParams(learning_rate=1e-2)
    steps = fit(client, views, side.prompt, adam, "text", thoughts=thoughts, train_on=train_on)
    losses = [each.metrics["loss:sum"] for each, _ in steps]
    assert losses[-1] < losses[0] / 10
    sampler = client.save_weights_and_get_sampling_client().result()
    considered = all_of(consider(sampler, TEXTS, side.prompt, Thinking(16, temperature=0.0)))
    firsts = [own[0] for own in considered.thoughts]
    said = [side.prompt.tokenizer.decode(first.tokens).strip() for first in firsts]
    taught = [f"I see {text[:5]}" for text in TEXTS]
    learnt = [first.closed and a == b for first, a, b in zip(firsts, said, taught, strict=True)]
    assert all(learnt) if train_on == "all" else not any(learnt)
    if train_on == "all":
        assert posteriors(sampler, considered, side.prompt).argmax(1).tolist() == [0, 1, 2]
        said = answers(sampler, [own[0] for own in considered.asked], side.prompt, 8)
        assert [side.prompt.parse(text) for text in said] == [0, 1, 2]
    service.close()


def test_a_model_that_does_not_think_says_so(side: Side, tmp_path: Path) -> None:
    plain = Prompt(side.prompt.tokenizer.__class__.from_pretrained(text_model(tmp_path, "llama")), None, NAMES, ABOUT)
    with pytest.raises(PromptError, match="chat template has no thinking mode"):
        list(consider(side.sampler, TEXTS, plain, FEW))
    assert classifier.WINDOW > 1
