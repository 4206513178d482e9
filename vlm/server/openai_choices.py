"""Closed lists of answers: each choice's exact log-probability, and the one that is given. Knows no HTTP.

The model is asked which of the choices it would write if it could write nothing else, in one pass (`vlm.scoring`)
instead of masking tokens while it samples: the distribution is that of the constrained model, and at temperature 0 the
answer is its likeliest choice, which token-by-token decoding may miss.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from kshot_errors import PromptError, RequestError
from vlm.prompts import TURN
from vlm.scoring import score_choices
from vlm.server import openai_chat
from vlm.server.openai_answers import Envelope, Fields, usage
from vlm.server.openai_requests import Asked, ChatAsked
from vlm.server.openai_sampler import Sampler
from vlm.server.openai_writing import Question

MAX_CHOICES = 4096
WAITERS = ThreadPoolExecutor(64, "kshot-choices")  # threads that wait for the engine, and keep nobody else from one


@dataclass(frozen=True)
class Closed:
    """The choices of a request as texts, and as the tokens that write each, with those that end it."""

    texts: Sequence[str]
    tokens: Sequence[Sequence[int]]

    @classmethod
    def of(cls, asked: Asked, choices: Sequence[str], tokenizer: Any) -> "Closed":
        """In a chat each ends with the turn, so that one may be the beginning of another. Raises PromptError for
        choices that write what steers the model, RequestError for too many."""
        if len(choices) > MAX_CHOICES:
            raise RequestError(f"{len(choices)} choices are too many; at most {MAX_CHOICES:,} may be given")
        chat = isinstance(asked, ChatAsked)
        steering = openai_chat.steering_tokens(tokenizer) if chat else (openai_chat.PLACE, openai_chat.VIDEO)
        for choice in choices:
            if token := openai_chat.steers(choice, steering):
                raise PromptError(f"choice {choice!r:.60} writes {token}, which steers the model; leave it out")
        tail = openai_chat.encode(tokenizer, TURN) if chat else []
        return cls(choices, [[*openai_chat.encode(tokenizer, choice), *tail] for choice in choices])

    def check(self, asked: Asked, questions: Sequence[Question], context: int) -> None:
        """Raise RequestError for choices that do not fit behind a prompt or into the answer's limit."""
        longest, text = max(zip(map(len, self.tokens), self.texts, strict=True), default=(0, ""))
        room = context - max(question.prompt.length for question in questions)
        if longest > (room if asked.limit is None else min(room, asked.limit)):
            raise RequestError(f"choice {text!r:.60} has {longest} tokens, more than the answer may have; shorten it")


@dataclass(frozen=True)
class Choosing:
    """Answers from a closed list, `asked.n` to each question."""

    asked: Asked
    envelope: Envelope
    sampler: Sampler
    questions: Sequence[Question]
    closed: Closed

    async def response(self) -> Fields:
        """The whole response. Raises PromptError for choices that cannot be told apart."""
        scores, chosen = await self._choose()
        choices = [
            {**self.envelope.form.choice(index, self.closed.texts[label], "stop", None), **self._extra(scores, index)}
            for index, label in enumerate(chosen)
        ]
        return self.envelope.whole(choices, self._usage(chosen))

    async def pieces(self) -> AsyncGenerator[Fields]:
        """The events of a stream: each answer comes whole. Raises as `response`."""
        scores, chosen = await self._choose()
        form, flag = self.envelope.form, self.asked.with_usage
        for index, label in enumerate(chosen):
            if form.opening is not None:
                yield self.envelope.piece([form.opening(index)], with_usage=flag)
            delta = form.delta(index, self.closed.texts[label], "stop", None)
            yield self.envelope.piece([{**delta, **self._extra(scores, index)}], with_usage=flag)
        if flag:
            yield self.envelope.piece([], with_usage=True, usage=self._usage(chosen))

    async def _choose(self) -> tuple[np.ndarray, list[int]]:
        """(questions, choices) log-probabilities, and the choice of each answer."""
        sampler, prompts = self.sampler, [question.prompt for question in self.questions]
        call = partial(score_choices, sampler, prompts, self.closed.tokens)
        scores = await asyncio.get_running_loop().run_in_executor(WAITERS, call)
        return scores, [label for row in scores for label in draw(row, self.asked)]

    def _extra(self, scores: np.ndarray, index: int) -> Fields:
        row = scores[index // self.asked.n].tolist()
        return {"choice_log_probs": dict(zip(self.closed.texts, row, strict=True))}

    def _usage(self, chosen: Sequence[int]) -> Fields:
        prompt = sum(question.prompt.length for question in self.questions)
        return usage(prompt, sum(len(self.closed.tokens[label]) for label in chosen))


def draw(scores: np.ndarray, asked: Asked) -> Iterator[int]:
    """`asked.n` choices from (choices,) log-probabilities: the likeliest at temperature 0, else drawn by `seed`."""
    if asked.temperature == 0:
        yield from [int(scores.argmax())] * asked.n
        return
    weights = np.exp((scores.astype(np.float64) - scores.max()) / asked.temperature)
    for number in range(asked.n):
        rng = np.random.default_rng(None if asked.seed is None else [asked.seed, number])
        yield int(rng.choice(len(weights), p=weights / weights.sum()))
