"""Learning from reward: what answers are worth, the data made of them, and a run that learns from them on every
service."""

from collections.abc import Callable
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tinker
from tinker import types

from data import catalog
from data.fewshot import k_shot
from kshot.errors import InputError, RequestError
from tests.vlm.helpers import Pictured
from tests.vlm.services import PATIENCE, Service
from vlm import nano
from vlm.classifier import batches, fit, predict
from vlm.inputs import ImageRule
from vlm.local.clients import LocalTrainingClient
from vlm.local.registry import LocalServiceClient
from vlm.local.sampling import sampler as sampler_module
from vlm.prompts import Prompt
from vlm.reward import Answer, Policy, answer_datum, gains, reinforce, sample_groups, with_log_probs
from vlm.service import tokenizer

ADAM = types.AdamParams(learning_rate=1e-3, eps=1e-8)
TEXT = tinker.ModelInput.from_ints([5, 6, 7])


def test_gains_are_in_standard_deviations_of_the_group() -> None:
    assert gains(np.array([1.0, 0.0, 0.0, 0.0])) == pytest.approx([3**0.5, *[-(3**-0.5)] * 3])
    assert gains(np.array([1.0, 1.0])).tolist() == gains(np.zeros(2)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("reward", [0.1, 0.2, 0.7, 0.9, -0.3])
def test_equal_rewards_are_worth_nothing_however_they_round(reward: float) -> None:
    assert all(not gains(np.full(size, reward)).any() for size in range(2, 17))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"group_size": 1}, "group_size 1 compares no answers"),
        ({"temperature": 0.0}, "temperature 0.0 samples the same answer"),
        ({"loss": "cross_entropy"}, "unknown loss of reward 'cross_entropy'; choose from: importance_sampling, ppo"),
        ({"kl": 0.1, "temperature": 0.5}, "kl 0.1 is measured at temperature 1"),
    ],
)
def test_a_policy_that_learns_nothing_or_wrongly_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        Policy(**changes)


def test_the_datum_of_an_answer() -> None:
    made = answer_datum(Answer(TEXT, [8, 9], [-0.5, -1.5]), [2.0, -1.0])
    fields = {name: tensor.to_numpy().tolist() for name, tensor in made.loss_fn_inputs.items()}
    assert made.model_input.to_ints() == [5, 6, 7, 8]
    assert fields == {
        "target_tokens": [0, 0, 8, 9],
        "logprobs": [0, 0, -0.5, -1.5],
        "advantages": [0, 0, 2.0, -1.0],
    }


class Scripted:
    """A run whose samples are given: each answer is one token; what it is trained on is kept."""

    def __init__(self, tokens: list[list[int]]) -> None:
        self.tokens, self.asked, self.trained, self.steps = tokens, list[Any](), list[Any](), 0
        self.configs = list[Any]()

    def save_weights_and_get_sampling_client(self) -> Any:
        return SimpleNamespace(result=lambda: self)

    def sample(self, prompt: tinker.ModelInput, number: int, params: types.SamplingParams) -> Any:
        self.asked.append((number, params.seed, params.max_tokens, params.temperature, params.stop))
        tokens = self.tokens[(len(self.asked) - 1) % len(self.tokens)]
        said = {"logprobs": [-0.5], "stop_reason": "stop"}
        sequences = [SimpleNamespace(tokens=[token], **said) for token in tokens]
        return SimpleNamespace(result=lambda: SimpleNamespace(sequences=sequences))

    def compute_logprobs(self, prompt: tinker.ModelInput) -> Any:
        return SimpleNamespace(result=lambda: [None, *[-2.0] * (prompt.length - 1)])

    def forward_backward(self, data: list[tinker.Datum], loss: str, config: Any) -> Any:
        self.configs.append(config)
        self.trained.append((loss, data))
        return SimpleNamespace(result=lambda: None)

    def optim_step(self, adam: types.AdamParams) -> Any:
        self.steps += 1
        return SimpleNamespace(result=lambda: None)


@pytest.fixture
def scripted(prompt: Prompt, examples: list[Pictured]) -> Callable[..., Any]:
    """Two questions, two answers each: the tokens' own texts are judged, token 70 as 1 and others as 0."""
    right = prompt.text([70])

    def run(tokens: list[list[int]], steps: int = 1, seed: int = 0, **policy: Any) -> tuple[Scripted, list[float]]:
        client, views = Scripted(tokens), [(each.image, each.label) for each in examples[:2]]
        chosen, judge = Policy(2, max_tokens=9, **policy), lambda _, label, text: float(text == right)
        learnt = reinforce(client, [views] * steps, prompt, ADAM, chosen, seed=seed, base=client, judge=judge)
        return client, [*learnt]

    return run


def test_only_groups_that_differ_are_learnt_from(scripted: Callable[..., Any], prompt: Prompt) -> None:
    client, rewards = scripted([[70, 71], [70, 70]], loss="ppo")
    (loss, data), *others = client.trained
    assert (loss, others, client.steps, rewards) == ("ppo", [], 1, [0.75])
    assert [each.loss_fn_inputs["target_tokens"].to_numpy()[-1] for each in data] == [70, 71]
    assert [each.loss_fn_inputs["advantages"].to_numpy()[-1] for each in data] == pytest.approx([1, -1])
    assert {(number, tokens, heat, *stop) for number, _, tokens, heat, stop in client.asked} == {
        (2, 9, 1.0, *prompt.stops)
    }


def test_the_loss_has_the_thresholds_that_are_given(scripted: Callable[..., Any]) -> None:
    wide = {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}
    found = [scripted([[70, 71]], loss="gspo", loss_config=each)[0].configs for each in (None, wide)]
    assert found == [[None], [wide]]


def test_a_batch_without_a_better_answer_makes_no_step(scripted: Callable[..., Any]) -> None:
    client, rewards = scripted([[70, 70], [71, 71]], steps=2)
    assert (client.trained, client.steps, rewards) == ([], 0, [0.5, 0.5])


def test_distance_from_the_base_costs_reward(scripted: Callable[..., Any]) -> None:
    """Policy -0.5 nats, base -2: each answer is 1.5 nats away. Two equal ones are one datum."""
    client, _ = scripted([[70, 71], [70, 70]], kl=0.1)
    ((_, data),) = client.trained
    assert [each.loss_fn_inputs["advantages"].to_numpy()[-1] for each in data] == pytest.approx([0.85, -1.15, -0.3])


def test_each_question_has_a_seed_of_its_own_drawn_from_the_runs(scripted: Callable[..., Any]) -> None:
    first, same, other = (scripted([[70, 71]], steps=2, seed=seed)[0].asked for seed in (1, 1, 2))
    assert first == same != other
    assert len({seed for _, seed, *_ in first}) == 4


def test_a_steps_questions_are_read_and_answered_together(
    client: LocalTrainingClient, prompt: Prompt, examples: list[Pictured], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one prefill, and with the answers that each has alone."""
    prefilled, prefill = list[int](), sampler_module.prefill

    def counted(decoder: Any, requests: Any) -> Any:
        prefilled.append(len(requests))
        return prefill(decoder, requests)

    monkeypatch.setattr(sampler_module, "prefill", counted)
    sampler, policy = client.save_weights_and_get_sampling_client().result(), Policy(3, max_tokens=4)
    questions, seeds = [prompt.question(each.image) for each in examples[:4]], [5, 6, 7, 8]
    together = sample_groups(sampler, questions, prompt.stops, policy, seeds)
    assert prefilled == [4]
    for question, seed, group in zip(questions, seeds, together, strict=True):
        (alone,) = sample_groups(sampler, [question], prompt.stops, policy, [seed])
        assert [each.tokens for each in group] == [each.tokens for each in alone]
        assert [each.finished for each in group] == [each.tokens[-1] in prompt.stops for each in group]
        for one, other in zip(group, alone, strict=True):
            assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)


def test_with_log_probs_the_penalty_of_dro_begins_at_zero(
    client: LocalTrainingClient, prompt: Prompt, examples: list[Pictured]
) -> None:
    """At the positions of the question and its image too, of which the samples have no log-probabilities."""
    sampler = client.save_weights_and_get_sampling_client().result()
    questions = [prompt.question(each.image) for each in examples[:2]]
    groups = sample_groups(sampler, questions, prompt.stops, Policy(2, max_tokens=3), [1, 2])
    data = [answer_datum(answer, np.zeros(len(answer.tokens))) for group in groups for answer in group]
    filled = with_log_probs(client, data)
    config = {"beta": 1.0}
    assert client.forward(filled, "dro", config).result().metrics["loss:sum"] == pytest.approx(0.0, abs=1e-8)
    assert client.forward(data, "dro", config).result().metrics["loss:sum"] > 1.0
    for answer, datum in zip([answer for group in groups for answer in group], filled, strict=True):
        log_probs = datum.loss_fn_inputs["logprobs"].to_numpy()
        assert log_probs[-len(answer.tokens) :] == pytest.approx(answer.log_probs, abs=1e-4)


@pytest.fixture(scope="module")
def in_process(service: LocalServiceClient) -> tuple[list[float], list[np.ndarray]]:
    return by_reward(service)


def test_digits_by_reward_on_every_service(both: Service, in_process: Any) -> None:
    """From a start of supervised steps on four shots: the same run again, and over HTTP to 1e-4."""
    (rewards, scores), (expected, its) = by_reward(both.client), in_process
    assert rewards == pytest.approx(expected, abs=1e-4)
    assert np.allclose(scores, its, rtol=0, atol=1e-4)
    assert max(rewards) > 0
    assert not np.allclose(*scores, rtol=0, atol=1e-2)  # something was learnt


@pytest.mark.slow
def test_reward_and_accuracy_rise_on_every_service(both: Service, capsys: pytest.CaptureFixture[str]) -> None:
    rewards, scores = by_reward(both.client, start=40, steps=60, size=8, group=8, tested=300)
    labels = [each.label for each in catalog.load("digits").test[:300]]
    before, after = ((each.argmax(1) == labels).mean() for each in scores)
    first, last = np.mean(rewards[:10]), np.mean(rewards[-10:])
    with capsys.disabled():
        print(f"\n{both.kind}: reward of ten steps {first:.3f} → {last:.3f}, accuracy {before:.3f} → {after:.3f}")
    assert last > first + 0.1
    assert after > before


def by_reward(
    client: Any, start: int = 30, steps: int = 3, size: int = 8, group: int = 4, tested: int = 8
) -> tuple[list[float], list[np.ndarray]]:
    """The reward of each step, and (images, classes) log-probabilities of test images before and after."""
    digits = catalog.load("digits")
    shots = [digits.train[n] for n in k_shot(digits.train, digits.classes, 4, 0)]
    run = client.create_lora_training_client(nano.NAME, rank=8, seed=0).result(PATIENCE)
    prompt = Prompt(tokenizer(nano.NAME), ImageRule.from_pretrained(nano.NAME), digits.classes)
    views = batches(shots, size, start + steps, np.random.default_rng(0), hflip=0.0)
    for _ in fit(run, islice(views, start), prompt, types.AdamParams(learning_rate=3e-3, eps=1e-8)):
        pass
    images = [each.image for each in digits.test[:tested]]
    before = predict(run.save_weights_and_get_sampling_client().result(), images, prompt)
    rewards = [*reinforce(run, views, prompt, ADAM, Policy(group, max_tokens=6), seed=0)]
    return rewards, [before, predict(run.save_weights_and_get_sampling_client().result(), images, prompt)]


def test_a_distance_needs_the_base(scripted: Callable[..., Any], prompt: Prompt, examples: list[Pictured]) -> None:
    views = [[(examples[0].image, 0)]]
    with pytest.raises(RequestError, match=r"kl 0\.1 is a distance from the base model; give base"):
        next(reinforce(Scripted([[70, 71]]), views, prompt, ADAM, Policy(2, kl=0.1), seed=0))
