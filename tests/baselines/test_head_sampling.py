"""Samples of a trained head against its class probabilities, and what cannot be asked of it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tinker
from scipy.special import softmax
from scipy.stats import chisquare
from tinker import types

from baselines import nano
from baselines.lora import question
from baselines.training import LoraHeadClient, LoraHeadSampler
from kshot.errors import RequestError
from tests.baselines.plain_lora import data_of, step

DRAWS = 10_000


@pytest.fixture(scope="module")
def images(make_image: Callable[..., bytes]) -> list[bytes]:
    return [make_image(seed) for seed in range(4)]


@pytest.fixture(scope="module")
def sampler(images: list[bytes]) -> LoraHeadSampler:
    """Of four classes, of four steps: sure of none."""
    client = LoraHeadClient(nano.NAME, 4, rank=4, seed=0)
    for _ in range(4):
        step(client, data_of(images, [0, 1, 2, 3]), types.AdamParams(learning_rate=2e-3, eps=1e-8))
    return client.save_weights_and_get_sampling_client().result()


def params(**given: Any) -> types.SamplingParams:
    return types.SamplingParams(**{"max_tokens": 1, "seed": 0, **given})


def counts(sampler: LoraHeadSampler, image: bytes, **given: Any) -> np.ndarray:
    answer = sampler.sample(question(image), DRAWS, params(**given)).result()
    return np.bincount([sequence.tokens[0] for sequence in answer.sequences], minlength=4)


def test_temperature_zero_is_the_likeliest_class(sampler: LoraHeadSampler, images: list[bytes]) -> None:
    log_probs = sampler.class_log_probs(images)
    for image, row in zip(images, log_probs, strict=True):
        answer = sampler.sample(question(image), 2, params(temperature=0.0)).result()
        for sequence in answer.sequences:
            assert sequence.tokens == [row.argmax()]
            assert sequence.logprobs == pytest.approx([row.max()], abs=1e-4)
            assert sequence.stop_reason == "length"
        assert len({sequence.sequence_id for sequence in answer.sequences}) == 2
        assert answer.prompt_logprobs is None


def test_of_equal_classes_the_lowest_is_taken(images: list[bytes]) -> None:
    untrained = LoraHeadClient(nano.NAME, 4, seed=0).save_weights_and_get_sampling_client().result()
    for filters in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-3}):
        answer = untrained.sample(question(images[0]), 1, params(**filters)).result()
        assert answer.sequences[0].tokens == [0], filters


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_class_probabilities(
    temperature: float, sampler: LoraHeadSampler, images: list[bytes]
) -> None:
    expected = softmax(sampler.class_log_probs(images)[0] / temperature)
    assert expected.min() * DRAWS > 5  # what the test needs
    drawn = counts(sampler, images[0], temperature=temperature)
    assert chisquare(drawn, DRAWS * expected).pvalue > 0.01
    others = softmax(sampler.class_log_probs(images)[0] / (2 * temperature))
    assert chisquare(drawn, DRAWS * others).pvalue < 1e-6  # it sees a temperature of twice that


def test_top_k_and_top_p_draw_from_the_likeliest(sampler: LoraHeadSampler, images: list[bytes]) -> None:
    probs = np.exp(sampler.class_log_probs(images)[0])
    order = np.argsort(probs)[::-1]
    nucleus = float(probs[order[:2]].sum() + 0.5 * probs[order[2]])  # three reach it, two do not
    for kept, filters in ((2, {"top_k": 2}), (3, {"top_p": nucleus}), (4, {"top_k": 0}), (4, {"top_k": 9})):
        drawn = counts(sampler, images[0], **filters)
        expected = np.zeros(4)
        expected[order[:kept]] = probs[order[:kept]] / probs[order[:kept]].sum()
        assert (drawn[order[kept:]] == 0).all()
        assert chisquare(drawn[order[:kept]], DRAWS * expected[order[:kept]]).pvalue > 0.01, filters


def test_a_seed_says_which_samples(sampler: LoraHeadSampler, images: list[bytes]) -> None:
    def draw(seed: int | None) -> list[int]:
        answer = sampler.sample(question(images[0]), 50, params(seed=seed)).result()
        return [sequence.tokens[0] for sequence in answer.sequences]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert draw(None) != draw(None)


def test_log_probs_are_the_models_whatever_the_temperature(sampler: LoraHeadSampler, images: list[bytes]) -> None:
    row = sampler.class_log_probs(images)[1]
    answer = sampler.sample(question(images[1]), 20, params(temperature=5.0, top_k=3)).result()
    for sequence in answer.sequences:
        assert sequence.logprobs == pytest.approx([row[sequence.tokens[0]]], abs=1e-4)


def test_extreme_temperatures_do_not_overflow(sampler: LoraHeadSampler, images: list[bytes]) -> None:
    likeliest = int(sampler.class_log_probs(images)[0].argmax())
    assert counts(sampler, images[0], temperature=1e-310)[likeliest] == DRAWS
    assert chisquare(counts(sampler, images[0], temperature=1e300)).pvalue > 0.01


def test_a_sequence_ends_after_one_class(sampler: LoraHeadSampler, images: list[bytes]) -> None:
    likeliest = int(sampler.class_log_probs(images)[0].argmax())
    for given, reason in (
        ({"max_tokens": None}, "length"),
        ({"max_tokens": 7}, "length"),
        ({"stop": []}, "length"),
        ({"stop": [(likeliest + 1) % 4]}, "length"),
        ({"stop": [likeliest]}, "stop"),
    ):
        (sequence,) = sampler.sample(question(images[0]), 1, params(temperature=0.0, **given)).result().sequences
        assert (sequence.tokens, sequence.stop_reason) == ([likeliest], reason), given


def test_of_the_prompt_there_is_no_log_probability(sampler: LoraHeadSampler, images: list[bytes]) -> None:
    assert sampler.compute_logprobs(question(images[0])).result() == [None]
    answer = sampler.sample(question(images[0]), 1, params(), include_prompt_logprobs=True).result()
    assert answer.prompt_logprobs == [None]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"num_samples": 0}, "num_samples = 0"),
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"temperature": -1.0}, "temperature = -1"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"top_p": 0.0}, "top_p = 0"),
        ({"top_k": -2}, "top_k = -2"),
        ({"seed": -1}, "seed = -1"),
        ({"stop": "\n"}, "no text"),
        ({"stop": ["a"]}, "no text"),
    ],
)
def test_what_cannot_be_sampled_is_named(
    given: dict[str, Any], says: str, sampler: LoraHeadSampler, images: list[bytes]
) -> None:
    number = given.pop("num_samples", 1)
    with pytest.raises(RequestError, match=says):
        sampler.sample(question(images[0]), number, params(**given)).result()


def test_what_a_classifier_has_not_is_named(sampler: LoraHeadSampler, images: list[bytes]) -> None:
    targets = tinker.TensorData.from_numpy(np.array([0]))
    for option in ({"topk_prompt_logprobs": 1}, {"topk_sample_logprobs": 2}, {"target_prompt_logprobs": targets}):
        with pytest.raises(RequestError, match=f"{next(iter(option))}=.*not supported by a classifier"):
            sampler.sample(question(images[0]), 1, params(), **option)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="no tokenizer"):
        sampler.get_tokenizer()
    text = tinker.ModelInput.from_ints([1, 2])
    for ask in (sampler.compute_logprobs(text), sampler.sample(text, 1, params())):
        with pytest.raises(RequestError, match="exactly one ImageChunk"):
            ask.result()
