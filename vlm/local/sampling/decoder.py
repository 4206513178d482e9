"""The sequences of one snapshot, written side by side; others join them between two tokens.

One pass writes one token of each. A sequence that ends leaves its row, and one that waits takes it. Knows no prompts,
no requests and no threads.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from vlm.local.engine import Engine, Snapshot
from vlm.local.model.attention import Cache, Next
from vlm.local.model.packed import Positions
from vlm.local.sampling.sequence import TokenSequence, advance

ROOM = 64  # positions by which the cache grows
CACHED = 1 << 17  # positions to which sequences that join others may bring the cache


@dataclass(eq=False)
class _Sequence:
    """Where a sequence is. cache, row: its keys and values, of `length` positions; place: the M-RoPE position of its
    last token, which is not in the cache yet."""

    writer: TokenSequence
    cache: Cache
    row: int
    length: int
    place: int


class Decoder:
    """The sequences that one snapshot writes, at most `rows` in one pass; those beyond wait for a row.

    A `step` that raises leaves it unusable. A writer that is told to `end` leaves at the next step.
    """

    def __init__(self, engine: Engine, snapshot: Snapshot, rows: int) -> None:
        self.engine, self.snapshot, self.rows = engine, snapshot, rows
        self._cache: Cache | None = None
        self._running: list[_Sequence] = []
        self._waiting: deque[_Sequence] = deque()

    @property
    def going(self) -> int:
        """How many sequences have not ended, those that wait for a row included."""
        return sum(each.writer.reason is None for each in (*self._running, *self._waiting))

    @property
    def free(self) -> int:
        """How many rows nobody has or waits for."""
        return max(0, self.rows - self.going)

    @torch.no_grad()
    def join(self, cache: Cache, logits: Tensor, places: Tensor, writers: Sequence[Sequence[TokenSequence]]) -> None:
        """Let the writers of each prompt write their first token; from the next step on they go with the others.

        A row of the cache, of logits (prompts, vocabulary) and of places (prompts,), the M-RoPE position after the
        prompt, is a prompt's; its writers share it.
        """
        owners = [(row, writer) for row, each in enumerate(writers) for writer in each]
        for start in range(0, len(owners), self.rows):
            rows, some = zip(*owners[start : start + self.rows], strict=True)
            advance(some, logits[list(rows)])
        lengths, after = cache.lengths.tolist(), places.tolist()
        joining = [_Sequence(writer, cache, row, lengths[row], after[row]) for row, writer in owners]
        self._cut(joining)
        self._waiting += joining

    @torch.no_grad()
    def step(self) -> list[TokenSequence]:
        """Write one token of every sequence that has a row, in one pass; gives their writers."""
        self._settle()
        if self._cache is None:
            return []
        going, text, factors = self._running, self.engine.model.text, self.snapshot.factors
        tokens = [(each.writer.tokens[-1], each.place) for each in going]
        ids, places = torch.tensor(tokens, device=self.engine.model.device).unbind(1)
        with self.engine.model.timed("forward"):
            hidden = text.hidden(Positions(ids, places.expand(3, -1)), Next(self._cache), factors)
            logits = text.logits(hidden, factors)
        self._cache.lengths = self._cache.lengths + 1
        for each in going:
            each.length, each.place = each.length + 1, each.place + 1
        writers = [each.writer for each in going]
        advance(writers, logits)
        self._cut(going)
        return writers

    def _cut(self, sequences: Sequence[_Sequence]) -> None:
        """End those that fill the model's context."""
        for each in sequences:
            if each.length >= self.engine.model.context:
                each.writer.end()

    def _settle(self) -> None:
        """Let go of the ended ones, give their rows to those that wait, and see that every row has room."""
        staying = [each for each in self._running if each.writer.reason is None]
        joining = self._admitted(staying)
        going, before = staying + joining, len(self._running)
        self._running = going
        if not going:
            self._cache = None
            return
        longest = max(each.length for each in going)
        if self._cache is None or joining:
            self._gather(max(longest, *(each.cache.capacity for each in joining)) + ROOM)
        elif len(going) < before or longest >= self._cache.capacity:
            self._gather(self._cache.capacity + (ROOM if longest >= self._cache.capacity else 0))

    def _admitted(self, staying: Sequence[_Sequence]) -> list[_Sequence]:
        """Those of the waiting for whom there is a row, in order, and whom the cache can take beside the others."""
        joining: list[_Sequence] = []
        longest = max((each.length for each in staying), default=0)
        while self._waiting and len(staying) + len(joining) < self.rows:
            first = self._waiting[0]
            if first.writer.reason is not None:
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
