"""The contestants of `kshot bench score` that are ours: scores in one pass, free answers, and two yardsticks.

The yardsticks are our own engine without what is measured: the prompts alone, which no exact score can do without, and
each label in a row of its own, the prompt before it computed again. Uses the public client but for those two.

TODO The contestants of `kshot bench score` that are not ours: stock transformers, the adapter merged by stock PEFT.

Three programs that people write: batched `generate`; a forward pass for each label, as evaluation harnesses make them;
and the labels scored on copies of the prompt's key-value cache, which is the best that stock parts give. All of them
run the head only where a label is predicted. Nothing of the engine is known here.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import tinker
import torch
from PIL import Image
from tinker import types
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from experiments.bench.flops import synchronize
from experiments.bench.score_case import ANSWER, LISTS, Tuned, answering
from experiments.bench.train_case import ASKED, Case
from experiments.bench.train_implementations import _known_warnings
from kshot.errors import KshotError
from vlm import label_trie
from vlm.inputs import ImageRule, model_input
from vlm.label_trie import Branch, branches
from vlm.local import scoring
from vlm.local.engine import PACK, groups, length_of
from vlm.local.model.attention import Causal
from vlm.local.vision import Vision
from vlm.models import source
from vlm.prompts import PREFILL, TURN, Prompt
from vlm.scoring import score_choices

# ---- The contestants of `kshot bench score` that are ours: scores in one pass, free answers, and two yardsticks.


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
        parted = label_trie.branches(choices)
        rows = [
            (model_input(*each.chunks, choice[: places[-1].place]), length_of(each), choice, places)
            for each in asked
            for choice, places in zip(choices, parted, strict=True)
        ]
        scores = np.empty(len(rows), np.float32)
        for members in groups([length_of(row[0]) for row in rows], scoring.ROWS, PACK):
            scores[members] = self._scored([rows[n] for n in members])
        return scores.reshape(len(asked), -1)

    def _scored(
        self, rows: Sequence[tuple[tinker.ModelInput, int, Sequence[int], Sequence[label_trie.Branch]]]
    ) -> Tensor:
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


# ---- The contestants of `kshot bench score` that are not ours: stock transformers, the adapter merged by stock PEFT.

Choices = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Inputs:
    """What the stock forward takes, and instead of pixels, where they are known, what the vision tower made of them."""

    tensors: Mapping[str, Tensor]
    features: Any = None

    def arguments(self) -> dict[str, Any]:
        """A new dictionary for every call: the stock methods write into it."""
        return {**self.tensors, **({"mm_encoder_outputs": {"image": self.features}} if self.features else {})}

    @property
    def length(self) -> int:
        return self.tensors["input_ids"].shape[1]


class Stock:
    """The stock model and processor of a case."""

    def __init__(self, case: Case) -> None:
        from transformers import AutoProcessor

        self._model, self._device = _merged(case), case.device
        self._processor: Any = AutoProcessor.from_pretrained(source(case.model))
        self._end = self._processor.tokenizer.convert_tokens_to_ids(TURN)

    def inputs(self, images: Sequence[bytes]) -> Inputs:
        """Of the questions about encoded images, padded on the left, as generating needs it."""
        opened = [Image.open(io.BytesIO(image)).convert("RGB") for image in images]
        texts = [ASKED + PREFILL] * len(images)
        made = self._processor(text=texts, images=opened, padding=True, padding_side="left", return_tensors="pt")
        return Inputs({name: tensor.to(self._device) for name, tensor in made.items()})

    @torch.no_grad()
    def known(self, inputs: Inputs) -> Inputs:
        """The same once the vision tower has seen the images."""
        tensors = dict(inputs.tensors)
        features = self._model.get_image_features(tensors.pop("pixel_values"), tensors["image_grid_thw"])
        return Inputs(tensors, features)

    @torch.no_grad()
    def generate(self, inputs: Inputs) -> list[list[int]]:
        """The tokens of each answer, greedily, to the end of the turn."""
        ends = {"eos_token_id": self._end, "pad_token_id": self._processor.tokenizer.pad_token_id}
        written = self._model.generate(**inputs.arguments(), **ends, do_sample=False, max_new_tokens=ANSWER)
        return [_cut(row, self._end) for row in written[:, inputs.length :].tolist()]

    @torch.no_grad()
    def label_by_label(self, inputs: Inputs, choices: Choices, count: int) -> tuple[list[float], list[float]]:
        """log P(label | prompt) for each of the first `count` labels, by a forward pass of its own; and of the same
        logits, at the cost of some dozen numbers, its log-probability among all labels. inputs: of one image."""
        likelihoods, constrained = list[float](), list[float]()
        for choice, parted in zip(choices[:count], branches(choices)[:count], strict=True):
            logits = self._logits(inputs, choice)
            likelihoods.append(float(_log_probs(logits, torch.tensor(choice, device=self._device)).sum()))
            constrained.append(sum(_among(logits[branch.place], choice[branch.place], branch) for branch in parted))
        return likelihoods, constrained

    @torch.no_grad()
    def prefix_cached(self, inputs: Inputs, choices: Choices) -> list[float]:
        """log P(label | prompt) for each label: the prompt once, then all labels on copies of its cache, in one batch.
        inputs: of one image."""
        inner, head = self._model.model, self._model.lm_head
        inner.rope_deltas = None  # it is of the last images that were seen
        prompt = inner(**inputs.arguments(), use_cache=True)
        cache, place = prompt.past_key_values, inputs.length + int(inner.rope_deltas)
        cache.batch_repeat_interleave(len(choices))
        ids, follow = ([torch.tensor(c, device=self._device) for c in each] for each in _shifted(choices))
        padded = pad_sequence(ids, batch_first=True)  # behind the labels, where nobody looks
        places = torch.arange(place, place + padded.shape[1], device=self._device).expand(3, *padded.shape)
        states = inner(input_ids=padded, past_key_values=cache, position_ids=places, use_cache=True).last_hidden_state
        rows = torch.arange(len(ids), device=self._device).repeat_interleave(
            torch.tensor([len(each) for each in ids], device=self._device)
        )
        used = torch.cat([states[n, : len(each)] for n, each in enumerate(ids)])
        later = _log_probs(head(used), torch.cat(follow))
        root = head(prompt.last_hidden_state[:, -1])[0]
        first = root[[choice[0] for choice in choices]] - root.logsumexp(-1)
        return first.index_add(0, rows, later).tolist()

    def check_prompts(self, inputs: Inputs, ours: Sequence[tinker.ModelInput]) -> None:
        """Raise KshotError unless these are the tokens that we ask with."""
        image = self._processor.image_token_id
        rows = zip(inputs.tensors["input_ids"], inputs.tensors["attention_mask"].bool(), ours, strict=True)
        if any(row[seen].tolist() != _ids(each, image) for row, seen, each in rows):
            raise KshotError("the processor of transformers makes other prompts than we do: nothing to compare")

    def _logits(self, inputs: Inputs, choice: Sequence[int]) -> Tensor:
        """(tokens, vocabulary) what predicts each token of a label."""
        given = inputs.arguments()
        more = torch.tensor([choice[:-1]], dtype=torch.long, device=self._device)
        for name, value in (("input_ids", more), ("attention_mask", 1 + 0 * more), ("mm_token_type_ids", 0 * more)):
            given[name] = torch.cat([given[name], value.to(given[name].dtype)], 1)
        return self._model(**given, logits_to_keep=len(choice)).logits[0]


def _merged(case: Case) -> Any:
    """The stock model with the adapter in its weights. A head that is tied to the embeddings gets weights of its own
    first: merging would change the embeddings too."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    stock: Any = AutoModelForImageTextToText.from_pretrained(source(case.model), dtype="auto")
    stock.lm_head.weight = torch.nn.Parameter(stock.lm_head.weight.detach().clone())
    stock.config.tie_word_embeddings = stock.config.text_config.tie_word_embeddings = False
    with _known_warnings():
        return PeftModel.from_pretrained(stock.to(case.device), str(case.adapter)).merge_and_unload().eval()


def _ids(asked: tinker.ModelInput, image: int) -> list[int]:
    """As the stock model takes them, with the id of an image at its positions."""
    chunks = ((c.tokens if isinstance(c, types.EncodedTextChunk) else [image] * c.length) for c in asked.chunks)
    return [token for each in chunks for token in each]


def _cut(tokens: Sequence[int], end: int) -> list[int]:
    """The answer's own tokens: the rows of a batch are filled up behind their ends."""
    return list(tokens[: tokens.index(end) + 1]) if end in tokens else list(tokens)


def _shifted(choices: Choices) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
    """What goes in behind the prompt, and what is to follow each of it."""
    return [choice[:-1] for choice in choices], [choice[1:] for choice in choices]


def _log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """(rows,) of a token in each row. Not by torch's log_softmax: on a CPU that is 2e-4 off for 150,000 tokens."""
    return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


def _among(logits: Tensor, token: int, branch: Branch) -> float:
    """The log-probability of a token among those that may stand there."""
    candidates = torch.tensor(branch.candidates, device=logits.device)
    return float(logits[token] - logits[candidates].float().logsumexp(-1))
