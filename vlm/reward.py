"""Learning from reward: answers are sampled, judged, and become data of what they were worth, by the training API.

Of the G answers to one question each is worth its reward less the group's mean, in units of the group's standard
deviation (GRPO, Shao et al. 2024, arXiv:2402.03300).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import tinker
from tinker import types

from kshot.errors import RequestError, UnknownNameError
from vlm.classifier import Subject, View, sample_together
from vlm.inputs import datum, model_input
from vlm.prompts import Prompt
from vlm.service import TrainingClient

LOSSES = ("importance_sampling", "ppo", "cispo", "gspo")  # of the API, by the advantage of each token
SEEDS = 1 << 31  # of sampling
ROUNDING = 1e-9  # of rewards, relative
Judge = Callable[[Subject, int, str], float]
"""The reward of a text as the answer about a subject with a label."""


@dataclass(frozen=True)
class Answer:
    """A sampled answer. tokens: ids, the end of the turn included. log_probs: one a token, nats, of the policy that
    wrote it. finished: whether it ended by itself; False: it was cut off at `max_tokens`."""

    question: tinker.ModelInput
    tokens: list[int]
    log_probs: list[float]
    finished: bool = True

    @property
    def whole(self) -> tinker.ModelInput:
        """The question and the answer."""
        return model_input(*self.question.chunks, self.tokens)


@dataclass(frozen=True)
class Policy:
    """How answers are sampled and learnt from.

    group_size: answers to a question, G; at least 2. temperature: of sampling, above 0. Log-probabilities are the
    model's at 1, as the API gives them, so at another temperature no loss corrects for what was sampled more often.
    max_tokens: of an answer. loss: of LOSSES. loss_config: its thresholds; None: the usual ones. A batch is trained on
    once, right after it is sampled, so the ratio to the sampler is 1 but for rounding. In bfloat16 that rounding is
    more than gspo's usual thresholds allow: give wider ones. kl: what a nat of distance from the base model costs,
    token by token, in units of the advantage. Raises RequestError for a value out of range.
    """

    group_size: int = 8
    temperature: float = 1.0
    max_tokens: int = 128
    loss: str = "importance_sampling"
    kl: float = 0.0
    loss_config: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise RequestError(f"group_size {self.group_size} compares no answers; give 2 or more")
        if not self.temperature > 0:
            raise RequestError(f"temperature {self.temperature} samples the same answer each time; give one above 0")
        if self.loss not in LOSSES:
            raise UnknownNameError("loss of reward", self.loss, LOSSES)
        if self.kl and self.temperature != 1:
            raise RequestError(f"kl {self.kl} is measured at temperature 1, not at {self.temperature}; leave one out")


def reinforce(
    client: TrainingClient,
    batches: Iterable[Sequence[View]],
    prompt: Prompt,
    adam: types.AdamParams,
    policy: Policy,
    *,
    seed: int,
    base: Any = None,
    judge: Judge | None = None,
) -> Iterator[float]:
    """One optimizer step a batch of (image or text, label) views; yields the mean reward of each batch's answers.

    client: of any service. seed: of all sampling. base: a sampling client of the untuned model, where policy.kl is not
    0. judge: None: 1 for the right class name by the rule of `Prompt.parse`, else 0. Without kl a batch in which no
    answer is better than another of its group makes no step. Raises RequestError for a kl without a base.
    """
    if policy.kl and base is None:
        raise RequestError(f"kl {policy.kl} is a distance from the base model; give base, a sampling client of it")
    rng, judge = np.random.default_rng(seed), judge or _names_the_class(prompt)
    for batch in batches:
        sampler = client.save_weights_and_get_sampling_client().result()
        questions = [prompt.question(subject) for subject, _ in batch]
        groups = sample_groups(sampler, questions, prompt.stops, policy, rng.integers(SEEDS, size=len(batch)).tolist())
        rewards = [
            np.array([judge(*view, prompt.text(answer.tokens)) for answer in group])
            for view, group in zip(batch, groups, strict=True)
        ]
        worth = [each for n, group in enumerate(groups) for each in _merged(group, gains(rewards[n]))]
        if data := _data(worth, policy.kl, base):
            done = (
                client.forward_backward(data, policy.loss, dict(policy.loss_config or {}) or None),
                client.optim_step(adam),
            )
            for each in done:
                each.result()
        yield float(np.concatenate(rewards).mean())


def gains(rewards: np.ndarray) -> np.ndarray:
    """(answers,) the rewards of a group less their mean, in units of their standard deviation; 0 where all are the
    same but for rounding."""
    if np.ptp(rewards) <= ROUNDING * np.abs(rewards).max():
        return np.zeros(len(rewards))
    gains: np.ndarray = (rewards - rewards.mean()) / rewards.std()
    return gains


def sample_groups(
    sampler: Any, questions: Sequence[tinker.ModelInput], stops: Sequence[int], policy: Policy, seeds: Sequence[int]
) -> list[list[Answer]]:
    """`policy.group_size` answers to each question, all sampled together; its own seed decides them, whatever the other
    questions are. stops: token ids that end an answer."""
    shared = partial(types.SamplingParams, max_tokens=policy.max_tokens, temperature=policy.temperature)
    params = [shared(stop=list(stops), seed=seed) for seed in seeds]
    responses = sample_together(sampler, questions, params, policy.group_size)
    return [
        [
            Answer(question, list(each.tokens), list(each.logprobs or ()), each.stop_reason != "length")
            for each in response.sequences
        ]
        for question, response in zip(questions, responses, strict=True)
    ]


def answer_datum(answer: Answer, advantages: Sequence[float] | np.ndarray) -> tinker.Datum:
    """The datum of a sampled answer for importance_sampling, ppo, cispo and gspo. advantages: (tokens,), one a token of
    the answer; at the question's positions advantage and log-probability are 0."""
    made, before = datum(answer.question, answer.tokens), np.zeros(answer.question.length - 1)
    fields = {"logprobs": answer.log_probs, "advantages": advantages}
    numbers = {name: np.concatenate([before, values]).astype(np.float32) for name, values in fields.items()}
    tensors = {name: tinker.TensorData.from_numpy(values) for name, values in numbers.items()}
    return replace(made, loss_fn_inputs={"target_tokens": made.loss_fn_inputs["target_tokens"], **tensors})


def with_log_probs(client: Any, data: Sequence[tinker.Datum]) -> list[tinker.Datum]:
    """The data with `logprobs` of every position filled from the run's `forward`, as the loss dro reads them: at those
    of the question and its images too, where samples have none. client: as it was when the answers were sampled."""
    plain = [replace(each, loss_fn_inputs={"target_tokens": each.loss_fn_inputs["target_tokens"]}) for each in data]
    outputs = client.forward(plain, "cross_entropy").result().loss_fn_outputs
    pairs = zip(data, outputs, strict=True)
    return [replace(d, loss_fn_inputs={**d.loss_fn_inputs, "logprobs": out["logprobs"]}) for d, out in pairs]


def _merged(answers: Sequence[Answer], gains: np.ndarray) -> list[tuple[Answer, float, int]]:
    """Each different answer of a group with the sum of what it gained, and how often it came. Training on it once by
    that sum is the same as on each of the equal ones: the losses are proportional to the advantage."""
    first: dict[tuple[int, ...], Answer] = {}
    for answer in answers:
        first.setdefault(tuple(answer.tokens), answer)
    of = {key: [n for n, answer in enumerate(answers) if tuple(answer.tokens) == key] for key in first}
    return [(answer, float(gains[of[key]].sum()), len(of[key])) for key, answer in first.items()]


def _data(worth: Sequence[tuple[Answer, float, int]], kl: float, base: Any) -> list[tinker.Datum]:
    """The data of all answers that teach something. worth: see `_merged`."""
    if not kl:
        return [answer_datum(answer, np.full(len(answer.tokens), gain)) for answer, gain, _ in worth if gain]
    futures = [base.compute_logprobs(answer.whole) for answer, *_ in worth]
    data = []
    for (answer, gain, count), future in zip(worth, futures, strict=True):
        distance = np.array(answer.log_probs) - np.array(future.result()[-len(answer.tokens) :], float)
        data.append(answer_datum(answer, gain - count * kl * distance))
    return data


def _names_the_class(prompt: Prompt) -> Judge:
    return lambda _, label, text: float(prompt.parse(text) == label)
