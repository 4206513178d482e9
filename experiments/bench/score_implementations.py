"""Who scores in `kshot bench score`: kshot's local service and stock transformers, each in a process of its own.

Ours: scores in one pass, free answers, and two yardsticks, both by the public client: the prompts alone, which no exact
score can do without, and each label in a sequence of its own, the prompt before it computed again.

Stock, with the adapter merged by stock PEFT, three programs that people write: batched `generate`; a forward pass for
each label, as evaluation harnesses make them; and the labels scored on copies of the prompt's key-value cache, which is
the best that stock parts give. All of them run the head only where a label is predicted.
"""

import io
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import tinker
import torch
from PIL import Image
from tinker import types
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from experiments.bench.case import BETAS, EPS, RANK, SEED, USER_TURN, Case, adapter_folder, stock_ids
from experiments.bench.harness import Timed, timed
from experiments.bench.train_implementations import stock_model, stock_processor
from kshot.errors import KshotError
from vlm import label_trie
from vlm.classifier import ANSWER, fit
from vlm.embedding import embed
from vlm.inputs import ImageRule, closed_datum
from vlm.prompts import END_OF_TURN, PREFILL, Prompt
from vlm.scoring import score_choices
from vlm.service import connect

ADAM = types.AdamParams(learning_rate=3e-3, beta1=BETAS[0], beta2=BETAS[1], eps=EPS)
STEPS, FIRST, ENDED = 20, 60, 0.95  # between two checks of the answers; before the first; share that must end

Choices = Sequence[Sequence[int]]  # the tokens of each label
Lists = tuple[tuple[str, tuple[str, ...]], ...]  # lists of class names, by name


@dataclass(frozen=True)
class Tuned:
    """The adapter that kshot's process tuned. start, adapter: as in a Case. steps: of the tuning. prompts: questions as
    stock token ids. choices: of each list of names."""

    start: str
    adapter: Path
    steps: int
    prompts: list[list[int]]
    choices: Mapping[str, Choices]


class Ours:
    """The local service with an adapter that ends its answers, and the questions about the case's photographs.

    An untrained model never ends its answer, so a short tuning comes first, outside all timing: on the photographs and
    the names of their folders, until nearly every answer ends. Raises KshotError where it does not learn to.
    """

    def __init__(self, case: Case, lists: Lists) -> None:
        self._case, self._rule, self._copies = case, ImageRule.from_pretrained(case.model), count(1)
        self._service: Any = connect("local", state_dir=case.state, device=case.device)
        self._client = self._service.create_lora_training_client(case.model, RANK, SEED).result()
        tokenizer = self._client.get_tokenizer()
        self._prompts = {name: Prompt(tokenizer, self._rule, names) for name, names in lists}
        self._start, self._steps = self._tune(case.prompt(tokenizer))
        self._sampler = self._service.create_sampling_client(model_path=self._start).result()

    def tuned(self) -> Tuned:
        """What the others need."""
        choices = {name: prompt.choices for name, prompt in self._prompts.items()}
        image = self._client.get_tokenizer().encode("<|image_pad|>")[0]
        prompts = [stock_ids(each, image) for each in self._cached]
        return Tuned(self._start, adapter_folder(self._case), self._steps, prompts, choices)

    def score(self, count: int | None, cached: bool, names: str, method: str = "constrained") -> np.ndarray:
        """(photographs, names) log-probabilities of the first `count` photographs (None: all)."""
        return score_choices(self._sampler, self._questions(count, cached), self._prompts[names].choices, method)

    def generate(self, cached: bool) -> list[list[int]]:
        """The tokens of each free answer."""
        return [
            a.sequences[0].tokens for a in _answers(self._sampler, self._questions(None, cached), self._prompt.stops)
        ]

    def prefill(self, cached: bool) -> None:
        """The prompts' own pass up to the hidden state of their last position: less than any answer needs."""
        embed(self._sampler, self._questions(None, cached), "hidden")

    def label_by_label(self, count: int, names: str) -> np.ndarray:
        """(photographs, names) constrained log-probabilities, from a sequence for each of them. At its best: a
        sequence ends where its last siblings part, and the head computes siblings alone."""
        choices, questions = self._prompts[names].choices, self._cached[:count]
        branches = label_trie.branches(choices)
        data = [closed_datum(q, *each) for q in questions for each in zip(choices, branches, strict=True)]
        outputs = self._client.forward(data, "closed_set").result().loss_fn_outputs
        scores = [output["logprobs"].to_numpy().sum() for output in outputs]
        return np.array(scores, np.float32).reshape(len(questions), -1)

    @cached_property
    def _cached(self) -> list[tinker.ModelInput]:
        """The questions about photographs whose features the tower has made."""
        return [self._prompt.question(image) for image in self._case.images]

    def _questions(self, count: int | None, cached: bool) -> list[tinker.ModelInput]:
        """cached False: about photographs of which no cache has the header or the features. They are the same with
        another tail: other bytes, so another key, and the same work."""
        if cached:
            return self._cached[:count]
        tail = b"\0" * next(self._copies)
        return [self._prompt.question(image + tail) for image in self._case.images[:count]]

    @property
    def _prompt(self) -> Prompt:
        return next(iter(self._prompts.values()))  # the question holds no names

    def _tune(self, prompt: Prompt) -> tuple[str, int]:
        """The saved adapter's path, and the steps that it took."""
        views = [[self._case.photographs[number] for number in batch] for batch in self._case.batches]
        for step in range(0, len(views), STEPS):
            deque(fit(self._client, views[step : step + STEPS], prompt, ADAM), maxlen=0)
            steps = min(step + STEPS, len(views))
            if steps >= FIRST:
                sampler = self._client.save_weights_and_get_sampling_client().result()
                reasons = [a.sequences[0].stop_reason for a in _answers(sampler, self._cached, prompt.stops)]
                if reasons.count("stop") >= ENDED * len(reasons):
                    return self._client.save_weights_for_sampler("tuned").result().path, steps
        raise KshotError(f"after {len(views)} steps fewer than {ENDED:.0%} of the answers end, so none can be timed")


def _answers(
    sampler: Any, prompts: Sequence[tinker.ModelInput], stops: Sequence[int]
) -> Sequence[types.SampleResponse]:
    """Greedily, to the end of the turn."""
    params = types.SamplingParams(max_tokens=ANSWER, temperature=0.0, stop=list(stops))
    answers: Sequence[types.SampleResponse] = sampler.sample_batch(prompts, params)
    return answers


class Stock:
    """The stock model and processor of a tuned case; choices as our tokenizer makes them.

    prompts: kshot's. few: photographs for what takes many times as long as one pass. Raises KshotError where the
    processor makes other prompts.
    """

    def __init__(self, case: Case, prompts: Sequence[Sequence[int]], few: int) -> None:
        self._case, self._processor = case, stock_processor(case)
        self._end = self._processor.tokenizer.convert_tokens_to_ids(END_OF_TURN)
        self._model = stock_model(case, merge=True)
        inputs = self._inputs(None)
        masks = inputs.tensors["attention_mask"].bool()
        rows = zip(inputs.tensors["input_ids"], masks, prompts, strict=True)
        if any(row[mask].tolist() != ids for row, mask, ids in rows):
            raise KshotError("the processor of transformers makes other prompts than we do: nothing to compare")
        self._cached = self._with_features(inputs)
        self._few = [self._with_features(self._inputs(1, start=n)) for n in range(few)]  # in batches of their own

    @torch.no_grad()
    def generate(self, cached: bool) -> list[list[int]]:
        """The tokens of each answer, greedily, to the end of the turn."""
        inputs = self._cached if cached else self._inputs(None)
        ends = {"eos_token_id": self._end, "pad_token_id": self._processor.tokenizer.pad_token_id}
        written = self._model.generate(**inputs.arguments(), **ends, do_sample=False, max_new_tokens=ANSWER)
        return [cut(row, self._end) for row in written[:, inputs.length :].tolist()]

    @torch.no_grad()
    def label_by_label(self, choices: Choices, count: int) -> tuple[list[float], list[float]]:
        """log P(label | the first photograph) for each of the first `count` labels, by a forward pass of its own; and
        of the same logits, at the cost of some dozen numbers, its log-probability among all labels."""
        inputs, likelihoods, constrained = self._inputs(1), list[float](), list[float]()
        for choice, branches in zip(choices[:count], label_trie.branches(choices)[:count], strict=True):
            logits = self._logits(inputs, choice)
            likelihoods.append(float(_log_probs(logits, torch.tensor(choice, device=logits.device)).sum()))
            constrained.append(sum(_among(logits[b.position], choice[b.position], b.candidates) for b in branches))
        return likelihoods, constrained

    @torch.no_grad()
    def prefix_cached(self, choices: Choices) -> list[list[float]]:
        """(few, labels) log P(label | photograph): each prompt once, then all labels on copies of its cache, in one
        batch."""
        return [self._prefix_cached(inputs, choices) for inputs in self._few]

    def _prefix_cached(self, inputs: "Inputs", choices: Choices) -> list[float]:
        inner, head, device = self._model.model, self._model.lm_head, self._case.device
        inner.rope_deltas = None  # it is of the images of the last call
        prompt = inner(**inputs.arguments(), use_cache=True)
        keys_values, start = prompt.past_key_values, inputs.length + int(inner.rope_deltas)
        keys_values.batch_repeat_interleave(len(choices))
        ids = [torch.tensor(choice[:-1], device=device) for choice in choices]
        following = torch.tensor([token for choice in choices for token in choice[1:]], device=device)
        padded = pad_sequence(ids, batch_first=True)  # behind the labels, where it is not read
        positions = torch.arange(start, start + padded.shape[1], device=device).expand(3, *padded.shape)
        made = inner(input_ids=padded, past_key_values=keys_values, position_ids=positions, use_cache=True)
        lengths = torch.tensor([len(each) for each in ids], device=device)
        rows = torch.arange(len(ids), device=device).repeat_interleave(lengths)
        states = torch.cat([made.last_hidden_state[n, : len(each)] for n, each in enumerate(ids)])
        root = head(prompt.last_hidden_state[:, -1])[0]
        first = root[[choice[0] for choice in choices]] - root.logsumexp(-1)
        return first.index_add(0, rows, _log_probs(head(states), following)).tolist()

    def _inputs(self, count: int | None, start: int = 0) -> "Inputs":
        """Of the questions about encoded images, padded on the left, as generating needs it."""
        images = self._case.images[start:][:count]
        opened = [Image.open(io.BytesIO(image)).convert("RGB") for image in images]
        texts = [USER_TURN + PREFILL] * len(images)
        made = self._processor(text=texts, images=opened, padding=True, padding_side="left", return_tensors="pt")
        return Inputs({name: tensor.to(self._case.device) for name, tensor in made.items()})

    @torch.no_grad()
    def _with_features(self, inputs: "Inputs") -> "Inputs":
        tensors = dict(inputs.tensors)
        features = self._model.get_image_features(tensors.pop("pixel_values"), tensors["image_grid_thw"])
        return Inputs(tensors, features)

    def _logits(self, inputs: "Inputs", choice: Sequence[int]) -> Tensor:
        """(tokens, vocabulary) what predicts each token of a label."""
        arguments = inputs.arguments()
        more = torch.tensor([choice[:-1]], dtype=torch.long, device=self._case.device)
        for name, value in (("input_ids", more), ("attention_mask", 1 + 0 * more), ("mm_token_type_ids", 0 * more)):
            arguments[name] = torch.cat([arguments[name], value.to(arguments[name].dtype)], 1)
        return self._model(**arguments, logits_to_keep=len(choice)).logits[0]


@dataclass(frozen=True)
class Inputs:
    """What the stock forward takes; `features` of the vision tower instead of pixels, where they are cached."""

    tensors: Mapping[str, Tensor]
    features: Any = None

    def arguments(self) -> dict[str, Any]:
        """A new dictionary for every call: the stock methods write into it."""
        return {**self.tensors, **({"mm_encoder_outputs": {"image": self.features}} if self.features else {})}

    @property
    def length(self) -> int:
        return self.tensors["input_ids"].shape[1]


def cut(tokens: Sequence[int], end: int) -> list[int]:
    """The answer's own tokens: the rows of a batch are filled up behind their ends."""
    return list(tokens[: tokens.index(end) + 1]) if end in tokens else list(tokens)


def _log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """(rows,) of a token in each row. Not by torch's log_softmax: on a CPU that is 2e-4 off for 150,000 tokens."""
    return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


def _among(logits: Tensor, token: int, candidates: Sequence[int]) -> float:
    """The log-probability of a token among those that may stand there."""
    return float(logits[token] - logits[list(candidates)].float().logsumexp(-1))


# In the processes


_implementation: list[Any] = []  # of this process


def begin(kind: type, *args: Any) -> None:
    """Load an implementation in this process."""
    _implementation[:] = [kind(*args)]


def call(method: str, *args: Any) -> Timed[Any]:
    """Call a method of what `begin` loaded here."""
    return timed(getattr(_implementation[0], method), *args)
