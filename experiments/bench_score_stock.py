"""The contestants of `kshot bench score` that are not ours: stock transformers, the adapter merged by stock PEFT.

Three programs that people write: batched `generate`; a forward pass for each label, as evaluation harnesses make them;
and the labels scored on copies of the prompt's key-value cache, which is the best that stock parts give. All of them
run the head only where a label is predicted. Nothing of the engine is known here.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tinker
import torch
from PIL import Image
from tinker import types
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from experiments.bench_score_case import ANSWER
from experiments.bench_train_case import ASKED, Case
from experiments.bench_train_peers import _known_warnings
from kshot_errors import KshotError
from vlm.labels import Branch, branches
from vlm.models import source
from vlm.prompts import PREFILL, TURN

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
