"""Responses to completion requests: text that is sampled, or a choice from a closed list; whole or as a stream.

For a closed list the model is not sampled with masked tokens: one pass gives the exact probability of each choice under
the model restricted to the list (`vlm.scoring`). At temperature 0 the answer is the likeliest choice, which decoding
token by token may miss.

Whoever stops waiting (the task is cancelled, the iterator closed) cancels the sampling.
"""

import asyncio
import contextlib
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import tinker
from tinker import types

from kshot.errors import PromptError, RequestError
from vlm.local.clients import Grammar, LocalSamplingClient, SamplingRequest, ThoughtLimit, TokenSequence
from vlm.scoring import score_choices
from vlm.server.openai import chat, tools
from vlm.server.openai.requests import ChatRequest, GenerationRequest
from vlm.server.openai.responses import CHAT, COMPLETION, TOOL_CHAT, Fields
from vlm.server.openai.text import DecodedText, Token, TopTokens, Vocabulary
from vlm.templates import END_OF_TURN, IMAGE_TOKEN, VIDEO_TOKEN
from vlm.thinking import Marks, ThoughtReader, split, thought_length

MAX_CHOICES = 4096
WAITERS = ThreadPoolExecutor(64, "kshot-choices")  # threads that wait for the engine, beside those of the event loop


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt and the most tokens of its completions (0: none is wanted). echo, echo_tokens: the prompt itself, where
    the response repeats it. marks, within: see `chat.Conversation`."""

    input: tinker.ModelInput
    limit: int
    echo: str = ""
    echo_tokens: Sequence[int] = ()
    marks: Marks | None = None
    within: bool = False


def limit(request: GenerationRequest, prompt: tinker.ModelInput, context: int) -> int:
    """The most tokens of a completion. Raises RequestError where the model's context ends before."""
    room = context - prompt.length
    if room < 1 or (request.limit or 0) > room:
        wanted = f" and an answer of {request.limit} tokens" if request.limit else ""
        raise RequestError(
            f"a prompt of {prompt.length} positions{wanted} is too long: this model takes {context} in all"
        )
    usual = request.default_limit + (request.thought_limit or 0)
    return min(usual, room) if request.limit is None else request.limit


@dataclass
class Completion(ABC):
    """What a request is answered with: `request.n` completions of each prompt."""

    request: GenerationRequest
    sampler: LocalSamplingClient
    prompts: Sequence[EncodedPrompt]

    def __post_init__(self) -> None:
        self.format, self.calls = COMPLETION, False
        if isinstance(self.request, ChatRequest):
            self.calls = bool(self.request.callable_tools)
            self.format = TOOL_CHAT if self.calls else CHAT
        self._id, self._created = f"{self.format.prefix}-{uuid.uuid4().hex}", int(time.time())

    @abstractmethod
    async def response(self) -> Fields:
        """The whole response."""

    @abstractmethod
    def chunks(self) -> AsyncGenerator[Fields]:
        """The events of a stream. Raises what the sampler raises, before the first event or later."""

    def body(self, choices: Sequence[Fields], usage: Fields) -> Fields:
        """The body of a response that is no stream."""
        return {**self._head(self.format.object), "choices": choices, "usage": usage}

    def chunk(self, *choices: Fields, usage: Fields | None = None) -> Fields:
        """An event of a stream. usage: in its last event, where the client wants it."""
        more = {"usage": usage} if self.request.with_usage else {}
        return {**self._head(self.format.chunk), "choices": choices, **more}

    def usage(self, tokens: int, thought: int = 0) -> Fields:
        """Positions of the prompts, images included, and tokens of the completions, those that end one included.
        thought: how many of them are of thoughts."""
        prompt = sum(each.input.length for each in self.prompts)
        fields = {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}
        thinks = any(each.marks for each in self.prompts)
        return {**fields, **({"completion_tokens_details": {"reasoning_tokens": thought}} if thinks else {})}

    def _head(self, kind: str) -> Fields:
        model = self.request.model
        return {"id": self._id, "object": kind, "created": self._created, "model": model, "system_fingerprint": None}


class _NewToken(NamedTuple):
    """The token that a sequence got last."""

    sequence: TokenSequence
    token: int
    log_prob: float
    top: TopTokens | None
    reason: types.StopReason | None

    @classmethod
    def of(cls, sequence: TokenSequence) -> "_NewToken":
        """On the engine's thread, before there is another."""
        top = list(zip(*sequence.tops[-1], strict=True)) if sequence.top else None
        return cls(sequence, sequence.tokens[-1], sequence.log_probs[-1], top, sequence.reason)


Events = asyncio.Queue[tuple[int, _NewToken | None]]  # prompt's number, and a token, or None when it is done


@dataclass
class SampledCompletion(Completion):
    """Completions that are sampled. grammar: what they follow."""

    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        tokenizer = self.sampler.get_tokenizer()
        self.vocabulary = Vocabulary(tokenizer)
        self.ends = [*chat.end_tokens(tokenizer), *self.request.stop_token_ids]  # no part of a completion

    async def response(self) -> Fields:
        with self._started() as samplings:
            results = await asyncio.gather(*(asyncio.wrap_future(each) for each in samplings))
        choices = await asyncio.to_thread(self._choices, results)
        return self.body(choices, await asyncio.to_thread(self._usage, results))

    async def chunks(self) -> AsyncGenerator[Fields]:
        events, results = Events(), dict[int, types.SampleResponse]()
        streams = [_Stream(self, prompt, number) for number, prompt in enumerate(self.prompts)]
        with self._started(events) as samplings:
            while len(results) < len(samplings):
                number, token = await events.get()
                if token is None:
                    results[number] = samplings[number].result()
                    choices = streams[number].finish(results[number])
                else:
                    choices = streams[number].add(token)
                for choice in choices:
                    yield self.chunk(choice)
        if self.request.with_usage:
            ordered = [results[n] for n in range(len(results))]
            yield self.chunk(usage=await asyncio.to_thread(self._usage, ordered))

    def log_probs(self, tokens: Sequence[Token]) -> Fields | None:
        """Of these tokens, where the client wants them."""
        top = self.request.top
        return None if top is None else self.format.log_probs(self.vocabulary, tokens, top)

    @contextlib.contextmanager
    def _started(self, events: Events | None = None) -> Iterator[list[Future[types.SampleResponse]]]:
        """The samplings; on the way out what is not done is cancelled. Each new token, and the end of each prompt's
        sampling, is put into `events`."""
        loop, samplings = asyncio.get_running_loop(), list[Future[types.SampleResponse]]()

        def put(number: int, event_of: Callable[[Any], _NewToken | None], source: Any) -> None:
            if events is not None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                    loop.call_soon_threadsafe(events.put_nowait, (number, event_of(source)))

        try:
            for number, prompt in enumerate(self.prompts):
                on_token = None if events is None else partial(put, number, _NewToken.of)
                samplings.append(self.sampler.start(self._sampling_request(prompt), on_token))
                samplings[-1].add_done_callback(partial(put, number, lambda _: None))
            yield samplings
        finally:
            for each in samplings:
                each.cancel()

    def _sampling_request(self, prompt: EncodedPrompt) -> SamplingRequest:
        request, top = self.request, self.request.top or 0
        of_prompt = request.top is not None and bool(prompt.echo_tokens)
        params = types.SamplingParams(
            max_tokens=max(1, prompt.limit),
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            seed=request.seed,
        )
        stops = {"stop": [*request.stop, *self.ends]}  # the SDK's type has texts or tokens, our sampler takes both
        return SamplingRequest(
            prompt.input,
            params.model_copy(update=stops),
            request.n,
            prompt_logprobs=of_prompt,
            topk_prompt_logprobs=top if of_prompt else 0,
            topk_sample_logprobs=top,
            grammar=self.grammar,
            thought=self._thought(prompt),
        )

    def _thought(self, prompt: EncodedPrompt) -> ThoughtLimit | None:
        """Where the completions begin within a thought."""
        if prompt.marks is None or not prompt.within:
            return None
        closing = chat.encode(self.vocabulary.tokenizer, prompt.marks.closing)
        return ThoughtLimit(prompt.marks.end, closing, self.request.thought_limit)

    def _choices(self, results: Sequence[types.SampleResponse]) -> list[Fields]:
        """Work for every token: not for the event loop."""
        return [
            self._choice(number, prompt, result, n)
            for number, (prompt, result) in enumerate(zip(self.prompts, results, strict=True))
            for n in range(self.request.n)
        ]

    def _choice(self, number: int, prompt: EncodedPrompt, result: types.SampleResponse, n: int) -> Fields:
        sample = DecodedText(self.vocabulary, self.request.stop, self.ends)
        if prompt.limit:
            sample.add_all(result.sequences[n])
        sample.finish("length")
        text, tokens = sample.take()
        shifted = (replace(token, start=token.start + len(prompt.echo)) for token in tokens)
        log_probs = self.log_probs([*self._echo(prompt, result), *shifted])
        thought, answer, _ = split(text, prompt.marks, within=prompt.within)
        choice = self.format.choice(number * self.request.n + n, prompt.echo + answer, sample.reason, log_probs)
        if thought is not None:
            choice["message"]["reasoning_content"] = thought
        return choice

    def _echo(self, prompt: EncodedPrompt, result: types.SampleResponse) -> list[Token]:
        """The prompt's tokens; a model gives no log-probability of the first."""
        text, count = DecodedText(self.vocabulary), len(prompt.echo_tokens)
        values, tops = result.prompt_logprobs or [None] * count, result.topk_prompt_logprobs or [None] * count
        for each in zip(prompt.echo_tokens, values, tops, strict=True):
            text.add(*each)
        text.finish("length")
        return text.take()[1]

    def _usage(self, results: Sequence[types.SampleResponse]) -> Fields:
        count = thought = 0
        for prompt, result in zip(self.prompts, results, strict=True):
            for tokens in [sequence.tokens for sequence in result.sequences] if prompt.limit else []:
                count += len(tokens)
                if prompt.marks is not None:
                    tokenizer, within = self.vocabulary.tokenizer, prompt.within
                    thought += thought_length(tokenizer, tokens, prompt.marks, within=within)
        return self.usage(count, thought)


class _Stream:
    """The completions of one prompt, as deltas."""

    def __init__(self, completion: SampledCompletion, prompt: EncodedPrompt, number: int) -> None:
        self._completion, self._prompt, self._format = completion, prompt, completion.format
        request = completion.request
        self._first, self._opened = number * request.n, False
        self._samples = [DecodedText(completion.vocabulary, request.stop, completion.ends) for _ in range(request.n)]
        self._readers = [tools.CallReader() if completion.calls else None for _ in range(request.n)]
        self._thoughts = [
            ThoughtReader(prompt.marks, within=prompt.within) if prompt.marks else None for _ in range(request.n)
        ]
        self._numbers = dict[TokenSequence, int]()

    def add(self, new: _NewToken) -> Iterator[Fields]:
        """The deltas of a token."""
        yield from self._opening()
        n = self._numbers.setdefault(new.sequence, len(self._numbers))  # sequences get their first tokens in order
        if self._samples[n].reason is None:
            self._samples[n].add(new.token, new.log_prob, new.top, new.reason)
            yield from self._deltas(n)

    def finish(self, result: types.SampleResponse) -> Iterator[Fields]:
        """The deltas that are left when the sampling is done."""
        yield from self._opening()
        for n, sequence in enumerate(result.sequences):
            if self._samples[n].reason is None:
                self._samples[n].finish(sequence.stop_reason)
                yield from self._deltas(n)

    def _opening(self) -> Iterator[Fields]:
        if self._opened:
            return
        self._opened = True
        for index in range(self._first, self._first + len(self._samples)):
            if self._format.opening is not None:
                yield self._format.opening(index)
            if self._prompt.echo:
                yield self._format.delta(index, self._prompt.echo, None, None)

    def _deltas(self, n: int) -> Iterator[Fields]:
        sample, index = self._samples[n], self._first + n
        text, tokens = sample.take()
        log_probs = self._completion.log_probs(tokens) if tokens else None
        reader, thoughts, reason = self._readers[n], self._thoughts[n], cast(str | None, sample.reason)
        if thoughts is not None:
            thought, text = thoughts.add(text, last=reason is not None)
            if thought:
                delta = {"reasoning_content": thought}
                yield {"index": index, "delta": delta, "logprobs": log_probs, "finish_reason": None}
                log_probs = None
        if reader is not None:
            for delta in reader.add(text, last=reason is not None):
                yield {"index": index, "delta": delta, "logprobs": log_probs, "finish_reason": None}
                log_probs = None
            text, reason = "", reader.reason(reason)
        if text or log_probs:
            yield self._format.delta(index, text, None, log_probs)
        if reason is not None:
            yield self._format.delta(index, "", reason, None)


class ChosenCompletion(Completion):
    """Completions from a closed list. Raises PromptError for choices that cannot be told apart or hold a special token,
    RequestError for too many, and for one that does not fit behind a prompt or into the request's limit."""

    async def response(self) -> Fields:
        chosen, usage = await self._choose()
        choices = [
            {**self.format.choice(index, text, "stop", None), **scores} for index, (text, scores) in enumerate(chosen)
        ]
        return self.body(choices, usage)

    async def chunks(self) -> AsyncGenerator[Fields]:
        chosen, usage = await self._choose()
        for index, (text, scores) in enumerate(chosen):
            if self.format.opening is not None:
                yield self.chunk(self.format.opening(index))
            yield self.chunk({**self.format.delta(index, text, "stop", None), **scores})
        if self.request.with_usage:
            yield self.chunk(usage=usage)

    async def _choose(self) -> tuple[list[tuple[str, Fields]], Fields]:
        """The choice of each completion with the field of all log-probabilities, and how many tokens they have."""
        return await asyncio.get_running_loop().run_in_executor(WAITERS, self._chosen)

    def _chosen(self) -> tuple[list[tuple[str, Fields]], Fields]:
        texts, tokens = self.request.choice or [], self._tokens()
        rows = score_choices(self.sampler, [prompt.input for prompt in self.prompts], tokens)
        drawn = [(row, n) for row in rows for n in draw(row, self.request)]
        chosen = [(texts[n], {"choice_log_probs": dict(zip(texts, row.tolist(), strict=True))}) for row, n in drawn]
        return chosen, self.usage(sum(len(tokens[n]) for _, n in drawn))

    def _tokens(self) -> list[list[int]]:
        """Of each choice; in a chat with the end of the turn, so that one may be the beginning of another."""
        texts, tokenizer = self.request.choice or [], self.sampler.get_tokenizer()
        if len(texts) > MAX_CHOICES:
            raise RequestError(f"{len(texts)} choices are too many; at most {MAX_CHOICES:,} may be given")
        is_chat = isinstance(self.request, ChatRequest)
        special = chat.special_tokens(tokenizer) if is_chat else (IMAGE_TOKEN, VIDEO_TOKEN)
        for text in texts:
            if token := next((token for token in special if token in text), None):
                raise PromptError(f"choice {text!r:.60} writes {token}, which steers the model; leave it out")
        tail = chat.encode(tokenizer, END_OF_TURN) if is_chat else []
        tokens = [[*chat.encode(tokenizer, text), *tail] for text in texts]
        longest, text = max(zip(map(len, tokens), texts, strict=True), default=(0, ""))
        room = self.sampler.context - max(prompt.input.length for prompt in self.prompts)
        if longest > min(room, room if self.request.limit is None else self.request.limit):
            raise RequestError(f"choice {text!r:.60} has {longest} tokens, more than the answer may have; shorten it")
        return tokens


def draw(scores: np.ndarray, request: GenerationRequest) -> Iterator[int]:
    """`request.n` choices from (choices,) log-probabilities: the likeliest at temperature 0, else drawn by `seed`."""
    if request.temperature == 0:
        yield from [int(scores.argmax())] * request.n
        return
    weights = np.exp((scores.astype(np.float64) - scores.max()) / request.temperature)
    for number in range(request.n):
        rng = np.random.default_rng(None if request.seed is None else [request.seed, number])
        yield int(rng.choice(len(weights), p=weights / weights.sum()))
