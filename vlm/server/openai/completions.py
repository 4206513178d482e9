"""Asks a sampler, and turns what it writes into choices: all at once, or piece by piece. Knows no HTTP.

Whoever stops waiting (the task is cancelled, the iterator closed) cancels the samplings.

TODO Closed lists of answers: each choice's exact log-probability, and the one that is given. Knows no HTTP.

The model is asked which of the choices it would write if it could write nothing else, in one pass (`vlm.scoring`)
instead of masking tokens while it samples: the distribution is that of the constrained model, and at temperature 0 the
answer is its likeliest choice, which token-by-token decoding may miss.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import tinker
from tinker import types

from kshot.errors import PromptError, RequestError
from vlm.local.clients import SamplingRequest, TokenSequence
from vlm.prompts import TURN
from vlm.scoring import score_choices
from vlm.server.openai import chat as openai_chat
from vlm.server.openai.models import Sampler, Sampling
from vlm.server.openai.requests import ChatRequest, GenerationRequest
from vlm.server.openai.responses import Envelope, Fields, usage
from vlm.server.openai.text import Alphabet, Sample, Text, Token, Tops

# ---- Asks a sampler, and turns what it writes into choices: all at once, or piece by piece. Knows no HTTP.


@dataclass(frozen=True)
class Question:
    """A prompt and how many tokens an answer may have (0: none is wanted). Of one that comes back before its answers:
    its text and its tokens."""

    prompt: tinker.ModelInput
    limit: int
    echo: str = ""
    echoed: Sequence[int] = ()


def limit(asked: GenerationRequest, prompt: tinker.ModelInput, context: int) -> int:
    """How many tokens an answer to the prompt may have. Raises RequestError where the model's context ends before."""
    room = context - prompt.length
    if room < 1 or (asked.limit or 0) > room:
        wanted = f" and an answer of {asked.limit} tokens" if asked.limit else ""
        raise RequestError(
            f"a prompt of {prompt.length} positions{wanted} is too long: this model takes {context} in all"
        )
    return min(asked.default_limit, room) if asked.limit is None else asked.limit


class _Written(NamedTuple):
    """A token as it was written."""

    writer: TokenSequence
    token: int
    log_prob: float
    tops: Tops | None
    reason: types.StopReason | None

    @classmethod
    def now(cls, writer: TokenSequence) -> "_Written":
        """The last token; on the engine's thread, before there is another."""
        tops = list(zip(*writer.tops[-1], strict=True)) if writer.top else None
        return cls(writer, writer.tokens[-1], writer.log_probs[-1], tops, writer.reason)


@dataclass
class Writing:
    """The answers to some questions, `asked.n` each. ends: the tokens that end an answer and are no part of it."""

    asked: GenerationRequest
    envelope: Envelope
    sampler: Sampler
    questions: Sequence[Question]
    ends: Sequence[int]
    alphabet: Alphabet = field(init=False)

    def __post_init__(self) -> None:
        self.alphabet = Alphabet(self.sampler.get_tokenizer())
        self.ends = [*self.ends, *self.asked.stop_token_ids]

    async def response(self) -> Fields:
        """The whole response."""
        with self._started() as samplings:
            answers = await asyncio.gather(*(asyncio.wrap_future(each.future) for each in samplings))
        choices = [
            self._choice(number, question, answer, n)
            for number, (question, answer) in enumerate(zip(self.questions, answers, strict=True))
            for n in range(self.asked.n)
        ]
        return self.envelope.whole(choices, self._usage(answers))

    async def pieces(self) -> AsyncGenerator[Fields]:
        """The events of a stream. Raises what the sampler raises, before the first event or later."""
        events = asyncio.Queue[tuple[int, _Written | None]]()
        answers = dict[int, types.SampleResponse]()
        streams = [_Stream(self, question, number) for number, question in enumerate(self.questions)]
        with self._started(events) as samplings:
            while len(answers) < len(samplings):
                number, written = await events.get()
                if written is None:
                    answers[number] = samplings[number].future.result()
                    choices = streams[number].finished(answers[number])
                else:
                    choices = streams[number].written(written)
                for choice in choices:
                    yield self.envelope.piece([choice], with_usage=self.asked.with_usage)
        if self.asked.with_usage:
            yield self.envelope.piece([], with_usage=True, usage=self._usage([answers[n] for n in range(len(answers))]))

    def log_probs(self, tokens: Sequence[Token]) -> Fields | None:
        """Of these tokens, where the client asks for them."""
        top = self.asked.tops
        return None if top is None else self.envelope.form.log_probs(self.alphabet, tokens, top)

    @contextlib.contextmanager
    def _started(self, events: "asyncio.Queue[tuple[int, _Written | None]] | None" = None) -> Iterator[list[Sampling]]:
        """The samplings; on the way out what is not done is cancelled. Into `events` goes what a question's writers
        write, and None when all of them have ended."""
        loop, samplings = asyncio.get_running_loop(), list[Sampling]()

        def tell(number: int, of: Callable[[Any], _Written | None], given: Any) -> None:
            if events is not None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                    loop.call_soon_threadsafe(events.put_nowait, (number, of(given)))

        try:
            for number, question in enumerate(self.questions):
                on_token = None if events is None else partial(tell, number, _Written.now)
                samplings.append(self.sampler.start(self._ask(question), on_token))
                samplings[-1].future.add_done_callback(partial(tell, number, lambda _: None))
            yield samplings
        finally:
            for each in samplings:
                if not each.future.done():
                    each.cancel()

    def _ask(self, question: Question) -> SamplingRequest:
        asked, top = self.asked, self.asked.tops or 0
        about_prompt = asked.tops is not None and bool(question.echoed)
        params = types.SamplingParams(
            max_tokens=max(1, question.limit),
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=asked.top_k,
            seed=asked.seed,
        )
        stops = {"stop": [*asked.stop, *self.ends]}  # the SDK's type has texts or tokens, a Writer takes both
        return SamplingRequest(
            question.prompt,
            params.model_copy(update=stops),
            asked.n,
            prompt_logprobs=about_prompt,
            topk_prompt_logprobs=top if about_prompt else 0,
            topk_sample_logprobs=top,
        )

    def _choice(self, number: int, question: Question, answer: types.SampleResponse, n: int) -> Fields:
        sample = Sample(self.alphabet, self.asked.stop, self.ends)
        if question.limit:
            sample.feed_all(answer.sequences[n])
        sample.finish("length")
        text, tokens = sample.take()
        told = [*self._echoed(question, answer), *(replace(t, start=t.start + len(question.echo)) for t in tokens)]
        index = number * self.asked.n + n
        return self.envelope.form.choice(index, question.echo + text, sample.reason, self.log_probs(told))

    def _echoed(self, question: Question, answer: types.SampleResponse) -> list[Token]:
        """The prompt's tokens as they come back; a model says nothing about the first."""
        text, count = Text(self.alphabet), len(question.echoed)
        values, tops = answer.prompt_logprobs or [None] * count, answer.topk_prompt_logprobs or [None] * count
        for each in zip(question.echoed, values, tops, strict=True):
            text.push(*each)
        text.end()
        return text.take()[1]

    def _usage(self, answers: Sequence[types.SampleResponse]) -> Fields:
        written = [
            len(sequence.tokens)
            for question, answer in zip(self.questions, answers, strict=True)
            for sequence in (answer.sequences if question.limit else ())
        ]
        return usage(sum(question.prompt.length for question in self.questions), sum(written))


class _Stream:
    """What of the answers to one question goes out next."""

    def __init__(self, writing: Writing, question: Question, number: int) -> None:
        self._writing, self._question, self._form = writing, question, writing.envelope.form
        self._first, self._opened = number * writing.asked.n, False
        self._samples = [Sample(writing.alphabet, writing.asked.stop, writing.ends) for _ in range(writing.asked.n)]
        self._of = dict[TokenSequence, int]()

    def written(self, written: _Written) -> Iterator[Fields]:
        """The choices of a token."""
        yield from self._opening()
        n = self._of.setdefault(written.writer, len(self._of))  # writers get their first tokens in order
        if self._samples[n].reason is None:
            self._samples[n].feed(written.token, written.log_prob, written.tops, written.reason)
            yield from self._more(n)

    def finished(self, answer: types.SampleResponse) -> Iterator[Fields]:
        """The choices that are left when everything is written."""
        yield from self._opening()
        for n, sequence in enumerate(answer.sequences):
            if self._samples[n].reason is None:
                self._samples[n].finish(sequence.stop_reason)
                yield from self._more(n)

    def _opening(self) -> Iterator[Fields]:
        if self._opened:
            return
        self._opened = True
        for index in range(self._first, self._first + len(self._samples)):
            if self._form.opening is not None:
                yield self._form.opening(index)
            if self._question.echo:
                yield self._form.delta(index, self._question.echo, None, None)

    def _more(self, n: int) -> Iterator[Fields]:
        """What is certain of a sample now, and its end."""
        sample, index = self._samples[n], self._first + n
        text, tokens = sample.take()
        log_probs = self._writing.log_probs(tokens) if tokens else None
        if text or log_probs:
            yield self._form.delta(index, text, None, log_probs)
        if sample.reason is not None:
            yield self._form.delta(index, "", sample.reason, None)


# ---- Closed lists of answers: each choice's exact log-probability, and the one that is given. Knows no HTTP.

MAX_CHOICES = 4096
WAITERS = ThreadPoolExecutor(64, "kshot-choices")  # threads that wait for the engine, and keep nobody else from one


@dataclass(frozen=True)
class Closed:
    """The choices of a request as texts, and as the tokens that write each, with those that end it."""

    texts: Sequence[str]
    tokens: Sequence[Sequence[int]]

    @classmethod
    def of(cls, asked: GenerationRequest, choices: Sequence[str], tokenizer: Any) -> "Closed":
        """In a chat each ends with the turn, so that one may be the beginning of another. Raises PromptError for
        choices that write what steers the model, RequestError for too many."""
        if len(choices) > MAX_CHOICES:
            raise RequestError(f"{len(choices)} choices are too many; at most {MAX_CHOICES:,} may be given")
        chat = isinstance(asked, ChatRequest)
        steering = openai_chat.steering_tokens(tokenizer) if chat else (openai_chat.PLACE, openai_chat.VIDEO)
        for choice in choices:
            if token := openai_chat.steers(choice, steering):
                raise PromptError(f"choice {choice!r:.60} writes {token}, which steers the model; leave it out")
        tail = openai_chat.encode(tokenizer, TURN) if chat else []
        return cls(choices, [[*openai_chat.encode(tokenizer, choice), *tail] for choice in choices])

    def check(self, asked: GenerationRequest, questions: Sequence[Question], context: int) -> None:
        """Raise RequestError for choices that do not fit behind a prompt or into the answer's limit."""
        longest, text = max(zip(map(len, self.tokens), self.texts, strict=True), default=(0, ""))
        room = context - max(question.prompt.length for question in questions)
        if longest > (room if asked.limit is None else min(room, asked.limit)):
            raise RequestError(f"choice {text!r:.60} has {longest} tokens, more than the answer may have; shorten it")


@dataclass(frozen=True)
class Choosing:
    """Answers from a closed list, `asked.n` to each question."""

    asked: GenerationRequest
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


def draw(scores: np.ndarray, asked: GenerationRequest) -> Iterator[int]:
    """`asked.n` choices from (choices,) log-probabilities: the likeliest at temperature 0, else drawn by `seed`."""
    if asked.temperature == 0:
        yield from [int(scores.argmax())] * asked.n
        return
    weights = np.exp((scores.astype(np.float64) - scores.max()) / asked.temperature)
    for number in range(asked.n):
        rng = np.random.default_rng(None if asked.seed is None else [asked.seed, number])
        yield int(rng.choice(len(weights), p=weights / weights.sum()))
