"""The main job: teach a model to answer with the class name, then ask it. Knows no data set, no service in particular.

An example is anything with `image` (encoded bytes), `mirrored` (the flipped image or None) and `label`.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import tinker
from tinker import types

from vlm.prompts import Prompt
from vlm.scoring import score_choices
from vlm.service import SamplingClient, TrainingClient


class Labelled(Protocol):
    """What a training or test example must have."""

    @property
    def image(self) -> bytes: ...
    @property
    def mirrored(self) -> bytes | None: ...
    @property
    def label(self) -> int: ...


@runtime_checkable
class BatchSampler(Protocol):
    """A sampling client that answers many prompts in shared passes."""

    def sample_batch(
        self, prompts: Sequence[tinker.ModelInput], params: types.SamplingParams
    ) -> list[types.SampleResponse]: ...


View = tuple[bytes, int]
WINDOW = 512  # images whose bytes and prompts are in memory at a time


def batches(
    examples: Sequence[Labelled], batch_size: int, steps: int, rng: np.random.Generator, *, hflip: float = 0.5
) -> Iterator[list[View]]:
    """`steps` batches of exactly `batch_size` (image, label) views: shuffled epochs end to end.

    An example that has a mirrored image is shown mirrored with probability `hflip`. All choices come from `rng`.
    """
    order: list[int] = []
    for _ in range(steps):
        while len(order) < batch_size:
            order += rng.permutation(len(examples)).tolist()
        taken, order = order[:batch_size], order[batch_size:]
        flips = rng.random(batch_size) < hflip
        yield [_view(examples[n], bool(flip)) for n, flip in zip(taken, flips, strict=True)]


def _view(example: Labelled, flip: bool) -> View:
    mirrored = example.mirrored if flip else None
    return (example.image if mirrored is None else mirrored), example.label


def fit(
    client: TrainingClient, batches: Iterable[Sequence[View]], prompt: Prompt, adam: types.AdamParams
) -> Iterator[tuple[types.ForwardBackwardOutput, types.OptimStepResponse]]:
    """One optimizer step a batch of (image, label) views; yields what each step answered."""
    made = ([prompt.datum(image, label) for image, label in batch] for batch in batches)
    data = next(made, None)
    while data is not None:
        loss = client.forward_backward(data, "cross_entropy")
        step = client.optim_step(adam)  # both submitted before either is awaited
        data = next(made, None)  # the next batch is made while the service works on this one
        yield loss.result(), step.result()


def predict(
    sampler: SamplingClient, images: Sequence[bytes], prompt: Prompt, method: str = "constrained"
) -> np.ndarray:
    """(images, classes) log-probabilities of the class names as answers (see `vlm.scoring.score_choices`)."""
    asked = ([prompt.question(image) for image in window] for window in _windows(images))
    parts = [score_choices(sampler, questions, prompt.choices, method) for questions in asked]
    return np.concatenate(parts) if parts else np.zeros((0, len(prompt.choices)), np.float32)


def generate(sampler: SamplingClient, images: Sequence[bytes], prompt: Prompt) -> list[str]:
    """The model's free answers after the prefill, greedily, to the end of the line or of the turn.

    At most as many tokens as the longest class name takes, and one more: no longer answer can be an exact match.
    """
    longest = max(map(len, prompt.choices)) + 1
    params = types.SamplingParams(max_tokens=longest, temperature=0.0, stop=prompt.stops)
    answers = [
        answer
        for window in _windows(images)
        for answer in _answers(sampler, [prompt.question(image) for image in window], params)
    ]
    return [prompt.line(answer.sequences[0].tokens) for answer in answers]


def _answers(
    sampler: SamplingClient, prompts: Sequence[tinker.ModelInput], params: types.SamplingParams
) -> list[types.SampleResponse]:
    if isinstance(sampler, BatchSampler):
        return sampler.sample_batch(prompts, params)
    return [future.result() for future in [sampler.sample(p, 1, params) for p in prompts]]


def _windows(images: Sequence[bytes]) -> Iterator[list[bytes]]:
    """The images, WINDOW at a time: those of a large set are never in memory together."""
    return (list(images[start : start + WINDOW]) for start in range(0, len(images), WINDOW))
