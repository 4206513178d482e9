"""The contestants of `kshot bench score` that are ours: scores in one pass, free answers, and two yardsticks.

The yardsticks are our own engine without what is measured: the prompts alone, which no exact score can do without, and
each label in a row of its own, the prompt before it computed again. Uses the public client but for those two.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import numpy as np
import tinker
import torch
from torch import Tensor

from experiments.bench_score_case import LISTS, Tuned, answering
from experiments.bench_train_flops import synchronize
from vlm import labels
from vlm.inputs import ImageRule, model_input
from vlm.local import scoring
from vlm.local.attention import Causal
from vlm.local.batch import groups, length_of
from vlm.local.engine import PACK
from vlm.local.vision import Vision
from vlm.prompts import Prompt
from vlm.scoring import score_choices


class Ours:
    """The sampling client of a tuned case, the questions about its photographs, and each list of names as a prompt."""

    def __init__(self, tuned: Tuned) -> None:
        self._tuned = tuned
        self._sampler = tuned.service.create_sampling_client(model_path=tuned.case.start).result()
        self._engine, self._factors = self._sampler._engine, self._sampler._snapshot.factors
        self._rule = ImageRule.from_pretrained(tuned.case.model)
        tokenizer = self._sampler.get_tokenizer()
        self.prompts = {name: Prompt(tokenizer, self._rule, names) for name, names in LISTS.items()}

    @cached_property
    def known(self) -> list[tinker.ModelInput]:
        """The questions, made once."""
        return self._questions()

    @property
    def vocabulary(self) -> int:
        """Tokens that the model knows."""
        return self._engine.model.vocabulary

    def new(self) -> list[tinker.ModelInput]:
        """The questions about photographs that nothing is known of: neither their headers nor their features."""
        self._rule.known.clear()
        self._engine.vision = Vision(self._engine.model)
        return self._questions()

    def score(self, asked: Sequence[tinker.ModelInput], names: str, method: str = "constrained") -> np.ndarray:
        """(photographs, names) log-probabilities."""
        return score_choices(self._sampler, asked, self.prompts[names].choices, method)

    def generate(self, asked: Sequence[tinker.ModelInput]) -> list[list[int]]:
        """The tokens of each free answer."""
        stops = next(iter(self.prompts.values())).stops
        return [a.sequences[0].tokens for a in self._sampler.sample_batch(asked, answering(stops))]

    @torch.no_grad()
    def prefill(self, asked: Sequence[tinker.ModelInput], extra: int) -> None:
        """The prompts' own pass up to the hidden state of their last position, in the groups that `score` makes of
        prompts with so many extra tokens: less than any answer needs."""
        self._engine.prefetch(asked)
        for members in groups([length_of(each) + extra for each in asked], scoring.ROWS, scoring.POSITIONS):
            batch = self._engine.collate([asked[n] for n in members], self._factors)
            attention = Causal(batch.rows, batch.ends)
            self._engine.model.text.hidden(batch.given, attention, self._factors, batch.ends)
        synchronize(self._tuned.case.device)

    @torch.no_grad()
    def label_by_label(self, asked: Sequence[tinker.ModelInput], names: str) -> np.ndarray:
        """(photographs, names) constrained log-probabilities, from a row for each of them. As kind as can be: a row
        ends where its last siblings part, and the head computes siblings alone."""
        choices = self.prompts[names].choices
        parted = labels.branches(choices)
        rows = [
            (model_input(*each.chunks, choice[: places[-1].place]), length_of(each), choice, places)
            for each in asked
            for choice, places in zip(choices, parted, strict=True)
        ]
        scores = np.empty(len(rows), np.float32)
        for members in groups([length_of(row[0]) for row in rows], scoring.ROWS, PACK):
            scores[members] = self._scored([rows[n] for n in members])
        return scores.reshape(len(asked), -1)

    def _scored(self, rows: Sequence[tuple[tinker.ModelInput, int, Sequence[int], Sequence[labels.Branch]]]) -> Tensor:
        """(rows,) from rows of an input, its prompt's length, the choice after it and where others part from that."""
        batch = self._engine.collate([row[0] for row in rows], self._factors)
        starts = [0, *accumulate(batch.rows.lengths[:-1])]
        steps = [
            (number, start + length - 1 + branch.place, choice[branch.place], branch.candidates)
            for number, (start, (_, length, choice, branches)) in enumerate(zip(starts, rows, strict=True))
            for branch in branches
        ]
        device = self._engine.model.device
        wanted = torch.tensor([place for _, place, _, _ in steps], device=device)
        text = self._engine.model.text
        hidden = text.hidden(batch.given, Causal(batch.rows, wanted), self._factors, wanted)
        tokens = sorted({token for *_, among in steps for token in among})
        column = {token: n for n, token in enumerate(tokens)}
        logits = text.logits(hidden, self._factors, torch.tensor(tokens)).cpu()
        allowed = torch.full_like(logits, -torch.inf)
        allowed[_pairs([[column[token] for token in among] for *_, among in steps])] = 0.0
        chosen = torch.tensor([column[token] for _, _, token, _ in steps])
        values = (logits + allowed).log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        return torch.zeros(len(rows)).index_add(0, torch.tensor([number for number, *_ in steps]), values)

    def _questions(self) -> list[tinker.ModelInput]:
        prompt = next(iter(self.prompts.values()))  # the question says no names
        return [prompt.question(image) for image in self._tuned.images]


def _pairs(columns: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Indices of (row, column) for the columns of each row."""
    rows = torch.arange(len(columns)).repeat_interleave(torch.tensor([len(each) for each in columns]))
    return rows, torch.tensor([column for each in columns for column in each])
