"""Token sequences as they grow, and the decoding of one snapshot's side by side.

One pass appends one token to each sequence, and others join between two. A sequence that ends frees its row of the
key-value cache, and one that waits takes it.
"""

import math
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from tinker import types
from tinker.types.topk_logprobs import TopkLogprobs
from torch import Tensor

from kshot.errors import RequestError
from vlm.local.engine import Engine, Snapshot
from vlm.local.model.attention import DecodeStep, RowCache
from vlm.local.model.packed import PackedInputs
from vlm.local.sampling.grammar import Grammar
from vlm.local.sampling.stops import TokenStops

ROOM = 64  # positions by which the cache grows
CACHED = 1 << 17  # positions to which sequences that join others may bring the cache
ROUNDING = 1e-9  # of a sum of probabilities: a set that reaches top_p but for it has reached it
LIKELY = 1024  # tokens that are sorted before the whole vocabulary is
DRAWN = 64  # distributions in float64 that are in memory together


@dataclass(frozen=True)
class ThoughtLimit:
    """Of samples that begin within a thought. end: the text that ends it. tokens: after so many without that, if any
    number is given, the tokens `closing`, which hold it, are written whatever the model would write."""

    end: str
    closing: Sequence[int]
    tokens: int | None = None


class TokenSequence:
    """One sample as it grows. number: of the sample in its request. top: how many of the likeliest tokens are kept
    at each position. tops: these and their log-probabilities. reason: why it has ended, or None. walk: through the
    grammar that it follows, if there is one; what is thought follows none. forced: tokens that come next."""

    def __init__(
        self,
        tokenizer: Any,
        params: types.SamplingParams,
        number: int,
        top: int = 0,
        grammar: Grammar | None = None,
        thought: ThoughtLimit | None = None,
    ) -> None:
        self.walk = None if grammar is None else grammar.walk()
        self._thought, self.forced = thought, deque[int]()
        self._end_of_thought = None if thought is None else TokenStops(tokenizer, [thought.end])  # None: it is there
        self.params, self.tokens, self.log_probs, self.top = params, list[int](), list[float](), top
        self.reason: types.StopReason | None = None
        self.tops: list[tuple[Sequence[int], Sequence[float]]] = []
        self.generator = generator_of(params.seed, number)
        stop = tokenizer.eos_token_id if params.stop is None else params.stop  # an empty list stops nowhere (SDK)
        stops = [stop] if isinstance(stop, int | str) else stop
        strings = [each for each in stops if isinstance(each, str)]
        self._stops = TokenStops(tokenizer, strings) if strings else None
        self._ids = frozenset(each for each in stops if isinstance(each, int))

    def append(self, token: int, log_prob: float) -> None:
        """Append a token; its log-probability is the model's, before any grammar, filter or temperature. One that is
        not finite ends the sequence."""
        self.tokens.append(token)
        self.log_probs.append(log_prob)
        if self.thinks:
            self._think()
        elif self.walk is not None:
            self.walk.append(token)
        ended = not self.finite or (self.walk is not None and (self.walk.ended or bool(self.walk.error)))
        if ended or token in self._ids or (self._stops is not None and self._stops.found(self.tokens)):
            self.reason = "stop"
        elif self.params.max_tokens is not None and len(self.tokens) >= self.params.max_tokens:
            self.reason = "length"

    @property
    def thinks(self) -> bool:
        """Whether the next token belongs to a thought, or to what closes it."""
        return self._end_of_thought is not None or bool(self.forced)

    def _think(self) -> None:
        """After another token of the thought, or of what closes it."""
        if self.forced:
            self.forced.popleft()
        if self._end_of_thought is None or self._thought is None:
            return
        if self._end_of_thought.found(self.tokens):
            self._end_of_thought = None
        elif not self.forced and self._thought.tokens is not None and len(self.tokens) >= self._thought.tokens:
            self.forced.extend(self._thought.closing)

    @property
    def finite(self) -> bool:
        """Whether the model gave numbers."""
        last = [*self.log_probs[-1:], *(values[end] for _, values in self.tops[-1:] for end in (0, -1))]  # in order
        return all(map(math.isfinite, last))  # it ends at the first that is none

    def end(self) -> None:
        """Let it get no more tokens: the model's context is full, or nobody waits for the rest."""
        self.reason = self.reason or "length"

    def sampled(self) -> types.SampledSequence:
        """The sequence in the SDK's terms. Raises RequestError where its grammar turned out to be too much work."""
        if self.walk is not None and self.walk.error:
            raise RequestError(f"the schema cannot be followed any further: {self.walk.error}; give a simpler one")
        top = None
        if self.top:
            ids, values = zip(*self.tops, strict=True)
            top = TopkLogprobs(token_ids=np.array(ids, np.int32), logprobs=np.array(values, np.float32))
        return types.SampledSequence(
            stop_reason=self.reason or "length",
            sequence_id=str(uuid.uuid4()),
            tokens_np=np.array(self.tokens, np.int32),
            logprobs_np=np.array(self.log_probs, np.float32),
            topk_logprobs_np=top,
        )


@dataclass(eq=False)
class _Entry:
    """A sequence with its state. cache, row: its keys and values, of `length` positions; position: the M-RoPE position
    of its last token, which is not in the cache yet."""

    sequence: TokenSequence
    cache: RowCache
    row: int
    length: int
    position: int


class Decoder:
    """The sequences of one snapshot that are decoded, at most `rows` in one pass; those beyond wait for a row.

    A `step` that raises leaves it unusable. A sequence whose `end` was called leaves at the next step.
    """

    def __init__(self, engine: Engine, snapshot: Snapshot, rows: int) -> None:
        self.engine, self.snapshot, self.rows = engine, snapshot, rows
        self._cache: RowCache | None = None
        self._running: list[_Entry] = []
        self._waiting: deque[_Entry] = deque()

    @property
    def active(self) -> int:
        """How many sequences have not ended, those that wait for a row included."""
        return sum(each.sequence.reason is None for each in (*self._running, *self._waiting))

    @property
    def free_rows(self) -> int:
        """How many rows nobody has or waits for."""
        return max(0, self.rows - self.active)

    @torch.no_grad()
    def add(
        self, cache: RowCache, logits: Tensor, positions: Tensor, sequences: Sequence[Sequence[TokenSequence]]
    ) -> None:
        """Append the first token to the sequences of each prompt; from the next step on they run with the others.

        A row of the cache, of logits (prompts, vocabulary) and of positions (prompts,), the M-RoPE position after the
        prompt, is a prompt's; its sequences share it.
        """
        owners = [(row, sequence) for row, each in enumerate(sequences) for sequence in each]
        for start in range(0, len(owners), self.rows):
            rows, some = zip(*owners[start : start + self.rows], strict=True)
            _append_next_tokens(some, logits[list(rows)], self.engine.model.placeholders)
        lengths, after = cache.lengths.tolist(), positions.tolist()
        joining = [_Entry(sequence, cache, row, lengths[row], after[row]) for row, sequence in owners]
        self._end_full(joining)
        self._waiting += joining

    @torch.no_grad()
    def step(self) -> list[TokenSequence]:
        """Append one token to every sequence that has a row, in one pass; returns these sequences."""
        self._assign_rows()
        if self._cache is None:
            return []
        running, text, factors = self._running, self.engine.model.text, self.snapshot
        tokens = [(each.sequence.tokens[-1], each.position) for each in running]
        ids, position_ids = torch.tensor(tokens, device=self.engine.model.device).unbind(1)
        with self.engine.model.timed("forward"):
            hidden = text.hidden(PackedInputs(ids, position_ids.expand(3, -1)), DecodeStep(self._cache), factors)
            logits = text.logits(hidden, factors)
        self._cache.lengths = self._cache.lengths + 1
        for each in running:
            each.length, each.position = each.length + 1, each.position + 1
        sequences = [each.sequence for each in running]
        _append_next_tokens(sequences, logits, self.engine.model.placeholders)
        self._end_full(running)
        return sequences

    def _end_full(self, sequences: Sequence[_Entry]) -> None:
        """End those that fill the model's context."""
        for each in sequences:
            if each.length >= self.engine.model.context:
                each.sequence.end()

    def _assign_rows(self) -> None:
        """Drop the ended sequences, give their rows to those that wait, and see that every row has room."""
        staying = [each for each in self._running if each.sequence.reason is None]
        joining = self._admitted(staying)
        before = len(self._running)
        self._running = staying + joining
        if not self._running:
            self._cache = None
            return
        longest = max(each.length for each in self._running)
        if self._cache is None or joining:
            self._gather(max(longest, *(each.cache.capacity for each in joining)) + ROOM)
        elif len(self._running) < before or longest >= self._cache.capacity:
            self._gather(self._cache.capacity + (ROOM if longest >= self._cache.capacity else 0))

    def _admitted(self, staying: Sequence[_Entry]) -> list[_Entry]:
        """Those of the waiting for whom there is a row, in order, and whom the cache can take beside the others."""
        joining: list[_Entry] = []
        longest = max((each.length for each in staying), default=0)
        while self._waiting and len(staying) + len(joining) < self.rows:
            first = self._waiting[0]
            if first.sequence.reason is not None:
                self._waiting.popleft()
                continue
            longest = max(longest, first.length)
            alone = not staying and all(each.cache is first.cache for each in joining)  # as one prefill left them
            if not alone and (len(staying) + len(joining) + 1) * (longest + ROOM) > CACHED:
                break
            joining.append(self._waiting.popleft())
        return joining

    def _gather(self, capacity: int) -> None:
        """Bring the rows of all that are running into one cache."""
        parts = [list(part) for _, part in groupby(self._running, lambda each: id(each.cache))]
        joined = self.engine.model.text.Cache.joined
        self._cache = joined([(part[0].cache, [each.row for each in part]) for part in parts], capacity)
        for row, each in enumerate(self._running):
            each.cache, each.row = self._cache, row


def _append_next_tokens(sequences: Sequence[TokenSequence], logits: Tensor, never: Sequence[int]) -> None:
    """Append its next token to every sequence, from (sequences, vocabulary) float32 logits; the likeliest ones before,
    so that one that is not finite ends the sequence as well. never: ids that stand for images, which no text has: an
    answer with one could not be trained on."""
    allowed = _allowed(sequences, logits)
    if never:
        allowed = allowed.index_fill(1, torch.tensor(never, device=logits.device), float("-inf"))
    tokens = allowed.argmax(-1).tolist()
    drawn = [n for n, sequence in enumerate(sequences) if sequence.params.temperature]
    for n, row in zip(drawn, allowed[drawn].cpu() if drawn else (), strict=True):
        tokens[n] = sample_token(row, sequences[n].params, sequences[n].generator)
    tokens = [each.forced[0] if each.forced else token for each, token in zip(sequences, tokens, strict=True)]
    chosen = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
    totals = logits.logsumexp(-1)
    if with_top := [n for n, sequence in enumerate(sequences) if sequence.top]:
        best = logits[with_top].topk(max(sequences[n].top for n in with_top))
        values = best.values - totals[with_top, None]
        for n, ids, log_probs in zip(with_top, best.indices.tolist(), values.tolist(), strict=True):
            sequences[n].tops.append((ids[: sequences[n].top], log_probs[: sequences[n].top]))
    for sequence, token, log_prob in zip(sequences, tokens, (chosen - totals).tolist(), strict=True):
        sequence.append(token, log_prob)


def _allowed(sequences: Sequence[TokenSequence], logits: Tensor) -> Tensor:
    """The logits, -inf at tokens that a sequence's grammar forbids."""
    walks = {n: each.walk for n, each in enumerate(sequences) if each.walk is not None and not each.thinks}
    if not walks:
        return logits
    forbidden = torch.zeros(logits.shape, dtype=torch.bool)
    for n, walk in walks.items():
        forbidden[n] = ~walk.allowed()
    return logits.masked_fill(forbidden.to(logits.device), float("-inf"))


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
    largest = logits.max().item()
    if not math.isfinite(largest):  # NaN: its log-probability says so
        return 0
    scaled = (logits.double().cpu() - largest) / params.temperature  # at most 0: no temperature overflows
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
    at = (scaled >= scaled.topk(count).values[-1]).nonzero()[:, 0]
    values, order = scaled[at].sort(descending=True, stable=True)
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
