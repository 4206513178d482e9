"""Sampling on the local engine alone: what `test_conformance_sampling.py` asks of every service is not repeated."""

from typing import Any

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from kshot.errors import RequestError
from tests.vlm.helpers import OtherService, Pictured, greedy, stock_inputs
from vlm.classifier import generate
from vlm.inputs import ImageRule
from vlm.local.clients import LocalSamplingClient
from vlm.local.sampling.decoder import TokenSequence, _append_next_tokens, _candidates, sample_token
from vlm.prompts import Prompt


def test_top_k_top_p_and_temperature_choose_from_what_they_say() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)

    def drawn(**params: Any) -> dict[int, float]:
        made = [sample_token(logits, types.SamplingParams(**params), generator) for _ in range(1500)]
        return {token: made.count(token) / 1500 for token in sorted(set(made))}

    assert drawn(temperature=0.0) == {0: 1.0}
    assert drawn() == pytest.approx({0: 0.5, 1: 0.3, 2: 0.15, 3: 0.05}, abs=0.05)
    assert drawn(top_k=2) == pytest.approx({0: 0.625, 1: 0.375}, abs=0.05)
    assert drawn(top_p=0.6) == pytest.approx({0: 0.625, 1: 0.375}, abs=0.05)  # 0.5 alone does not reach 0.6
    assert drawn(top_p=0.5) == {0: 1.0}
    flat = np.sqrt([0.5, 0.3, 0.15, 0.05])
    assert drawn(temperature=2.0) == pytest.approx(dict(enumerate(flat / flat.sum())), abs=0.05)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_stands_for_an_image_is_never_written(sampler: LocalSamplingClient, temperature: float) -> None:
    """Its log-probabilities are still the model's."""
    model = sampler._engine.model
    logits = torch.zeros(1, model.vocabulary)
    logits[0, [*model.placeholders]] = 40.0
    logits[0, 7] = 30.0
    sequence = TokenSequence(model.tokenizer, types.SamplingParams(temperature=temperature, seed=0), 0, top=1)
    _append_next_tokens([sequence], logits, model.placeholders)
    assert sequence.tokens == [7]
    assert sequence.log_probs == pytest.approx([float(logits.log_softmax(-1)[0, 7])], rel=1e-5)
    assert sequence.tops[0][0][0] in model.placeholders


def test_free_answers_are_greedy_and_end_with_the_turn(
    sampler: LocalSamplingClient,
    stock: Any,
    prompt: Prompt,
    examples: list[Pictured],
    rule: ImageRule,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = [e.image for e in examples[:3]]
    written = [greedy(stock, prompt.question(image), rule, 24) for image in images]
    whole = [prompt.tokenizer.decode(tokens).split("<|im_end|>")[0].strip() for tokens in written]
    assert generate(sampler, images, prompt, 24) == whole
    assert generate(OtherService(sampler), images, prompt, 24) == whole  # type: ignore[arg-type]
    monkeypatch.setitem(vars(prompt), "stops", [written[0][5]])  # as if this token ended the turn
    first = written[0][: written[0].index(written[0][5]) + 1]
    assert generate(sampler, images[:1], prompt, 24) == [prompt.tokenizer.decode(first).strip()]


def test_options_out_of_range_are_named(sampler: LocalSamplingClient, prompts: list[tinker.ModelInput]) -> None:
    params, rows = types.SamplingParams(max_tokens=1), prompts[0].length - 1
    with pytest.raises(RequestError, match="seed = 18446744073709551616 is out of range"):
        sampler.sample(prompts[0], 1, types.SamplingParams(max_tokens=1, seed=2**64)).result()
    for name, value in (
        ("topk_sample_logprobs", -1),
        ("topk_sample_logprobs", 4097),
        ("prompt_alt_tokens_k", -1),
        ("prompt_alt_tokens_k", 4097),
        ("prompt_logprobs_last_n", 0),
        ("prompt_logprobs_last_n", rows + 1),
    ):
        with pytest.raises(RequestError, match=f"{name} = {value} is out of range"):
            sampler.sample(prompts[0], 1, params, True, **{name: value}).result()  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="prompt_logprobs_last_n = 2 is of prompt_logprobs"):
        sampler.sample(prompts[0], 1, params, topk_prompt_logprobs=1, prompt_logprobs_last_n=2).result()


def test_draws_in_the_prompts_place_are_the_models_at_the_temperature(
    sampler: LocalSamplingClient, stock: Any, prompts: list[tinker.ModelInput], rule: ImageRule
) -> None:
    """Filters do not count, nor how many positions are scored; 4,000 draws a position are as its distribution says."""
    asked, params = prompts[0], types.SamplingParams(max_tokens=1, seed=5, top_k=2, temperature=0.5)
    with torch.no_grad():
        logits = stock(**stock_inputs(asked, rule)).logits[0, :-1].double()
    answer = sampler.sample(asked, 1, params, True, prompt_alt_tokens_k=4000, prompt_logprobs_last_n=1).result()
    drawn = answer.prompt_alt_tokens
    assert drawn is not None
    assert (drawn.tokens.dtype, drawn.logprobs.dtype) == ("int64", "float32")
    assert drawn.tokens.shape == drawn.logprobs.shape == [asked.length - 1, 4000]
    tokens = drawn.tokens.to_torch()
    expected = logits.log_softmax(-1).gather(1, tokens)
    assert torch.allclose(drawn.logprobs.to_torch().double(), expected, atol=1e-4)
    probs = (logits / 0.5).softmax(-1)
    counts = torch.zeros_like(probs).scatter_add_(1, tokens, torch.ones_like(tokens, dtype=torch.float64))
    z = (counts / 4000 - probs) / (probs * (1 - probs) / 4000).sqrt().clamp(min=1e-9)
    assert z[probs > 0.01].abs().max() < 5
    assert counts[probs < 1e-12].sum() == 0


def test_the_nucleus_of_many_tokens_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the likeliest tokens are sorted at first; what comes out does not depend on how many those are."""
    logits = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    for top_k, top_p in ((-1, 0.5), (2000, 0.5), (4000, 0.9), (-1, 0.999), (30, 0.9)):
        order = logits.argsort(descending=True)
        probs = logits[order[: top_k if top_k > 0 else None]].double().softmax(-1)
        size = int((probs.cumsum(-1) - probs < top_p).sum())
        for likely in (16, 1024):
            monkeypatch.setattr("vlm.local.sampling.decoder.LIKELY", likely)
            kept, tokens = _candidates(logits.double(), top_k, top_p)
            assert tokens.tolist() == order[:size].tolist()
            assert torch.allclose(kept / kept.sum(), probs[:size] / probs[:size].sum())


def test_tiny_temperatures_are_nearly_greedy_and_empty_stops_are_refused(
    sampler: LocalSamplingClient, prompts: list[tinker.ModelInput]
) -> None:
    greedy, tiny = (types.SamplingParams(max_tokens=3, temperature=t, seed=0, stop=[]) for t in (0.0, 1e-40))
    answers = [sampler.sample(prompts[0], 1, params).result().sequences[0].tokens for params in (greedy, tiny)]
    assert answers[0] == answers[1]
    for stop in ("", ["a", ""]):
        with pytest.raises(RequestError, match="empty text"):
            sampler.sample(prompts[0], 1, types.SamplingParams(max_tokens=3, stop=stop)).result()


def test_prompt_values_in_parts_equal_those_at_once(
    sampler: LocalSamplingClient, prompts: list[tinker.ModelInput], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits of a long prompt are never in memory together."""
    asked = prompts[3]
    ids = torch.full((asked.length - 1, 3), -1)
    ids[::2] = torch.tensor([5, 6, 7])
    targets, params = types.TensorData.from_torch(ids), types.SamplingParams(max_tokens=1, seed=0)

    def values() -> tuple[Any, ...]:
        answer = sampler.sample(asked, 1, params, True, 2, target_prompt_logprobs=targets).result()
        assert answer.target_prompt_logprobs is not None
        assert answer.topk_prompt_logprobs is not None
        tops = [[token for token, _ in top] for top in answer.topk_prompt_logprobs if top]
        return answer.prompt_logprobs, tops, answer.target_prompt_logprobs.to_numpy()

    own, tops, chosen = values()
    assert not chosen[1::2].any()  # where nothing is to be scored
    monkeypatch.setattr("vlm.local.sampling.sampler.LOGITS", 7 * 4096)
    again, tops_again, chosen_again = values()
    assert tops_again == tops
    assert chosen_again == pytest.approx(chosen, abs=1e-4)
    assert [v is None for v in again] == [v is None for v in own]
    assert [v for v in again if v is not None] == pytest.approx([v for v in own if v is not None], abs=1e-4)
