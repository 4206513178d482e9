"""Sampling from a snapshot with a KV cache, and log-probabilities of prompts. Knows no clients and no classes.

Prompts of one length run together, so no prompt is padded; the samples of one prompt share its prefill.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tinker
import torch
from tinker import types
from torch import Tensor
from transformers import DynamicCache

from kshot_errors import RequestError
from vlm.local.batch import Batch, run
from vlm.local.engine import Engine, Snapshot

ROWS = 64  # prompts in one pass


@dataclass(frozen=True)
class Ask:
    """What is asked about one prompt, in the SDK's terms (see `tinker.SamplingClient.sample`)."""

    prompt: tinker.ModelInput
    params: types.SamplingParams
    num_samples: int = 1
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    targets: types.TensorData | None = None


@torch.no_grad()
def sample(engine: Engine, snapshot: Snapshot, asks: Sequence[Ask]) -> list[types.SampleResponse]:
    """The answers, in order. Same asks in the same order → the same answers where each has a seed or temperature 0."""
    for ask in asks:
        _check(engine, ask)
    engine.use(snapshot)
    done: dict[int, types.SampleResponse] = {}
    for members in groups([ask.prompt for ask in asks]):
        batch = engine.collate([asks[n].prompt for n in members])
        done.update(zip(members, _sample_group(engine, batch, [asks[n] for n in members]), strict=True))
    return [done[n] for n in range(len(asks))]


def _check(engine: Engine, ask: Ask) -> None:
    """Raise RequestError for what cannot be sampled."""
    p, vocabulary = ask.params, engine.model.stock.config.text_config.vocab_size
    ranges = {
        "num_samples": (ask.num_samples, 1, float("inf")),
        "max_tokens": (1 if p.max_tokens is None else p.max_tokens, 1, float("inf")),
        "temperature": (p.temperature, 0, float("inf")),
        "top_p": (p.top_p, 1e-9, 1),
        "top_k": (p.top_k, -1, float("inf")),
        "seed": (p.seed or 0, 0, 2**63 - 1),
        "topk_prompt_logprobs": (ask.topk_prompt_logprobs, 0, vocabulary),
    }
    for name, (value, low, high) in ranges.items():
        if not low <= value <= high:
            raise RequestError(f"{name} = {value} is out of range: it must be from {low} to {high}")
    if ask.targets is not None:
        engine.model.check_tokens((t for t in ask.targets.to_numpy(-1).flat if t != -1), "target_prompt_logprobs id")


def groups(prompts: Sequence[tinker.ModelInput]) -> list[list[int]]:
    """Prompts that can share a pass: of one shape (text lengths and images' sizes), at most ROWS at a time."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for number, prompt in enumerate(prompts):
        shape = tuple(
            c.expected_tokens if isinstance(c, types.ImageChunk) and c.expected_tokens else _text_length(c, number)
            for c in prompt.chunks
        )
        groups.setdefault(shape, []).append(number)
    return [members[i : i + ROWS] for members in groups.values() for i in range(0, len(members), ROWS)]


def _text_length(chunk: types.ModelInputChunk, number: int) -> object:
    # an image whose tokens the client did not count stays alone: its length is known after the tower only
    return chunk.length if isinstance(chunk, types.EncodedTextChunk) else ("alone", number)


def _sample_group(engine: Engine, batch: Batch, asks: Sequence[Ask]) -> list[types.SampleResponse]:
    cache: Any = DynamicCache(config=engine.model.stock.config.text_config)
    hidden = run(engine.model, batch.ids, batch.positions, batch.images, cache=cache)
    writers = [[_Writer(engine, ask, number) for number in range(ask.num_samples)] for ask in asks]
    repeats = torch.tensor([ask.num_samples for ask in asks], device=batch.ids.device)
    owners = torch.arange(len(asks), device=batch.ids.device).repeat_interleave(repeats)
    cache.reorder_cache(owners)
    logits, position = engine.head(hidden[:, -1])[owners], batch.next_position()[owners]
    _decode(engine, cache, logits, position, [writer for row in writers for writer in row], batch.ids.shape[1])
    return [
        types.SampleResponse(
            sequences=[writer.sequence() for writer in writers[row]],
            **_prompt_values(engine, batch.ids[row], hidden[row], batch.is_image[row], ask),
        )
        for row, ask in enumerate(asks)
    ]


class _Writer:
    """One sequence as it grows: picks its next token, and knows when to stop."""

    def __init__(self, engine: Engine, ask: Ask, number: int) -> None:
        self.params, self.tokens, self.log_probs = ask.params, list[int](), list[float]()
        self.reason: types.StopReason | None = None
        self._tokenizer = engine.model.tokenizer
        self._generator = _generator(ask.params.seed, number)
        self._strings, self._ids = _stops(ask.params.stop, self._tokenizer.eos_token_id)

    def take(self, logits: Tensor) -> int:
        """Pick a token from (vocabulary,) logits; its log-probability is the model's, before any filter."""
        token = pick(logits, self.params, self._generator)
        if self.reason is None:
            self.tokens.append(token)
            self.log_probs.append(float(logits.log_softmax(-1)[token]))
            if token in self._ids or (self._strings and self._text_stops()):
                self.reason = "stop"
            elif self.params.max_tokens is not None and len(self.tokens) >= self.params.max_tokens:
                self.reason = "length"
        return token

    def _text_stops(self) -> bool:
        text = self._tokenizer.decode(self.tokens)
        return any(stop in text for stop in self._strings)

    def sequence(self) -> types.SampledSequence:
        return types.SampledSequence(
            stop_reason=self.reason or "length",
            sequence_id=str(uuid.uuid4()),
            tokens_np=np.array(self.tokens, np.int32),
            logprobs_np=np.array(self.log_probs, np.float32),
        )


def _generator(seed: int | None, number: int) -> torch.Generator:
    """Of the sample `number` of a request: from both, so that neighbouring seeds share no sample."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]))
    return generator


def pick(logits: Tensor, params: types.SamplingParams, generator: torch.Generator) -> int:
    """A token from (vocabulary,) logits: the largest at temperature 0, else drawn after top-k and top-p."""
    if params.temperature == 0:
        return int(logits.argmax())
    ordered, tokens = (logits.float().cpu() / params.temperature).sort(descending=True, stable=True)
    if params.top_k > 0:
        ordered, tokens = ordered[: params.top_k], tokens[: params.top_k]
    probs = ordered.softmax(-1)
    if params.top_p < 1:  # the smallest set whose mass reaches top_p (Holtzman et al. 2020): always the first
        probs = probs * (probs.cumsum(-1) - probs < params.top_p)
    return int(tokens[torch.multinomial(probs, 1, generator=generator)])


def _stops(stop: str | Sequence[str] | Sequence[int] | None, end: int) -> tuple[list[str], set[int]]:
    """Stop strings and stop tokens. None stops at the tokenizer's end token, an empty list nowhere (SDK)."""
    given: list[str | int] = [end] if stop is None else [stop] if isinstance(stop, str) else list(stop)
    return [s for s in given if isinstance(s, str)], {s for s in given if isinstance(s, int)}


def _decode(
    engine: Engine, cache: Any, logits: Tensor, position: Tensor, writers: Sequence[_Writer], prompt_length: int
) -> None:
    """Let the writers write until each has stopped or the model's context is full."""
    for _ in range(engine.model.stock.config.text_config.max_position_embeddings - prompt_length):
        tokens = [writer.take(row) for writer, row in zip(writers, logits, strict=True)]
        if all(writer.reason for writer in writers):
            return
        ids = torch.tensor(tokens, device=logits.device)[:, None]
        hidden = run(engine.model, ids, position.expand(3, -1)[..., None], cache=cache)
        logits, position = engine.head(hidden[:, -1]), position + 1


def _prompt_values(engine: Engine, ids: Tensor, hidden: Tensor, is_image: Tensor, ask: Ask) -> dict[str, Any]:
    """The fields of SampleResponse about the prompt: hidden states (length, hidden) predict ids from position 1 on."""
    if not (ask.prompt_logprobs or ask.topk_prompt_logprobs or ask.targets is not None):
        return {}
    log_probs = engine.head(hidden[:-1]).log_softmax(-1).cpu()
    values: dict[str, Any] = {}
    if ask.prompt_logprobs:
        own = log_probs.gather(1, ids[1:, None].cpu())[:, 0].masked_fill(is_image[1:].cpu(), float("nan"))
        values["prompt_logprobs_np"] = np.concatenate([[np.nan], own.numpy()]).astype(np.float32)
    if ask.topk_prompt_logprobs:
        top = log_probs.topk(ask.topk_prompt_logprobs)
        rows = [list(zip(i, v, strict=True)) for i, v in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
        values["_topk_prompt_logprobs_list"] = [None, *rows]
    if ask.targets is not None:
        values["target_prompt_logprobs"] = _targets(log_probs, ask.targets)
    return values


def _targets(log_probs: Tensor, asked: types.TensorData) -> types.TensorData:
    ids = asked.to_torch(pad_value=-1)
    if ids.ndim != 2 or len(ids) != len(log_probs):
        shape = tuple(ids.shape)
        raise RequestError(f"target_prompt_logprobs must have {len(log_probs)} rows, one a position, got {shape}")
    values = log_probs.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, 0.0)
    return types.TensorData.from_torch(values)
