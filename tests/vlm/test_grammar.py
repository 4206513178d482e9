"""Sampling by a grammar: what stock generate gives when the forbidden tokens' logits are -inf, in a batch and alone."""

import json
from typing import Any

import pytest
import torch
from tinker import types

from kshot.errors import RequestError
from vlm import nano
from vlm.inputs import model_input
from vlm.local.clients import LocalSamplingClient, SamplingRequest
from vlm.local.sampling.grammar import Grammar

DIGITS = "%llguidance {}\nstart: /[0-9]{5}/\n"  # which tokens it allows can be told without the library


def grammar(sampler: LocalSamplingClient, text: str) -> Grammar:
    return sampler.grammar(text, [sampler.get_tokenizer().eos_token_id])


def schema(value: Any) -> str:
    return f"%llguidance {{}}\nstart: %json {json.dumps(value)}\n"


def ask(sampler: LocalSamplingClient, text: str | None, prompt: str = "Once upon a", **options: Any) -> SamplingRequest:
    end = sampler.get_tokenizer().eos_token_id
    params = types.SamplingParams(**{"max_tokens": 40, "temperature": 0.0, "stop": [end], **options})
    made = text and grammar(sampler, text)
    return SamplingRequest(model_input(sampler.get_tokenizer().encode(prompt)), params, grammar=made or None)


def digits_by_hand(stock: Any, tokenizer: Any, prompt: str) -> tuple[str, list[float]]:
    """Five digits, greedily by the stock model, and its own log-probabilities of the tokens."""
    ids, text, log_probs = tokenizer.encode(prompt), "", list[float]()
    pieces = {n: tokenizer.decode([n]) for n in range(len(tokenizer))}
    while len(text) < 5:
        with torch.no_grad():
            row = stock(input_ids=torch.tensor([ids])).logits[0, -1]
        fitting = [n for n, piece in pieces.items() if piece.isdecimal() and piece.isascii() and len(text + piece) <= 5]
        best = max(fitting, key=lambda n: float(row[n]))
        ids, text = [*ids, best], text + pieces[best]
        log_probs.append(float(row.log_softmax(-1)[best]))
    return text, log_probs


def test_greedy_samples_are_the_stock_models_best_of_what_is_allowed(
    sampler: LocalSamplingClient, stock: Any, tokenizer: Any
) -> None:
    """Beside others that are free, and with the log-probabilities that the model gives without a grammar."""
    prompts = ["Once upon a", "The number is"]
    asked = [ask(sampler, DIGITS, prompt) for prompt in prompts] + [ask(sampler, None, max_tokens=8)]
    results = [sampler.start(each) for each in asked]
    for prompt, result in zip(prompts, results, strict=False):
        (sequence,) = result.result().sequences
        text, log_probs = digits_by_hand(stock, tokenizer, prompt)
        assert (tokenizer.decode(sequence.tokens), sequence.stop_reason) == (text, "stop")
        assert sequence.logprobs == pytest.approx(log_probs, abs=1e-4)
    alone = sampler.start(ask(sampler, None, max_tokens=8)).result()
    assert results[-1].result().sequences[0].tokens == alone.sequences[0].tokens


@pytest.mark.parametrize("options", [{"seed": 3}, {"top_k": 5, "seed": 1}, {"top_p": 0.5}, {"temperature": 3.0}])
def test_what_is_drawn_follows_it_too(sampler: LocalSamplingClient, tokenizer: Any, options: dict[str, Any]) -> None:
    request = ask(sampler, schema({"enum": ["red", "green", 7]}), **{"temperature": 1.0, **options})
    results = sampler.start(SamplingRequest(request.prompt, request.params, 6, grammar=request.grammar)).result()
    for sequence in results.sequences:
        assert json.loads(tokenizer.decode(sequence.tokens)) in ("red", "green", 7)
        assert sequence.stop_reason == "stop"


def test_an_answer_that_may_end_is_ended_by_the_models_own_token(sampler: LocalSamplingClient, tokenizer: Any) -> None:
    text = "%llguidance {}\nstart: /(a|b)*/\n"
    walk = grammar(sampler, text).walk()
    allowed = {tokenizer.decode([n]) for n in walk.allowed().nonzero()[:, 0].tolist()}
    assert {"a", "b", "<|im_end|>"} <= allowed <= {"a", "b", "ab", "ba", "aa", "bb", "abb", "<|im_end|>"}
    walk.append(tokenizer.eos_token_id)
    assert walk.ended


def test_what_a_limit_cuts_says_so(sampler: LocalSamplingClient) -> None:
    (sequence,) = sampler.start(ask(sampler, DIGITS, max_tokens=2)).result().sequences
    assert (len(sequence.tokens), sequence.stop_reason) == (2, "length")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"type": "foo"}, "Invalid type: foo"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "pattern": "(?=a)"}, "look-around"),
        ({"enum": []}, "Unsatisfiable"),
        ({"$ref": "https://example.com/x"}, "example.com"),
        ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "no text does"),
    ],
)
def test_what_the_library_refuses_is_refused_with_its_reason(
    sampler: LocalSamplingClient, value: Any, words: str
) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        grammar(sampler, schema(value))
    assert "\n" not in str(caught.value)


def test_a_grammar_that_turns_out_to_be_too_much_fails_its_own_request_alone(sampler: LocalSamplingClient) -> None:
    broken, other = ask(sampler, DIGITS), ask(sampler, DIGITS)

    class Failing:
        def __init__(self, walk: Any) -> None:
            self.walk, self.ended, self.error = walk, False, ""

        def allowed(self) -> Any:
            return self.walk.allowed()

        def append(self, token: int) -> None:
            self.error = "ParserTooComplex"

    made = broken.grammar.walk
    broken.grammar.walk = lambda: Failing(made())  # type: ignore[method-assign,return-value]
    results = [sampler.start(broken), sampler.start(other)]
    with pytest.raises(RequestError, match="ParserTooComplex"):
        results[0].result()
    assert len(results[1].result().sequences) == 1


def test_the_vocabulary_is_the_models(sampler: LocalSamplingClient) -> None:
    """Which may be larger than the tokenizer's."""
    assert grammar(sampler, DIGITS).walk().allowed().shape == (sampler._engine.model.vocabulary,)
    assert sampler.get_base_model() == nano.NAME
