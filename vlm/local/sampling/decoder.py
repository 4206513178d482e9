"""Decoding of one snapshot's sequences side by side: one pass appends one token to each, and others join between two.

A sequence that ends frees its row of the key-value cache, and one that waits takes it.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from vlm.local.engine import Engine, Snapshot
from vlm.local.model.attention import Cache, DecodeStep
from vlm.local.model.packed import PackedInputs
from vlm.local.sampling.sequence import TokenSequence, append_next_tokens

ROOM = 64  # positions by which the cache grows
CACHED = 1 << 17  # positions to which sequences that join others may bring the cache


@dataclass(eq=False)
class _Entry:
    """A sequence with its state. cache, row: its keys and values, of `length` positions; position: the M-RoPE position
    of its last token, which is not in the cache yet."""

    sequence: TokenSequence
    cache: Cache
    row: int
    length: int
    position: int


class Decoder:
    """The sequences of one snapshot that are decoded, at most `rows` in one pass; those beyond wait for a row.

    A `step` that raises leaves it unusable. A sequence whose `end` was called leaves at the next step.
    """

    def __init__(self, engine: Engine, snapshot: Snapshot, rows: int) -> None:
        self.engine, self.snapshot, self.rows = engine, snapshot, rows
        self._cache: Cache | None = None
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
        self, cache: Cache, logits: Tensor, positions: Tensor, sequences: Sequence[Sequence[TokenSequence]]
    ) -> None:
        """Append the first token to the sequences of each prompt; from the next step on they run with the others.

        A row of the cache, of logits (prompts, vocabulary) and of positions (prompts,), the M-RoPE position after the
        prompt, is a prompt's; its sequences share it.
        """
        owners = [(row, sequence) for row, each in enumerate(sequences) for sequence in each]
        for start in range(0, len(owners), self.rows):
            rows, some = zip(*owners[start : start + self.rows], strict=True)
            append_next_tokens(some, logits[list(rows)])
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
        running, text, factors = self._running, self.engine.model.text, self.snapshot.factors
        tokens = [(each.sequence.tokens[-1], each.position) for each in running]
        ids, position_ids = torch.tensor(tokens, device=self.engine.model.device).unbind(1)
        with self.engine.model.timed("forward"):
            hidden = text.hidden(PackedInputs(ids, position_ids.expand(3, -1)), DecodeStep(self._cache), factors)
            logits = text.logits(hidden, factors)
        self._cache.lengths = self._cache.lengths + 1
        for each in running:
            each.length, each.position = each.length + 1, each.position + 1
        sequences = [each.sequence for each in running]
        append_next_tokens(sequences, logits)
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
        self._cache = Cache.joined([(part[0].cache, [each.row for each in part]) for part in parts], capacity)
        for row, each in enumerate(self._running):
            each.cache, each.row = self._cache, row
