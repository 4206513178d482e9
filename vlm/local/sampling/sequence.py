"""Token sequences as they grow: which token comes next, its log-probability, and when to stop."""

import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tinker import types
from tinker.types.topk_logprobs import TopkLogprobs
from torch import Tensor

ROUNDING = 1e-9  # of a sum of probabilities: a set that reaches top_p but for it has reached it
LIKELY = 1024  # tokens that are sorted before the whole vocabulary is
DRAWN = 64  # distributions in float64 that are in memory together


class TokenSequence:
    """One sample as it grows. number: of the sample in its request. top: how many of the likeliest tokens are kept
    at each position. reason: why it has ended, or None."""

    def __init__(self, tokenizer: Any, params: types.SamplingParams, number: int, top: int = 0) -> None:
        self.params, self.tokens, self.log_probs, self.top = params, list[int](), list[float](), top
        self.reason: types.StopReason | None = None
        self.tops: list[tuple[Sequence[int], Sequence[float]]] = []
        self._tokenizer, self._generator = tokenizer, generator_of(params.seed, number)
        self._strings, self._ids = _stops(params.stop, tokenizer.eos_token_id)
        self._tail = 4 + max((len(stop.encode()) for stop in self._strings), default=0)  # tokens a match may span

    def append(self, token: int, log_prob: float) -> None:
        """Append a token; its log-probability is the model's, before any filter or temperature."""
        self.tokens.append(token)
        self.log_probs.append(log_prob)
        if token in self._ids or (self._strings and self._text_stops()):
            self.reason = "stop"
        elif self.params.max_tokens is not None and len(self.tokens) >= self.params.max_tokens:
            self.reason = "length"

    def append_top(self, tokens: Sequence[int], log_probs: Sequence[float]) -> None:
        """Keep the likeliest tokens of the position last written, the `top` first of these."""
        self.tops.append((tokens[: self.top], log_probs[: self.top]))

    def end(self) -> None:
        """Let it get no more tokens: the model's context is full, or nobody waits for the rest."""
        self.reason = self.reason or "length"

    def draw(self, logits: Tensor) -> int:
        """A token from (vocabulary,) logits by the request's temperature, top-k, top-p and generator."""
        return sample_token(logits, self.params, self._generator)

    def sampled(self) -> types.SampledSequence:
        """The sequence in the SDK's terms."""
        return types.SampledSequence(
            stop_reason=self.reason or "length",
            sequence_id=str(uuid.uuid4()),
            tokens_np=np.array(self.tokens, np.int32),
            logprobs_np=np.array(self.log_probs, np.float32),
            topk_logprobs_np=self._topk() if self.top else None,
        )

    def _topk(self) -> TopkLogprobs:
        ids, values = zip(*self.tops, strict=True)
        return TopkLogprobs(token_ids=np.array(ids, np.int32), logprobs=np.array(values, np.float32))

    def _text_stops(self) -> bool:
        text = self._tokenizer.decode(self.tokens[-self._tail :])
        return any(stop in text for stop in self._strings)


def append_next_tokens(sequences: Sequence[TokenSequence], logits: Tensor) -> None:
    """Append its next token to every sequence, from (sequences, vocabulary) float32 logits."""
    tokens = logits.argmax(-1).tolist()
    drawn = [n for n, sequence in enumerate(sequences) if sequence.params.temperature]
    for n, row in zip(drawn, logits[drawn].cpu() if drawn else (), strict=True):
        tokens[n] = sequences[n].draw(row)
    chosen = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
    totals = logits.logsumexp(-1)
    for sequence, token, log_prob in zip(sequences, tokens, (chosen - totals).tolist(), strict=True):
        sequence.append(token, log_prob)
    if with_top := [n for n, sequence in enumerate(sequences) if sequence.top]:
        best = logits[with_top].topk(max(sequences[n].top for n in with_top))
        values = best.values - totals[with_top, None]
        for n, *top in zip(with_top, best.indices.tolist(), values.tolist(), strict=True):
            sequences[n].append_top(*top)


def sample_tokens(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """(n, k) tokens, each drawn alone from its row of (n, vocabulary) logits at this temperature, without filters.

    uniform: (n, k) float64 from [0, 1) that choose them. At temperature 0 all are the largest.
    """
    if temperature == 0 or not uniform.numel():
        return logits.argmax(-1, keepdim=True).expand(-1, uniform.shape[1])
    parts = []
    for some, chosen in zip(logits.split(DRAWN), uniform.to(logits.device).split(DRAWN), strict=True):
        scaled = (some.double() - some.amax(-1, keepdim=True)) / temperature
        mass = scaled.softmax(-1).cumsum(-1)
        parts.append(torch.searchsorted(mass, chosen * mass[:, -1:], right=True).clamp(max=logits.shape[1] - 1))
    return torch.cat(parts)


def sample_token(logits: Tensor, params: types.SamplingParams, generator: torch.Generator) -> int:
    """A token from (vocabulary,) logits: the largest at temperature 0, else drawn after top-k and top-p."""
    if params.temperature == 0:
        return int(logits.argmax())
    scaled = (logits.double().cpu() - logits.max().item()) / params.temperature  # at most 0: no temperature overflows
    probs, tokens = _candidates(scaled, params.top_k, params.top_p)
    mass = probs.cumsum(-1)
    drawn = torch.searchsorted(mass, torch.rand((), generator=generator, dtype=torch.float64) * mass[-1], right=True)
    return int(tokens[min(int(drawn), len(tokens) - 1)])


def _candidates(scaled: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Weights and tokens to draw from, likeliest first unless all may be drawn."""
    kept = min(top_k, len(scaled)) if top_k > 0 else len(scaled)
    if kept == len(scaled) and top_p >= 1:
        return scaled.softmax(-1), torch.arange(len(scaled))
    if top_k <= 0 and kept > LIKELY:  # the likeliest ones may do
        values, tokens = _ordered(scaled, LIKELY)
        probs, tokens = _nucleus((values - scaled.logsumexp(-1)).exp(), tokens, top_p)
        if len(probs) < LIKELY:
            return probs, tokens
    values, tokens = _ordered(scaled, kept)
    return _nucleus(values.softmax(-1), tokens, top_p)


def _ordered(scaled: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest values and their tokens; among equal values the lower token first."""
    if count < len(scaled):
        values, _ = scaled.topk(count)
        at = (scaled >= values[-1]).nonzero()[:, 0]
        scaled, at = scaled[at], at
    else:
        at = torch.arange(len(scaled))
    values, order = scaled.sort(descending=True, stable=True)
    return values[:count], at[order[:count]]


def _nucleus(probs: Tensor, tokens: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The smallest set whose mass reaches top_p (Holtzman et al. 2020): always the first."""
    kept = int((probs.cumsum(-1) - probs < top_p - ROUNDING).sum()) if top_p < 1 else len(probs)
    return probs[: max(1, kept)], tokens[: max(1, kept)]


def generator_of(seed: int | None, number: int, prompt: bool = False) -> torch.Generator:
    """Of the sample `number` of a request: from both, so that neighbouring seeds share no sample. prompt: of what is
    drawn in its prompt's place, another one."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        mixed = np.random.SeedSequence([seed, number], spawn_key=(0,) if prompt else ())
        generator.manual_seed(int(mixed.generate_state(1, np.uint64)[0]))
    return generator


def _stops(stop: str | Sequence[str] | Sequence[int] | None, end: int) -> tuple[list[str], set[int]]:
    """Stop strings and stop tokens. None stops at the tokenizer's end token, an empty list nowhere (SDK)."""
    given: list[str | int] = [end] if stop is None else [stop] if isinstance(stop, str) else list(stop)
    return [s for s in given if isinstance(s, str)], {s for s in given if isinstance(s, int)}
