"""Classification after thoughts: these are sampled to their end mark or a number of tokens, and closed by force where
they run out. The closed list of answers is scored after each of them, exactly, given the thought."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import tinker
from tinker import types

from vlm.classifier import WINDOW, Subject, sample_together
from vlm.prompts import Prompt
from vlm.scoring import score_choices
from vlm.service import SamplingClient
from vlm.thinking import Thought, needed


@dataclass(frozen=True)
class Thinking:
    """How it is thought about an image. tokens: of a thought, at most. thoughts: of an image. seed: draws them, of each
    image others."""

    tokens: int
    thoughts: int = 1
    temperature: float = 1.0
    seed: int = 0

    def params(self, prompt: Prompt, number: int) -> types.SamplingParams:
        """For the thoughts about the image of this number."""
        seed = np.random.SeedSequence([self.seed, number]).generate_state(1, np.uint64)[0] >> 1  # below 2**63
        ends = [needed(prompt.marks).end, prompt.end]
        return types.SamplingParams(max_tokens=self.tokens, temperature=self.temperature, seed=int(seed), stop=ends)


@dataclass(frozen=True)
class Considered:
    """Images that were thought about. thoughts: of each image. asked: behind each of its thoughts the prompt whose next
    token is the first of a class name."""

    thoughts: list[list[Thought]]
    asked: list[list[tinker.ModelInput]]


def consider(
    sampler: SamplingClient, images: Sequence[Subject], prompt: Prompt, thinking: Thinking, first: int = 0
) -> Iterator[Considered]:
    """Think about images, WINDOW at a time. first: the number of the first of them. Raises PromptError for a model
    whose chat template has no thinking mode."""
    for start in range(0, len(images), WINDOW):
        asked = [prompt.thinking(image) for image in images[start : start + WINDOW]]
        params = [thinking.params(prompt, first + start + n) for n in range(len(asked))]
        thoughts = [
            [prompt.read_thought(sequence.tokens) for sequence in response.sequences]
            for response in sample_together(sampler, asked, params, thinking.thoughts)
        ]
        yield Considered(
            thoughts,
            [[prompt.after(each, thought) for thought in own] for each, own in zip(asked, thoughts, strict=True)],
        )


def posteriors(
    sampler: SamplingClient, considered: Considered, prompt: Prompt, method: str = "constrained"
) -> np.ndarray:
    """(images, classes) float32 log of the mean, over an image's thoughts, of the probabilities of the class names (see
    `vlm.scoring.score_choices`)."""
    flat = [each for own in considered.asked for each in own]
    count = len(considered.asked[0])
    rows = score_choices(sampler, flat, prompt.choices, method).astype(np.float64)
    mean: np.ndarray = np.logaddexp.reduce(rows.reshape(len(considered.asked), count, -1), 1) - np.log(count)
    return mean.astype(np.float32)
