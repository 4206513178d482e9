"""The main job: teach a model to answer with the class name, then ask it, on any service.

An example is anything with `image` (encoded bytes), `mirrored` (the flipped image or None) and `label`. What is asked
about may be texts instead of images everywhere else, with a template that holds {text}.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import tinker
from tinker import types

from kshot.errors import RequestError, UnknownNameError
from vlm.prompts import TRAIN_ON, Prompt
from vlm.scoring import score_and_decode, score_choices
from vlm.service import SamplingClient, TrainingClient
from vlm.thinking import Thought


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
    """A sampling client that answers many prompts in shared passes. params: of all prompts, or of each."""

    def sample_batch(
        self,
        prompts: Sequence[tinker.ModelInput],
        params: types.SamplingParams | Sequence[types.SamplingParams],
        num_samples: int = 1,
    ) -> list[types.SampleResponse]: ...


Subject = bytes | str  # an image, encoded, or a text
View = tuple[Subject, int]
LOSSES: dict[str, tuple[str, Callable[[Prompt, Subject, int, Thought | None, str], tinker.Datum]]] = {
    "text": ("cross_entropy", Prompt.datum),  # write the answer, token by token, as the recipe trains
    "closed-set": ("closed_set", Prompt.closed_datum),  # choose among the class names; of our services alone
}
ANSWER = 128  # tokens of a free answer, at most: the official recipe's
WINDOW = 512  # images whose bytes and prompts are in memory at a time


def batches(
    examples: Sequence[Labelled], batch_size: int, steps: int, rng: np.random.Generator, *, hflip: float = 0.5
) -> Iterator[list[tuple[bytes, int]]]:
    """`steps` batches of exactly `batch_size` (image, label) views: shuffled epochs end to end.

    An example that has a mirrored image is shown mirrored with probability `hflip`. All choices come from `rng`.
    """
    order: list[int] = []
    for _ in range(steps):
        while len(order) < batch_size:
            order += rng.permutation(len(examples)).tolist()
        numbers, order = order[:batch_size], order[batch_size:]
        chosen = zip([examples[n] for n in numbers], rng.random(batch_size) < hflip, strict=True)
        yield [((each.mirrored if flip else None) or each.image, each.label) for each, flip in chosen]


def fit(
    client: TrainingClient,
    batches: Iterable[Sequence[View]],
    prompt: Prompt,
    adam: types.AdamParams,
    loss: str = "text",
    power: float = 0.0,
    thoughts: Mapping[Subject, Thought] | None = None,
    train_on: str = TRAIN_ON[0],
) -> Iterator[tuple[types.ForwardBackwardOutput, types.OptimStepResponse]]:
    """One optimizer step a batch of (image, label) views; yields the responses of each step. loss: a row of LOSSES.
    power: of "closed-set": (1 - p^power) / power of the exact posterior p of the right class; 0 is -log p, 1 the
    expected reward (see `vlm.local.losses.closed_set`).
    thoughts: what stands before the answer about each image, if anything does. train_on: see `Prompt.datum`.

    Raises UnknownNameError for another loss, RequestError for a power of the loss "text".
    """
    if loss not in LOSSES:
        raise UnknownNameError("loss", loss, LOSSES)
    if power and loss == "text":
        raise RequestError(f"power {power} is of the loss closed-set; the loss text has none")
    loss_fn, example = LOSSES[loss]

    def datum(image: Subject, label: int) -> tinker.Datum:
        return example(prompt, image, label, None if thoughts is None else thoughts[image], train_on)

    made = ([datum(image, label) for image, label in batch] for batch in batches)
    return steps(client, made, loss_fn, adam, {"power": power} if power else None)


def steps(
    client: TrainingClient,
    data: Iterable[list[tinker.Datum]],
    loss_fn: str,
    adam: types.AdamParams,
    config: dict[str, float] | None = None,
) -> Iterator[tuple[types.ForwardBackwardOutput, types.OptimStepResponse]]:
    """One optimizer step on each list of data, of any training client; yields the responses of each step. config: of
    the loss, as the SDK's `loss_fn_config`."""
    batches = iter(data)
    batch = next(batches, None)
    while batch is not None:
        loss = client.forward_backward(batch, loss_fn, *([config] if config else []))
        step = client.optim_step(adam)  # both submitted before either is awaited
        batch = next(batches, None)  # the next data are made while the service works on these
        yield loss.result(), step.result()


def predict(
    sampler: SamplingClient, images: Sequence[Subject], prompt: Prompt, method: str = "constrained"
) -> np.ndarray:
    """(images, classes) log-probabilities of the class names as answers (see `vlm.scoring.score_choices`)."""
    windows = questions(images, prompt)
    return np.concatenate([score_choices(sampler, each, prompt.choices, method) for each in windows])


def predict_and_decode(
    sampler: SamplingClient, images: Sequence[Subject], prompt: Prompt
) -> tuple[np.ndarray, np.ndarray]:
    """What `predict` gives, and from the same pass (images,) the labels that constrained decoding writes, the likeliest
    token at every step. The likeliest label may be another."""
    windows = questions(images, prompt)
    scores, greedy = zip(*(score_and_decode(sampler, each, prompt.choices) for each in windows), strict=True)
    return np.concatenate(scores), np.concatenate(greedy)


def generate(sampler: SamplingClient, images: Sequence[Subject], prompt: Prompt, max_tokens: int = ANSWER) -> list[str]:
    """The model's free answers after the prefill, greedily, to the end of its turn. `Prompt.parse` reads them."""
    return [text for window in questions(images, prompt) for text in answers(sampler, window, prompt, max_tokens)]


def answers(
    sampler: SamplingClient, asked: Sequence[tinker.ModelInput], prompt: Prompt, max_tokens: int = ANSWER
) -> list[str]:
    """The same to questions."""
    params = types.SamplingParams(max_tokens=max_tokens, temperature=0.0, stop=prompt.stops)
    responses = sample_together(sampler, asked, [params] * len(asked))
    return [prompt.text(response.sequences[0].tokens) for response in responses]


def sample_together(
    sampler: SamplingClient,
    asked: Sequence[tinker.ModelInput],
    params: Sequence[types.SamplingParams],
    num_samples: int = 1,
) -> list[types.SampleResponse]:
    """`num_samples` answers to each question, all of which are requested before any is waited for, so that a service
    reads and writes them in shared passes. params: of each question."""
    if isinstance(sampler, BatchSampler):
        return sampler.sample_batch(asked, params, num_samples)
    futures = [sampler.sample(each, num_samples, own) for each, own in zip(asked, params, strict=True)]
    return [future.result() for future in futures]


def questions(images: Sequence[Subject], prompt: Prompt) -> Iterator[list[tinker.ModelInput]]:
    """The questions about the images, WINDOW at a time, so that those of a large set are never in memory together;
    one empty window where there are no images."""
    for start in range(0, max(1, len(images)), WINDOW):
        yield [prompt.question(image) for image in images[start : start + WINDOW]]
