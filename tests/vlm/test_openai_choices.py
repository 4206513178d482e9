"""Closed lists of answers over HTTP: exact probabilities against the stock model's, and answers drawn from them."""

from collections import Counter
from typing import Any

import numpy as np
import openai
import pytest

from tests.vlm import brute_force
from tests.vlm.helpers import CLASSES, IMAGE, Pictured
from tests.vlm.openai_served import ask, recipe, refusal
from vlm.inputs import ImageRule, model_input
from vlm.prompts import Prompt
from vlm.server.openai.completions import draw
from vlm.server.openai.requests import CompletionRequest

NAMES = [f" {name}" for name in CLASSES]  # "crocodile" is the beginning of "crocodile head"
CHOICES = {"structured_outputs": {"choice": NAMES}}
BEGUN = {"continue_final_message": True, **CHOICES}


@pytest.fixture(scope="module")
def image(examples: list[Pictured]) -> bytes:
    return examples[0].image


@pytest.fixture(scope="module")
def expected(stock: Any, prompt: Prompt, image: bytes, rule: ImageRule) -> dict[str, float]:
    """Choice → log-probability after the recipe's question, each with the end of the turn, by the stock model."""
    choices = [[*prompt.tokenizer.encode(name), prompt.tokenizer.eos_token_id] for name in NAMES]
    scores = brute_force.scores(stock, prompt.question(image), choices, rule, IMAGE)["constrained"]
    return dict(zip(NAMES, scores.tolist(), strict=True))


def test_the_probabilities_are_brute_forces(api: openai.OpenAI, image: bytes, expected: dict[str, float]) -> None:
    answer = ask(api, messages=recipe(image), extra_body=BEGUN)
    choice = answer.choices[0]
    assert choice.choice_log_probs == pytest.approx(expected, abs=1e-4)
    assert np.exp(list(choice.choice_log_probs.values())).sum() == pytest.approx(1, abs=1e-5)
    assert choice.message.content == max(expected, key=expected.__getitem__)
    assert (choice.finish_reason, choice.logprobs) == ("stop", None)


def test_both_names_of_the_field(api: openai.OpenAI, image: bytes, expected: dict[str, float], prompt: Prompt) -> None:
    body = {"continue_final_message": True, "guided_choice": NAMES}
    answer = ask(api, messages=recipe(image), extra_body=body, max_tokens=8)
    assert answer.choices[0].choice_log_probs == pytest.approx(expected, abs=1e-4)
    assert answer.usage.prompt_tokens == prompt.question(image).length
    assert answer.usage.completion_tokens == len(prompt.tokenizer.encode(answer.choices[0].message.content)) + 1


def test_answers_are_drawn_at_the_temperature(api: openai.OpenAI, image: bytes, expected: dict[str, float]) -> None:
    counts = Counter[str]()
    for seed in range(12):
        answer = ask(api, messages=recipe(image), extra_body=BEGUN, temperature=3.0, seed=seed, n=16)
        counts.update(choice.message.content for choice in answer.choices)
    weights = np.exp(np.array(list(expected.values())) / 3)
    drawn = np.array([counts[name] for name in NAMES]) / 192
    assert abs(drawn - weights / weights.sum()).sum() / 2 < 0.12
    assert abs(drawn - np.exp(list(expected.values()))).sum() / 2 > 0.2  # what it would be at temperature 1


def test_seeds_reproduce_and_tiny_temperatures_choose_the_likeliest() -> None:
    scores = np.log(np.array([0.2, 0.5, 0.3], np.float32))

    def drawn(**options: Any) -> list[int]:
        return list(draw(scores, CompletionRequest(model="any", prompt=["a"], n=16, **options)))

    assert drawn(seed=3) == drawn(seed=3) != drawn(seed=4)
    assert len({tuple(drawn()) for _ in range(3)}) == 3  # without a seed: any
    assert drawn(temperature=1e-40) == drawn(temperature=0) == [1] * 16


def test_completions_tell_choices_apart_as_they_are(
    api: openai.OpenAI, stock: Any, rule: ImageRule, prompt: Prompt
) -> None:
    encode, prompts = prompt.tokenizer.encode, ["It is a", "I see a large"]
    names = [f" {name}\n" for name in CLASSES]
    answer = ask(api, prompt=prompts, n=2, extra_body={"guided_choice": names})
    for number, text in enumerate(prompts):
        scores = brute_force.scores(stock, model_input(encode(text)), [encode(name) for name in names], rule, IMAGE)
        for choice in answer.choices[2 * number : 2 * number + 2]:
            got: Any = choice
            assert got.choice_log_probs == pytest.approx(dict(zip(names, scores["constrained"], strict=True)), abs=1e-4)
            assert got.text == names[int(scores["constrained"].argmax())]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    refusal(api, "completions", "is a prefix of choice", **CHOICES)


def test_a_stream_gives_each_answer_whole(api: openai.OpenAI, image: bytes, expected: dict[str, float]) -> None:
    fields: dict[str, Any] = {"messages": recipe(image), "n": 2, "extra_body": BEGUN}
    pieces = list(ask(api, **fields, stream=True, stream_options={"include_usage": True}))
    assert [piece.choices[0].index for piece in pieces[:-1]] == [0, 0, 1, 1]
    for opening, answer in (pieces[:2], pieces[2:4]):
        assert (opening.choices[0].delta.role, opening.choices[0].delta.content) == ("assistant", "")
        assert answer.choices[0].delta.content == max(expected, key=expected.__getitem__)
        assert answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].choice_log_probs == pytest.approx(expected, abs=1e-4)
    assert pieces[-1].usage == ask(api, **fields).usage


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"guided_choice": ["cat"]}, "at least two"),
        ({"guided_choice": []}, "at least two"),
        ({"guided_choice": ["cat", "cat"]}, "equals choice"),
        ({"guided_choice": ["cat", ""]}, "guided_choice[1]"),
        ({"guided_choice": ["cat", "dog <|im_end|>"]}, "steers the model"),
        ({"guided_choice": ["cat", "dog"] * 2049}, "too many"),
        ({"structured_outputs": {"regex": "a+"}}, "structured_outputs.choice is missing"),
        ({"structured_outputs": {"choice": ["a", "b"], "json": {}}}, "structured_outputs.json is not known"),
        ({"structured_outputs": {"choice": ["a", "b"]}, "guided_choice": ["a", "b"]}, "give one"),
        ({"guided_choice": ["cat", "dog"], "logprobs": True}, "logprobs does not go with"),
        ({"guided_choice": ["cat", "dog"], "top_p": 0.5}, "top_p does not go with"),
        ({"guided_choice": ["cat", "dog"], "stop": "a"}, "stop does not go with"),
        ({"guided_choice": ["cat", "dog and another dog"], "max_tokens": 3}, "more than the answer may have"),
    ],
)
def test_what_is_wrong_is_named(api: openai.OpenAI, wrong: dict[str, Any], words: str) -> None:
    refusal(api, "chat/completions", words, **wrong)


def test_choices_must_fit_behind_the_prompt(api: openai.OpenAI) -> None:
    words = "more than the answer may have"
    refusal(api, "completions", words, prompt=[5] * 4094, guided_choice=[" a b c", " d"])
    refusal(api, "completions", "steers the model", guided_choice=["<|image_pad|>", " d"])
