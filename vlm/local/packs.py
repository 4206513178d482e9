"""What goes through a model together: the rows of one pass, and a training request's data as packs.

A pack is one training pass: data of the same fields, each scored where the loss looks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby

import numpy as np
import tinker
import torch
from torch import Tensor

from kshot.errors import NotFiniteError
from vlm.local.losses import CANDIDATES, DATUM, Candidates, Fields, Loss, candidates_of, fields_of
from vlm.local.model.placement import PACK


def groups(lengths: Sequence[int], rows: int, positions: int) -> list[list[int]]:
    """The numbers of the rows that go through together, by length: at most `rows`, at most `positions` when padded to
    the longest and at most twice those there are, one row at least."""
    made, total = list[list[int]](), 0
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        length, together = lengths[number], made[-1] if made else []
        padded = (len(together) + 1) * length  # in this order the last one is the longest
        if not together or len(together) == rows or padded > min(positions, 2 * (total + length)):
            made.append(together := [])
            total = 0
        together.append(number)
        total += length
    return made


@dataclass(frozen=True)
class Item:
    """A datum as the loss reads it. scored: (length,) bool, of which positions the log-probability is computed, among
    `candidates` if the loss is a closed one."""

    number: int
    model_input: tinker.ModelInput
    fields: Fields
    scored: Tensor
    candidates: Candidates | None = None

    @classmethod
    def of(cls, number: int, datum: tinker.Datum, chosen: Loss, *, every: bool) -> "Item":
        fields = fields_of(datum, chosen)
        targets, candidates = fields["target_tokens"], None
        scored = torch.ones(len(targets), dtype=torch.bool) if every else chosen.scored(fields)
        if chosen.closed:
            positions = scored.nonzero()[:, 0].numpy()
            candidates = candidates_of(datum.loss_fn_inputs[CANDIDATES], targets.numpy(), positions)
        return cls(number, datum.model_input, fields, scored, candidates)

    @property
    def length(self) -> int:
        return len(self.scored)

    def form(self) -> tuple[list[str], list[int]]:
        """What items of one pack have in common: the names of the fields, and K."""
        return sorted(self.fields), list(self.fields["target_tokens"].shape[1:])


@dataclass(frozen=True)
class Pack:
    """Items that go through together: of the same fields, and of as many targets a position."""

    items: Sequence[Item]

    @cached_property
    def scored_positions(self) -> Tensor:
        """(scored,) the scored positions in the pack."""
        return torch.cat([item.scored for item in self.items]).nonzero()[:, 0]

    @cached_property
    def fields(self) -> dict[str, Tensor]:
        """(scored,) or (scored, K) each field at these positions; and of which datum of the pack each is."""
        every = {name: torch.cat([item.fields[name] for item in self.items]) for name in self.items[0].fields}
        scored = torch.tensor([int(item.scored.sum()) for item in self.items])
        datum = torch.arange(len(scored)).repeat_interleave(scored)
        return {**{name: values[self.scored_positions] for name, values in every.items()}, DATUM: datum}

    @property
    def candidates(self) -> Candidates | None:
        """Of a closed loss: the candidates at the scored positions."""
        parts = [item.candidates for item in self.items if item.candidates is not None]
        if not parts:
            return None
        starts = [0, *accumulate(int(item.scored.sum()) for item in self.items[:-1])]
        rows = [part.rows + start for part, start in zip(parts, starts, strict=True)]
        return Candidates(np.concatenate(rows), np.concatenate([part.tokens for part in parts]))

    def loss(self, chosen: Loss, log_probs: Tensor) -> Tensor:
        """The loss of its log-probabilities."""
        return chosen(log_probs, {name: each.to(log_probs.device) for name, each in self.fields.items()})

    def log_probs_of(self, log_probs: Tensor, model: str, adapter: str) -> dict[int, tinker.TensorData]:
        """The number of each datum → (length,) or (length, K): the log-probabilities where they are scored, else 0.
        Raises NotFiniteError, with these names, where they are not finite."""
        lengths, values = [item.length for item in self.items], log_probs.detach().float().cpu()
        if not values.isfinite().all():
            raise NotFiniteError(model, "log-probabilities", adapter)
        full = torch.zeros(sum(lengths), *values.shape[1:])
        full[self.scored_positions] = values
        parts = zip(self.items, full.split(lengths), strict=True)
        return {item.number: tinker.TensorData.from_numpy(part.numpy()) for item, part in parts}


def packs_of(items: Sequence[Item]) -> list[Pack]:
    """The items by length, in packs of at most PACK positions, each datum at least in one of its own."""
    packs = list[Pack]()
    for _, same in groupby(sorted(items, key=Item.form), Item.form):
        alike = list(same)
        by_length = groups([item.length for item in alike], len(alike), PACK)
        packs += [Pack([alike[n] for n in members]) for members in by_length]
    return packs
