"""Sampling and scores by the SDK's methods, on the local engine and on a server: the same tests.

What is expected comes from the stock model, its own generate, and a stock forward pass for each choice.
"""

from typing import Any

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from tests.vlm import brute_force
from tests.vlm.helpers import IMAGE, Pictured, greedy, stock_inputs
from tests.vlm.services import PATIENCE, Service, peft, step, stock_log_probs
from tests.vlm.serving import KEY
from vlm import nano
from vlm.inputs import ImageRule, model_input
from vlm.prompts import Prompt
from vlm.scoring import score_choices

ADAM = types.AdamParams(learning_rate=1e-2, eps=1e-2)
ONE = types.SamplingParams(max_tokens=1)


@pytest.fixture(scope="module")
def sampler(both: Service) -> Any:
    return both.base()


def sample(sampler: Any, query: tinker.ModelInput, count: int = 1, **options: Any) -> list[types.SampledSequence]:
    params = types.SamplingParams(**{"max_tokens": 8, "stop": [], **options})
    sequences: list[types.SampledSequence] = sampler.sample(query, count, params).result(PATIENCE).sequences
    return sequences


def test_greedy_tokens_are_those_of_stock_generate(
    sampler: Any, stock: Any, prompts: list[tinker.ModelInput], rule: ImageRule
) -> None:
    params = types.SamplingParams(max_tokens=10, temperature=0.0, stop=[])
    futures = [sampler.sample(query, 1, params) for query in prompts]  # all at once: a server writes them together
    for query, future in zip(prompts, futures, strict=True):
        (sequence,) = future.result(PATIENCE).sequences
        assert sequence.tokens == greedy(stock, query, rule, 10)
        assert sequence.stop_reason == "length"


def test_a_servers_sampler_has_a_handle_for_other_processes(
    both: Service, sampler: Any, prompts: list[tinker.ModelInput]
) -> None:
    if both.kind != "http":
        with both.refuses("a sampler of the local service has no handle"):
            sampler.get_sampler_handle()
        return
    twin = tinker.SamplingClient.from_sampler_handle(sampler.get_sampler_handle(), api_key=KEY)
    try:
        assert twin.get_base_model() == nano.NAME
        for query in prompts[:2]:
            (one,), (other,) = (sample(each, query, seed=3) for each in (sampler, twin))
            assert one.tokens == other.tokens
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    finally:
        twin.holder.close()


def test_log_probs_of_a_sample_and_its_likeliest_tokens_are_the_models(
    sampler: Any, stock: Any, prompts: list[tinker.ModelInput], rule: ImageRule
) -> None:
    """Whatever temperature and filters drew the tokens."""
    query = prompts[0]
    params = types.SamplingParams(max_tokens=6, temperature=1.5, top_k=50, top_p=0.9, seed=3, stop=[])
    for sequence in sampler.sample(query, 2, params, topk_sample_logprobs=3).result(PATIENCE).sequences:
        expected = stock_log_probs(stock, model_input(*query.chunks, sequence.tokens), rule)[query.length - 1 : -1]
        own = expected.gather(1, torch.tensor(sequence.tokens)[:, None])[:, 0]
        assert sequence.logprobs == pytest.approx(own.tolist(), abs=1e-4)
        best, given = expected.topk(3), sequence.topk_logprobs_np
        assert (given.token_ids.dtype, given.logprobs.dtype) == (np.int32, np.float32)
        assert [[token for token, _ in top] for top in sequence.topk_logprobs] == best.indices.tolist()
        values = [value for top in sequence.topk_logprobs for _, value in top]
        assert values == pytest.approx(best.values.flatten().tolist(), abs=1e-4)
    assert sample(sampler, query)[0].topk_logprobs is None


def test_seeds_reproduce_and_samples_differ(sampler: Any, prompts: list[tinker.ModelInput]) -> None:
    def tokens(**options: Any) -> list[tuple[int, ...]]:
        return [tuple(s.tokens) for s in sample(sampler, prompts[0], 3, temperature=2.0, **options)]

    assert tokens(seed=1) == tokens(seed=1)
    assert len({*tokens(seed=1), *tokens(seed=2), *tokens(), *tokens()}) == 12
    ids = [s.sequence_id for s in [*sample(sampler, prompts[0], 3), *sample(sampler, prompts[0], 2)]]
    assert len(set(ids)) == 5


def test_stop_tokens_strings_and_lengths(sampler: Any, prompt: Prompt, prompts: list[tinker.ModelInput]) -> None:
    def write(stop: Any, max_tokens: int = 10) -> types.SampledSequence:
        return sample(sampler, prompts[0], temperature=0.0, stop=stop, max_tokens=max_tokens)[0]

    free = write([])
    assert (free.stop_reason, len(free.tokens)) == ("length", 10)
    assert write([], 4).tokens == free.tokens[:4]
    third = free.tokens[2]
    by_id = write([third])
    assert by_id.stop_reason == "stop"
    assert by_id.tokens == free.tokens[: free.tokens.index(third) + 1]
    text = prompt.tokenizer.decode(free.tokens)
    for stop in (text[2:4], [text[2:4], "never"]):
        by_string = write(stop)
        assert by_string.stop_reason == "stop"
        assert text[2:4] in prompt.tokenizer.decode(by_string.tokens)
        assert text[2:4] not in prompt.tokenizer.decode(by_string.tokens[:-1])


def test_log_probs_of_a_prompt_are_the_models(
    sampler: Any, stock: Any, prompts: list[tinker.ModelInput], rule: ImageRule
) -> None:
    for query in prompts:
        ids, expected = stock_inputs(query, rule)["input_ids"][0], stock_log_probs(stock, query, rule)
        own = expected[:-1].gather(1, ids[1:, None])[:, 0]
        unscored = [n == 0 or ids[n] == IMAGE for n in range(len(ids))]
        got = sampler.compute_logprobs(query).result(PATIENCE)
        assert [value is None for value in got] == unscored
        values = [value for value in got if value is not None]
        assert values == pytest.approx([own[n - 1].item() for n, no in enumerate(unscored) if not no], abs=1e-4)
        answer = sampler.sample(query, 1, ONE, include_prompt_logprobs=True).result(PATIENCE)
        assert answer.prompt_logprobs == pytest.approx(got, abs=1e-4)
        for n in {1, 2, query.length - 1}:  # of the last of all, some are an image's
            before = [None] * (query.length - n)
            last = sampler.compute_logprobs(query, n).result(PATIENCE)
            assert last == pytest.approx([*before, *got[-n:]], abs=1e-4)
            some = sampler.sample(query, 1, ONE, True, 2, prompt_logprobs_last_n=n).result(PATIENCE)
            assert some.prompt_logprobs == pytest.approx(last, abs=1e-4)
            assert some.topk_prompt_logprobs[:-n] == before
            likeliest = [[token for token, _ in top] for top in some.topk_prompt_logprobs[-n:]]
            assert likeliest == expected[-n - 1 : -1].topk(2).indices.tolist()


def test_chosen_and_likeliest_tokens_of_a_prompt(
    sampler: Any, stock: Any, prompts: list[tinker.ModelInput], rule: ImageRule
) -> None:
    query = prompts[0]
    expected = stock_log_probs(stock, query, rule)
    ids = torch.full((query.length - 1, 2), -1, dtype=torch.int64)
    ids[-1], ids[3, 0] = torch.tensor([17, 4000]), 5
    cells = (ids != -1).numpy()
    for target in (types.TensorData.from_torch(ids), types.TensorData.from_torch_sparse(ids, pad_value=-1)):
        answer = sampler.sample(query, 1, ONE, topk_prompt_logprobs=3, target_prompt_logprobs=target).result(PATIENCE)
        values = answer.target_prompt_logprobs.to_torch().numpy()
        assert values.shape == cells.shape
        wanted = [expected[3, 5].item(), *expected[-2, [17, 4000]].tolist()]
        assert values[cells] == pytest.approx(np.array(wanted), abs=1e-4)
        assert answer.topk_prompt_logprobs[0] is None
        likeliest = [[token for token, _ in top] for top in answer.topk_prompt_logprobs[1:]]
        assert likeliest == expected[:-1].topk(3).indices.tolist()


def test_draws_in_the_prompts_place(
    sampler: Any, stock: Any, prompts: list[tinker.ModelInput], rule: ImageRule
) -> None:
    query, expected = prompts[0], stock_log_probs(stock, prompts[0], rule)[:-1]

    def draws(count: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        params = types.SamplingParams(**{"max_tokens": 1, **options})
        drawn = sampler.sample(query, 1, params, prompt_alt_tokens_k=count).result(PATIENCE).prompt_alt_tokens
        return drawn.tokens.to_torch(), drawn.logprobs.to_torch()

    tokens, values = draws(50, temperature=1.0, seed=5)
    assert tokens.shape == (query.length - 1, 50)
    assert torch.allclose(values, expected.gather(1, tokens), atol=1e-4)
    assert torch.equal(draws(50, temperature=1.0, seed=5)[0], tokens)
    assert not torch.equal(draws(50, temperature=1.0, seed=6)[0], tokens)
    assert torch.equal(draws(2, temperature=0.0)[0], expected.argmax(-1, keepdim=True).expand(-1, 2))


@pytest.mark.parametrize("method", ["constrained", "likelihood"])
def test_scores_of_choices_are_those_of_a_stock_pass_for_each(
    method: str, sampler: Any, stock: Any, prompt: Prompt, examples: list[Pictured], rule: ImageRule
) -> None:
    query = [prompt.question(each.image) for each in examples[:2]]
    got = score_choices(sampler, query, prompt.choices, method)
    for row, each in zip(got, query, strict=True):
        expected = brute_force.scores(stock, each, prompt.choices, rule, IMAGE)[method]
        assert row == pytest.approx(expected, abs=1e-4)


def test_samplers_are_snapshots(
    both: Service, stock: Any, mixed: list[tinker.Datum], prompts: list[tinker.ModelInput], rule: ImageRule
) -> None:
    """Of the weights when the request's turn comes: after the steps submitted before it, before those after it."""
    run, query = both.start(), prompts[1]
    for _ in range(3):
        run.forward_backward(mixed, "cross_entropy")
        run.optim_step(ADAM)
    unsaved = run.save_weights_and_get_sampling_client()
    path = run.save_weights_for_sampler("third").result(PATIENCE).path  # the SDK numbers it later than it is asked for
    step(run, mixed, ADAM)
    assert path == f"tinker://{run.model_id}/sampler_weights/third"
    ids = stock_inputs(query, rule)["input_ids"][0]
    expected, base = (
        stock_log_probs(model, query, rule)[:-1].gather(1, ids[1:, None])[:, 0].tolist()
        for model in (peft(stock, both.folder(path)), stock)
    )
    assert abs(expected[-1] - base[-1]) > 0.01
    saved = both.client.create_sampling_client(model_path=path).result(PATIENCE)
    for client, wanted in ((unsaved.result(PATIENCE), expected), (saved, expected), (both.base(), base)):
        assert client.get_base_model() == nano.NAME
        step(run, mixed, ADAM)
        got = client.compute_logprobs(query).result(PATIENCE)
        pairs = [(value, wanted[n - 1]) for n, value in enumerate(got) if value is not None]
        assert [value for value, _ in pairs] == pytest.approx([value for _, value in pairs], abs=1e-4)
