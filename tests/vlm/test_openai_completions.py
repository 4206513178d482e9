"""POST completions through the official client: the text, numbers and ends that the stock model gives."""

from typing import Any

import openai
import pytest
import torch

from tests.vlm import openai_served
from tests.vlm.helpers import disturb, greedy, plain_peft
from tests.vlm.openai_served import PREFIXES, Models, application, checked, connected, refusal
from tests.vlm.serving import listening
from vlm import nano
from vlm.inputs import model_input
from vlm.local.clients import LocalTrainingClient

FRANCE = "The capital of France is"
USAGE: dict[str, Any] = {"stream_options": {"include_usage": True}}


def written_by(model: Any, tokens: list[int], length: int) -> list[int]:
    return greedy(model, model_input(tokens), None, length)  # without images it needs no rule


def log_probs_of(stock: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        log_probs: torch.Tensor = stock(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        return log_probs


def ask(api: openai.OpenAI, prompt: Any = FRANCE, **options: Any) -> Any:
    return openai_served.ask(api, prompt=prompt, **{"max_tokens": 12, **options})


def streamed(api: openai.OpenAI, prompt: Any = FRANCE, **options: Any) -> list[Any]:
    pieces = list(ask(api, prompt, stream=True, **options))
    for piece in pieces:
        if all(choice.finish_reason for choice in piece.choices):  # null before the last, though the type has no room
            checked(piece)
    return pieces


def test_a_completion_is_what_stock_generate_writes(api: openai.OpenAI, stock: Any, tokenizer: Any) -> None:
    tokens = tokenizer.encode(FRANCE)
    expected = written_by(stock, tokens, 12)
    answer = ask(api)
    assert answer.choices[0].text == tokenizer.decode(expected)
    assert (answer.choices[0].finish_reason, answer.choices[0].logprobs) == ("length", None)
    assert answer.id.startswith("cmpl-")
    assert (answer.object, answer.model) == ("text_completion", nano.NAME)
    assert answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": len(tokens),
        "completion_tokens": 12,
        "total_tokens": len(tokens) + 12,
    }


def test_sixteen_tokens_unless_told_otherwise(api: openai.OpenAI) -> None:
    answer = api.completions.create(model=nano.NAME, prompt=FRANCE, temperature=0, stop=[])
    assert answer.usage.completion_tokens == 16


def test_saved_weights_answer_under_their_path(
    models: Models, client: LocalTrainingClient, stock: Any, tokenizer: Any
) -> None:
    """The request of the issue, on weights that differ from the base, against stock PEFT; under both prefixes."""
    disturb(client)
    path = client.save_weights_for_sampler("000080").result().path
    written = tokenizer.decode(written_by(plain_peft(client, stock), tokenizer.encode(FRANCE), 20))
    stop = next(sign for sign in written if sign not in written[:3])
    assert written != tokenizer.decode(written_by(stock, tokenizer.encode(FRANCE), 20))
    with listening(application(models)) as address:
        for prefix in PREFIXES:
            with connected(address, prefix) as made:
                response = made.completions.create(
                    model=path, prompt=FRANCE, max_tokens=20, temperature=0.0, stop=[stop]
                )
                assert response.choices[0].text == written.partition(stop)[0]
                assert response.choices[0].finish_reason == "stop"
                assert (response.model, made.models.retrieve(path).id) == (path, path)


def test_all_forms_of_a_prompt(api: openai.OpenAI, stock: Any, tokenizer: Any) -> None:
    other = "Once upon a"
    tokens = [tokenizer.encode(text) for text in (FRANCE, other)]
    written = [tokenizer.decode(written_by(stock, each, 12)) for each in tokens]
    assert [ask(api, prompt).choices[0].text for prompt in (FRANCE, tokens[0])] == written[:1] * 2
    for both in ([FRANCE, other], tokens):
        answer = ask(api, both, n=2)
        assert [choice.text for choice in answer.choices] == [written[0], written[0], written[1], written[1]]
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.usage.prompt_tokens == sum(map(len, tokens))
        assert answer.usage.completion_tokens == 4 * 12


def test_chat_tokens_may_stand_in_a_raw_prompt(api: openai.OpenAI, stock: Any, tokenizer: Any) -> None:
    raw = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    tokens = tokenizer.encode(raw)
    assert tokens[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")}
    written = written_by(stock, tokens, 12)
    assert not ends & set(written)  # so that the answer below is all of it
    assert ask(api, raw).choices[0].text == tokenizer.decode(written)


def test_stops_cut_the_text(api: openai.OpenAI, stock: Any, tokenizer: Any) -> None:
    tokens = written_by(stock, tokenizer.encode(FRANCE), 12)
    text = tokenizer.decode(tokens)
    middle = text[2:5]
    for stop in (middle, [middle], ["never there", middle]):
        choice = ask(api, stop=stop).choices[0]
        assert (choice.text, choice.finish_reason) == (text.partition(middle)[0], "stop")
    unmet = ask(api, stop=["never there"]).choices[0]
    assert (unmet.text, unmet.finish_reason) == (text, "length")
    by_token = ask(api, extra_body={"stop_token_ids": [tokens[2]]})
    assert by_token.choices[0].text == tokenizer.decode(tokens[: tokens.index(tokens[2])])
    assert by_token.choices[0].finish_reason == "stop"
    assert by_token.usage.completion_tokens == tokens.index(tokens[2]) + 1  # the end was written too
    pieces = streamed(api, stop=[middle])  # which holds back what a stop may take
    assert "".join(piece.choices[0].text for piece in pieces) == text.partition(middle)[0]
    assert pieces[-1].choices[0].finish_reason == "stop"


def test_log_probs_are_the_stock_models(api: openai.OpenAI, stock: Any, tokenizer: Any) -> None:
    prompt = tokenizer.encode(FRANCE)
    written = written_by(stock, prompt, 6)
    everything = [*prompt, *written]
    expected = log_probs_of(stock, everything)
    for echo in (False, True):
        made = api.completions.create(
            model=nano.NAME, prompt=FRANCE, max_tokens=6, temperature=0, logprobs=3, echo=echo
        )  # not checked: nothing is said about the first token of a prompt, though the type has no room for null
        choice = made.choices[0]
        got, begin = choice.logprobs, 0 if echo else len(prompt)
        assert choice.text == (FRANCE if echo else "") + tokenizer.decode(written)
        assert got.tokens == [tokenizer.decode([token]) for token in everything[begin:]]
        ends = [*got.text_offset[1:], len(choice.text)]
        assert [choice.text[a:b] for a, b in zip(got.text_offset, ends, strict=True)] == got.tokens
        for place, token in list(enumerate(everything))[max(begin, 1) :]:
            row, number = expected[place - 1], place - begin
            assert got.token_logprobs[number] == pytest.approx(row[token].item(), abs=1e-4)
            best = {tokenizer.decode([n]): row[n].item() for n in [*row.topk(3).indices.tolist(), token]}
            assert got.top_logprobs[number] == pytest.approx(best, abs=1e-4)
        if echo:
            assert (got.token_logprobs[0], got.top_logprobs[0]) == (None, None)


def test_a_prompt_alone_is_scored(api: openai.OpenAI, stock: Any, tokenizer: Any) -> None:
    """As evaluation harnesses ask for log-likelihoods: echo, no new token."""
    prompt = tokenizer.encode(FRANCE)
    answer = api.completions.create(model=nano.NAME, prompt=[prompt], max_tokens=0, echo=True, logprobs=1)
    choice, rows = answer.choices[0], log_probs_of(stock, prompt)
    assert (choice.text, choice.finish_reason) == (FRANCE, "length")
    expected = [rows[n, token].item() for n, token in enumerate(prompt[1:])]
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    assert answer.usage.completion_tokens == 0


def test_what_is_asked_reaches_the_sampler(api: openai.OpenAI, models: Models, tokenizer: Any) -> None:
    ask(api, max_tokens=3, temperature=0.5, top_p=0.9, seed=11, n=2, stop="x", extra_body={"top_k": 7})
    params = models.requests[-1].params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (3, 0.5, 0.9, 7)
    assert (params.seed, models.requests[-1].num_samples) == (11, 2)
    assert params.stop == ["x", *sorted({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")})]


@pytest.mark.parametrize(
    "options", [{}, {"echo": True, "n": 2}, {"n": 3, "temperature": 2.0, "seed": 4, "logprobs": 2}]
)
def test_a_stream_adds_up_to_the_whole(api: openai.OpenAI, options: dict[str, Any]) -> None:
    prompts = [FRANCE, "Once upon a"]
    whole, (*pieces, last) = ask(api, prompts, **options), streamed(api, prompts, **options, **USAGE)
    assert len({piece.id for piece in (*pieces, last)}) == 1
    assert (last.choices, last.usage) == ([], whole.usage)
    assert all(piece.object == "text_completion" and piece.usage is None for piece in pieces)
    for choice in whole.choices:
        own = [piece.choices[0] for piece in pieces if piece.choices[0].index == choice.index]
        assert "".join(each.text for each in own) == choice.text
        assert [each.finish_reason for each in own] == [None] * (len(own) - 1) + [choice.finish_reason]
        if choice.logprobs is not None:
            parts = [each.logprobs.model_dump() for each in own if each.logprobs]
            for name, values in choice.logprobs.model_dump().items():
                got = [value for part in parts for value in part[name]]
                if name == "token_logprobs":
                    assert got == pytest.approx(values, abs=1e-4)
                elif name == "top_logprobs":
                    assert [sorted(each) for each in got] == [sorted(each) for each in values]
                else:
                    assert got == values


@pytest.mark.parametrize(
    ("wrong", "param", "words"),
    [
        ({"best_of": 3}, "best_of", "best_of = 3 is not supported"),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"frequency_penalty": -1}, "frequency_penalty", "not supported"),
        ({"store": True}, "store", "not supported"),
        ({"prompt": ""}, None, "0 positions"),
        ({"prompt": []}, "prompt", "prompt must be"),
        ({"prompt": [""]}, "prompt", "prompt must be"),
        ({"prompt": [1, "a"]}, "prompt", "prompt must be"),
        ({"prompt": [-1]}, "prompt", "prompt must be"),
        ({"prompt": [4096]}, None, "outside the vocabulary"),
        ({"prompt": [5, 4082]}, None, "stands for an image"),
        ({"prompt": "a <|image_pad|>"}, None, "stands for an image"),
        ({"prompt": "a <|video_pad|>"}, None, "stands for an image"),
        ({"prompt": ["a"] * 129}, "prompt", "at most 128"),
        ({"prompt": [5] * 4096}, None, "too long"),
        ({"max_tokens": 5000}, None, "too long"),
        ({"max_tokens": 0}, "max_tokens", "needs echo"),
        ({"max_tokens": "7"}, "max_tokens", "valid integer"),
        ({"n": True}, "n", "valid integer"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"seed": -(2**63) - 1}, "seed", "greater than or equal to -9223372036854775808"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"stop": [""]}, "stop", "none of them empty"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "is for streams"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options", "stream_options.x is not known"),
        ({"stream": True, "echo": True, "logprobs": 1}, "logprobs", "cannot be streamed"),
    ],
)
def test_what_is_wrong_is_named(api: openai.OpenAI, wrong: dict[str, Any], param: str | None, words: str) -> None:
    refusal(api, "completions", words, param, **wrong)


def test_what_asks_for_nothing_is_taken(api: openai.OpenAI) -> None:
    nothing = {"best_of": 1, "suffix": "", "logit_bias": {}, "presence_penalty": 0.0, "frequency_penalty": 0}
    nothing |= {"stop": None, "seed": None, "logprobs": None, "stream": None, "user": "me", "store": False}
    assert ask(api, extra_body={**nothing, "metadata": {"a": "b"}}).choices[0].text == ask(api).choices[0].text
