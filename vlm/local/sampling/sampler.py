"""Sampling from a snapshot: prefill of prompts into a decoder, and log-probabilities of the prompts themselves.

Prompts are packed, whatever their lengths; the samples of one prompt share its prefill.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import numpy as np
import tinker
import torch
from tinker import types
from tinker.types.topk_logprobs import MASK_LOGPROB, TopkLogprobs
from torch import Tensor

from kshot.errors import NotFiniteError, RequestError
from vlm.local.engine import LOGITS, POSITIONS, ROWS, Batch, Engine, Snapshot, length_of
from vlm.local.model.attention import Causal
from vlm.local.packs import groups
from vlm.local.sampling.decoder import Decoder, ThoughtLimit, TokenSequence, generator_of, sample_tokens
from vlm.local.sampling.grammar import Grammar
from vlm.local.sampling.stops import check_stops


@dataclass(frozen=True)
class SamplingRequest:
    """What a client wants for one prompt, in the SDK's terms (see `tinker.SamplingClient.sample`). grammar: what every
    sample follows."""

    prompt: tinker.ModelInput
    params: types.SamplingParams
    num_samples: int = 1
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    targets: types.TensorData | None = None
    topk_sample_logprobs: int = 0
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None
    grammar: Grammar | None = None
    thought: ThoughtLimit | None = None

    @property
    def prompt_fields(self) -> bool:
        """Whether log-probabilities of the prompt, or draws in its place, are requested."""
        requested = self.prompt_logprobs, self.topk_prompt_logprobs, self.prompt_alt_tokens_k
        return any(requested) or self.targets is not None


@dataclass(frozen=True)
class SamplingResult:
    """The samples of a request, and the fields of SampleResponse about its prompt. model, adapter: their names."""

    sequences: Sequence[TokenSequence]
    prompt_fields: dict[str, Any]
    model: str
    adapter: str = ""

    @property
    def done(self) -> bool:
        """Whether every sample has ended."""
        return all(sequence.reason is not None for sequence in self.sequences)

    def check(self) -> None:
        """Raise NotFiniteError where the model gave NaN or infinite numbers."""
        if not all(sequence.finite for sequence in self.sequences):
            raise NotFiniteError(self.model, "log-probabilities", self.adapter)

    def response(self) -> types.SampleResponse:
        """What was sampled so far; raises as `check`."""
        self.check()
        return types.SampleResponse(sequences=[each.sampled() for each in self.sequences], **self.prompt_fields)


def sample(engine: Engine, snapshot: Snapshot, requests: Sequence[SamplingRequest]) -> list[types.SampleResponse]:
    """The results, in order. The same requests in the same order give the same results where each has a seed or
    temperature 0. Raises RequestError and ImageError for what cannot be sampled, NotFiniteError."""
    for request in requests:
        check(engine, request)
    done: dict[int, types.SampleResponse] = {}
    for members in groups([length_of(request.prompt) for request in requests], ROWS, POSITIONS):
        decoder = decoder_of(engine, snapshot, ROWS)
        results = prefill(decoder, [requests[n] for n in members])
        while decoder.active:
            decoder.step()
        done |= {n: result.response() for n, result in zip(members, results, strict=True)}
    return [done[n] for n in range(len(requests))]


def check(engine: Engine, request: SamplingRequest) -> None:
    """Raise RequestError for what cannot be sampled, as far as it shows before the prompt is read."""
    p, vocabulary = request.params, engine.model.vocabulary
    last = 1 if request.prompt_logprobs_last_n is None else request.prompt_logprobs_last_n
    ranges = {
        "num_samples": (request.num_samples, 1, float("inf")),
        "max_tokens": (1 if p.max_tokens is None else p.max_tokens, 1, float("inf")),
        "temperature": (p.temperature, 0, float("inf")),
        "top_p": (p.top_p, 1e-9, 1),
        "top_k": (p.top_k, -1, float("inf")),
        "seed": (p.seed or 0, 0, 2**63 - 1),
        "topk_prompt_logprobs": (request.topk_prompt_logprobs, 0, vocabulary),
        "topk_sample_logprobs": (request.topk_sample_logprobs, 0, vocabulary),
        "prompt_alt_tokens_k": (request.prompt_alt_tokens_k, 0, vocabulary),
        "prompt_logprobs_last_n": (last, 1, float("inf")),
    }
    check_stops([p.stop] if isinstance(p.stop, str) else p.stop or ())
    for name, (value, low, high) in ranges.items():
        if not low <= value <= high:
            raise RequestError(f"{name} = {value} is out of range: it must be from {low} to {high}")
    length_of(request.prompt)
    if request.prompt_logprobs_last_n is not None and not request.prompt_logprobs:
        raise RequestError(f"prompt_logprobs_last_n = {last} is of prompt_logprobs; ask for these too")
    if request.targets is not None:
        if request.targets.dtype != "int64":
            raise RequestError(
                f"target_prompt_logprobs holds {request.targets.dtype} numbers; give token ids, as int64"
            )
        targets = [int(target) for target in request.targets.to_numpy(-1).flat if target != -1]
        engine.model.check_tokens(targets, "target_prompt_logprobs id")


@singledispatch
def decoder_of(engine: Engine, snapshot: Snapshot, rows: int) -> Decoder:
    """A decoder for samples of a snapshot, of the kind that the engine has."""
    return Decoder(engine, snapshot, rows)


@singledispatch
@torch.no_grad()
def prefill(decoder: Decoder, requests: Sequence[SamplingRequest]) -> list[SamplingResult]:
    """Read the prompts in one pass, and add their samples to the decoder, each with its first token.

    Raises RequestError or ImageError for a prompt that the model does not take, NotFiniteError for log-probabilities of
    it that are NaN; then none is added.
    """
    engine, factors = decoder.engine, decoder.snapshot
    batch = engine.collate([request.prompt for request in requests], factors)
    cache = engine.model.text.Cache(batch.rows.lengths, engine.model.device)
    any_fields = any(request.prompt_fields for request in requests)
    wanted = None if any_fields else batch.ends
    with engine.model.timed("forward"):
        hidden = engine.model.text.hidden(batch.inputs, Causal(batch.rows, wanted, cache), factors)
        logits = engine.model.text.logits(hidden[batch.ends] if any_fields else hidden, factors)
    results, tokenizer = list[SamplingResult](), engine.model.tokenizer
    for request, end, length in zip(requests, batch.ends.tolist(), batch.rows.lengths, strict=True):
        top, row = request.topk_sample_logprobs, slice(end + 1 - length, end + 1)
        sequences = [
            TokenSequence(tokenizer, request.params, number, top, request.grammar, request.thought)
            for number in range(request.num_samples)
        ]
        values = _prompt_values(decoder, batch, hidden, row, request) if request.prompt_fields else {}
        results.append(SamplingResult(sequences, values, engine.model.name, factors.name if factors else ""))
    decoder.add(cache, logits, batch.next_position, [result.sequences for result in results])
    return results


def _prompt_values(
    decoder: Decoder, batch: Batch, hidden: Tensor, row: slice, request: SamplingRequest
) -> dict[str, Any]:
    """The fields of SampleResponse about the prompt that is `row` of the batch and of its hidden states."""
    ids, states = batch.inputs.ids[row], hidden[row]  # a state predicts the next id
    rows, values = len(ids) - 1, dict[str, Any]()
    targets, generator = _target_ids(request.targets, rows), generator_of(request.params.seed, 0, prompt=True)
    uniform = torch.rand(rows, request.prompt_alt_tokens_k, generator=generator, dtype=torch.float64)
    last = rows if request.prompt_logprobs_last_n is None else request.prompt_logprobs_last_n
    if last > rows:
        raise RequestError(
            f"prompt_logprobs_last_n = {last} is out of range: it must be from 1 to {rows}, "
            "as many positions as the prompt has behind its first"
        )
    first_own = 1 + rows - last  # the position of the first token of the prompt that is scored
    any_position = request.targets is not None or request.prompt_alt_tokens_k
    start = 1 if any_position else first_own  # the first position at which anything is scored
    inputs = states[start - 1 : -1], ids[start:], request, targets[start - 1 :], uniform[start - 1 :]
    parts = zip(*_scored(decoder, *inputs), strict=True)
    own, top_ids, tops, chosen, drawn, drawn_values = (torch.cat(part).numpy() for part in parts)
    if not all(np.isfinite(each).all() for each in (own, tops, chosen, drawn_values)):
        adapter = decoder.snapshot.name if decoder.snapshot else ""
        raise NotFiniteError(decoder.engine.model.name, "log-probabilities", adapter)
    if request.prompt_logprobs:
        values["prompt_logprobs_np"] = _behind(first_own, own[first_own - start :], np.nan)
        values["prompt_logprobs_np"][(ids == decoder.engine.model.image_token).cpu().numpy()] = np.nan
    if request.topk_prompt_logprobs:
        top_ids, tops = top_ids[first_own - start :].astype(np.int32), tops[first_own - start :]
        values["topk_prompt_logprobs_np"] = TopkLogprobs(
            token_ids=_behind(first_own, top_ids, 0), logprobs=_behind(first_own, tops, MASK_LOGPROB)
        )
    if request.targets is not None:
        values["target_prompt_logprobs"] = types.TensorData.from_numpy(chosen)
    if request.prompt_alt_tokens_k:
        tensors = (types.TensorData.from_numpy(each) for each in (drawn, drawn_values))
        values["prompt_alt_tokens"] = types.PromptAltTokens(*tensors)
    return values


def _scored(
    decoder: Decoder, hidden: Tensor, ids: Tensor, request: SamplingRequest, targets: Tensor, uniform: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """For each position its own token's log-probability (n,), its likeliest tokens and their log-probabilities
    (n, top), those of its targets, and what is drawn by `uniform`, with log-probabilities; in parts that keep the
    logits within LOGITS numbers."""
    model, factors = decoder.engine.model, decoder.snapshot
    step = max(1, LOGITS // model.vocabulary)
    for start in range(0, max(1, len(hidden)), step):
        part = slice(start, start + step)
        logits = model.text.logits(hidden[part], factors)
        # not log_softmax: of 150,000 float32 logits that may be 2e-4 off on a CPU, and logsumexp is not
        log_probs = logits - logits.logsumexp(-1, keepdim=True)
        own = log_probs.gather(1, ids[part, None].to(log_probs.device))[:, 0]
        best = log_probs.topk(request.topk_prompt_logprobs)
        chosen_ids = targets[part].to(log_probs.device)
        chosen = log_probs.gather(1, chosen_ids.clamp(min=0)).masked_fill(chosen_ids < 0, 0.0)
        drawn = sample_tokens(logits, request.params.temperature, uniform[part])
        values = own, best.indices, best.values, chosen, drawn, log_probs.gather(1, drawn)
        yield tuple(each.cpu() for each in values)


def _target_ids(targets: types.TensorData | None, rows: int) -> Tensor:
    """The ids to score, (rows, any number), -1 where none is. Raises RequestError for another number of rows."""
    if targets is None:
        return torch.zeros(rows, 0, dtype=torch.long)
    ids = targets.to_torch(pad_value=-1)
    if ids.ndim != 2 or len(ids) != rows:
        raise RequestError(f"target_prompt_logprobs must have {rows} rows, one a position, got {tuple(ids.shape)}")
    return ids


def _behind(start: int, values: np.ndarray, empty: float) -> np.ndarray:
    """The values from position `start` on, and `empty` before it."""
    return np.concatenate([np.full((start, *values.shape[1:]), empty, values.dtype), values])
