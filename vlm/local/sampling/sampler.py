"""Sampling from a snapshot: prompts into a decoder, and log-probabilities of prompts. Knows no clients and no classes.

Prompts are packed, whatever their lengths; the samples of one prompt share its prefill.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tinker
import torch
from tinker import types
from tinker.types.topk_logprobs import MASK_LOGPROB, TopkLogprobs
from torch import Tensor

from kshot.errors import RequestError
from vlm.local.engine import LOGITS, Batch, Engine, Snapshot, groups, length_of
from vlm.local.model.attention import Cache, Filling
from vlm.local.sampling.decoder import Decoder
from vlm.local.sampling.sequence import TokenSequence, draws, generator_of

ROWS = 64  # sequences in one pass
POSITIONS = 1 << 15  # of prompts in one pass


@dataclass(frozen=True)
class SamplingRequest:
    """What is asked about one prompt, in the SDK's terms (see `tinker.SamplingClient.sample`)."""

    prompt: tinker.ModelInput
    params: types.SamplingParams
    num_samples: int = 1
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    targets: types.TensorData | None = None
    topk_sample_logprobs: int = 0
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None

    @property
    def about_prompt(self) -> bool:
        """Whether the prompt's own log-probabilities, or draws in its place, are asked for."""
        asked = self.prompt_logprobs, self.topk_prompt_logprobs, self.prompt_alt_tokens_k
        return any(asked) or self.targets is not None


@dataclass(frozen=True)
class SamplingResult:
    """What is written for an ask, and the fields of SampleResponse about its prompt."""

    writers: Sequence[TokenSequence]
    about_prompt: dict[str, Any]

    @property
    def done(self) -> bool:
        """Whether every sample has ended."""
        return all(writer.reason is not None for writer in self.writers)

    def response(self) -> types.SampleResponse:
        """What there is so far."""
        return types.SampleResponse(sequences=[writer.sequence() for writer in self.writers], **self.about_prompt)


def sample(engine: Engine, snapshot: Snapshot, asks: Sequence[SamplingRequest]) -> list[types.SampleResponse]:
    """The answers, in order. Same asks in the same order → the same answers where each has a seed or temperature 0."""
    for ask in asks:
        check(engine, ask)
    done: dict[int, types.SampleResponse] = {}
    for members in groups([length_of(ask.prompt) for ask in asks], ROWS, POSITIONS):
        decoder = Decoder(engine, snapshot, ROWS)
        answers = join(decoder, [asks[n] for n in members])
        while decoder.going:
            decoder.step()
        done |= {n: answer.response() for n, answer in zip(members, answers, strict=True)}
    return [done[n] for n in range(len(asks))]


def check(engine: Engine, ask: SamplingRequest) -> None:
    """Raise RequestError for what cannot be sampled, as far as it shows before the prompt is read."""
    p, vocabulary = ask.params, engine.model.vocabulary
    last = 1 if ask.prompt_logprobs_last_n is None else ask.prompt_logprobs_last_n
    ranges = {
        "num_samples": (ask.num_samples, 1, float("inf")),
        "max_tokens": (1 if p.max_tokens is None else p.max_tokens, 1, float("inf")),
        "temperature": (p.temperature, 0, float("inf")),
        "top_p": (p.top_p, 1e-9, 1),
        "top_k": (p.top_k, -1, float("inf")),
        "seed": (p.seed or 0, 0, 2**63 - 1),
        "topk_prompt_logprobs": (ask.topk_prompt_logprobs, 0, vocabulary),
        "topk_sample_logprobs": (ask.topk_sample_logprobs, 0, vocabulary),
        "prompt_alt_tokens_k": (ask.prompt_alt_tokens_k, 0, vocabulary),
        "prompt_logprobs_last_n": (last, 1, float("inf")),
    }
    if (isinstance(p.stop, str) and not p.stop) or (isinstance(p.stop, list) and "" in p.stop):
        raise RequestError("stop holds an empty text, which stands everywhere; leave it out")
    for name, (value, low, high) in ranges.items():
        if not low <= value <= high:
            raise RequestError(f"{name} = {value} is out of range: it must be from {low} to {high}")
    for chunk in ask.prompt.chunks:
        if not isinstance(
            chunk, types.EncodedTextChunk | types.ImageChunk
        ):  # others have no length that could be asked
            raise RequestError(f"chunk of type {chunk.type!r} is not supported; use encoded text and images")
    if ask.prompt_logprobs_last_n is not None and not ask.prompt_logprobs:
        raise RequestError(f"prompt_logprobs_last_n = {last} is of prompt_logprobs; ask for these too")
    if ask.targets is not None:
        engine.model.check_tokens(
            [int(t) for t in ask.targets.to_numpy(-1).flat if t != -1], "target_prompt_logprobs id"
        )


@torch.no_grad()
def join(decoder: Decoder, asks: Sequence[SamplingRequest]) -> list[SamplingResult]:
    """Read the prompts in one pass; their samples, a first token in each, join the others of the decoder.

    Raises RequestError or ImageError for a prompt that the model does not take; then none has joined.
    """
    engine, factors = decoder.engine, decoder.snapshot.factors
    batch = engine.collate([ask.prompt for ask in asks], factors)
    cache = Cache(batch.rows.lengths, engine.model.device)
    about = any(ask.about_prompt for ask in asks)
    wanted = None if about else batch.ends
    with engine.model.timed("forward"):
        hidden = engine.model.text.hidden(batch.given, Filling(cache, batch.rows, wanted), factors, wanted)
        logits = engine.model.text.logits(hidden[batch.ends] if about else hidden, factors)
    about_prompts = _about_prompts(decoder, batch, hidden, asks)
    answers = [SamplingResult(_writers(engine, ask), values) for ask, values in zip(asks, about_prompts, strict=True)]
    decoder.join(cache, logits, batch.next_place, [answer.writers for answer in answers])
    return answers


def _writers(engine: Engine, ask: SamplingRequest) -> list[TokenSequence]:
    given = engine.model.tokenizer, ask.params
    return [TokenSequence(*given, number, ask.topk_sample_logprobs) for number in range(ask.num_samples)]


def _about_prompts(
    decoder: Decoder, batch: Batch, hidden: Tensor, asks: Sequence[SamplingRequest]
) -> Iterator[dict[str, Any]]:
    """What each ask wants to know about its prompt."""
    if not any(ask.about_prompt for ask in asks):
        yield from ({} for _ in asks)
        return
    rows = (t.split(batch.rows.lengths) for t in (batch.given.ids, hidden, batch.is_image()))
    for ask, ids, states, is_image in zip(asks, *rows, strict=True):
        image = is_image.cpu().numpy()
        yield _prompt_values(decoder.engine, decoder.snapshot, ids, states, image, ask) if ask.about_prompt else {}


def _prompt_values(
    engine: Engine, snapshot: Snapshot, ids: Tensor, hidden: Tensor, is_image: np.ndarray, ask: SamplingRequest
) -> dict[str, Any]:
    """The fields of SampleResponse about the prompt: hidden states (length, hidden) predict ids from position 1 on."""
    rows, values = len(ids) - 1, dict[str, Any]()
    targets, uniform = _wanted(ask.targets, rows), _uniform(ask, rows)
    own_from = 1 + _unasked(ask, rows)  # the first position whose own token is scored
    start = 1 if ask.targets is not None or ask.prompt_alt_tokens_k else own_from  # the first one that is scored at all
    given = hidden[start - 1 : -1], ids[start:], ask, targets[start - 1 :], uniform[start - 1 :]
    parts = zip(*_scored(engine, snapshot, *given), strict=True)
    own, top_ids, tops, chosen, drawn, drawn_values = (torch.cat(part).numpy() for part in parts)
    if ask.prompt_logprobs:
        values["prompt_logprobs_np"] = _behind(own_from, own[own_from - start :], np.nan)
        values["prompt_logprobs_np"][is_image] = np.nan
    if ask.topk_prompt_logprobs:
        top_ids, tops = top_ids[own_from - start :].astype(np.int32), tops[own_from - start :]
        values["topk_prompt_logprobs_np"] = TopkLogprobs(
            token_ids=_behind(own_from, top_ids, 0), logprobs=_behind(own_from, tops, MASK_LOGPROB)
        )
    if ask.targets is not None:
        values["target_prompt_logprobs"] = types.TensorData.from_numpy(chosen)
    if ask.prompt_alt_tokens_k:
        tensors = (types.TensorData.from_numpy(each) for each in (drawn, drawn_values))
        values["prompt_alt_tokens"] = types.PromptAltTokens(*tensors)
    return values


def _scored(
    engine: Engine,
    snapshot: Snapshot,
    hidden: Tensor,
    ids: Tensor,
    ask: SamplingRequest,
    targets: Tensor,
    uniform: Tensor,
) -> Iterator[tuple[Tensor, ...]]:
    """For each position its own token's log-probability (n,), its likeliest tokens and their log-probabilities
    (n, top), those of its targets, and what is drawn by `uniform`, with log-probabilities; in parts that keep the
    logits within LOGITS numbers."""
    step = max(1, LOGITS // engine.model.vocabulary)
    for start in range(0, max(1, len(hidden)), step):
        part = slice(start, start + step)
        logits = engine.model.text.logits(hidden[part], snapshot.factors)
        # not log_softmax: of 150,000 float32 logits that may be 2e-4 off on a CPU, and logsumexp is not
        log_probs = logits - logits.logsumexp(-1, keepdim=True)
        own = log_probs.gather(1, ids[part, None].to(log_probs.device))[:, 0]
        best = log_probs.topk(ask.topk_prompt_logprobs)
        asked = targets[part].to(log_probs.device)
        chosen = log_probs.gather(1, asked.clamp(min=0)).masked_fill(asked < 0, 0.0)
        drawn = draws(logits, ask.params.temperature, uniform[part])
        values = own, best.indices, best.values, chosen, drawn, log_probs.gather(1, drawn)
        yield tuple(each.cpu() for each in values)


def _unasked(ask: SamplingRequest, rows: int) -> int:
    """How many of the `rows` positions behind the first are not asked for. Raises RequestError for more than all."""
    last = rows if ask.prompt_logprobs_last_n is None else ask.prompt_logprobs_last_n
    if last > rows:
        raise RequestError(
            f"prompt_logprobs_last_n = {last} is out of range: it must be from 1 to {rows}, "
            "as many positions as the prompt has behind its first"
        )
    return rows - last


def _wanted(asked: types.TensorData | None, rows: int) -> Tensor:
    """The ids to score, (rows, any number), -1 where none is. Raises RequestError for another number of rows."""
    if asked is None:
        return torch.zeros(rows, 0, dtype=torch.long)
    ids = asked.to_torch(pad_value=-1)
    if ids.ndim != 2 or len(ids) != rows:
        raise RequestError(f"target_prompt_logprobs must have {rows} rows, one a position, got {tuple(ids.shape)}")
    return ids


def _uniform(ask: SamplingRequest, rows: int) -> Tensor:
    """(rows, prompt_alt_tokens_k) numbers from [0, 1), by the request's seed, that draw in the prompt's place."""
    generator = generator_of(ask.params.seed, 0, prompt=True)
    return torch.rand(rows, ask.prompt_alt_tokens_k, generator=generator, dtype=torch.float64)


def _behind(start: int, values: np.ndarray, empty: float) -> np.ndarray:
    """The values from position `start` on, and `empty` before it."""
    return np.concatenate([np.full((start, *values.shape[1:]), empty, values.dtype), values])
