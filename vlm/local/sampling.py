"""Sampling from a snapshot with a KV cache, and log-probabilities of prompts. Knows no clients and no classes.

Prompts are packed, whatever their lengths; the samples of one prompt share its prefill. Sequences that have stopped
leave the batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tinker
import torch
from tinker import types
from torch import Tensor

from kshot_errors import RequestError
from vlm.local.attention import Cache, Filling, Next
from vlm.local.batch import groups, length_of
from vlm.local.engine import LOGITS, Engine, Snapshot
from vlm.local.text import Positions
from vlm.local.writing import Writer, advance

ROWS = 64  # sequences in one pass
POSITIONS = 1 << 15  # of prompts in one pass
ROOM = 64  # positions by which the cache grows


@dataclass(frozen=True)
class Ask:
    """What is asked about one prompt, in the SDK's terms (see `tinker.SamplingClient.sample`)."""

    prompt: tinker.ModelInput
    params: types.SamplingParams
    num_samples: int = 1
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    targets: types.TensorData | None = None

    @property
    def about_prompt(self) -> bool:
        """Whether the prompt's own log-probabilities are asked for."""
        return bool(self.prompt_logprobs or self.topk_prompt_logprobs or self.targets is not None)


@torch.no_grad()
def sample(engine: Engine, snapshot: Snapshot, asks: Sequence[Ask]) -> list[types.SampleResponse]:
    """The answers, in order. Same asks in the same order → the same answers where each has a seed or temperature 0."""
    for ask in asks:
        _check(engine, ask)
    done: dict[int, types.SampleResponse] = {}
    for members in groups([length_of(ask.prompt) for ask in asks], ROWS, POSITIONS):
        answers = _sample_together(engine, snapshot, [asks[n] for n in members])
        done |= zip(members, answers, strict=True)
    return [done[n] for n in range(len(asks))]


def _check(engine: Engine, ask: Ask) -> None:
    """Raise RequestError for what cannot be sampled."""
    p, vocabulary = ask.params, engine.model.vocabulary
    ranges = {
        "num_samples": (ask.num_samples, 1, float("inf")),
        "max_tokens": (1 if p.max_tokens is None else p.max_tokens, 1, float("inf")),
        "temperature": (p.temperature, 0, float("inf")),
        "top_p": (p.top_p, 1e-9, 1),
        "top_k": (p.top_k, -1, float("inf")),
        "seed": (p.seed or 0, 0, 2**63 - 1),
        "topk_prompt_logprobs": (ask.topk_prompt_logprobs, 0, vocabulary),
    }
    if (isinstance(p.stop, str) and not p.stop) or (isinstance(p.stop, list) and "" in p.stop):
        raise RequestError("stop holds an empty text, which stands everywhere; leave it out")
    for name, (value, low, high) in ranges.items():
        if not low <= value <= high:
            raise RequestError(f"{name} = {value} is out of range: it must be from {low} to {high}")
    if ask.targets is not None:
        engine.model.check_tokens(
            [int(t) for t in ask.targets.to_numpy(-1).flat if t != -1], "target_prompt_logprobs id"
        )


def _sample_together(engine: Engine, snapshot: Snapshot, asks: Sequence[Ask]) -> list[types.SampleResponse]:
    batch = engine.collate([ask.prompt for ask in asks], snapshot.factors)
    cache = Cache(batch.rows.lengths, engine.model.device)
    about = any(ask.about_prompt for ask in asks)
    wanted = None if about else batch.ends
    hidden = engine.model.text.hidden(batch.given, Filling(cache, batch.rows, wanted), snapshot.factors, wanted)
    prompt = hidden.split(batch.rows.lengths) if about else [hidden[row : row + 1] for row in range(len(asks))]
    writers = [
        [Writer(engine.model.tokenizer, ask.params, number) for number in range(ask.num_samples)] for ask in asks
    ]
    logits = engine.model.text.logits(torch.cat([states[-1:] for states in prompt]), snapshot.factors)
    _decode(engine, snapshot, cache, logits, batch.next_place, writers)
    ids, is_image = (t.split(batch.rows.lengths) for t in (batch.given.ids, batch.is_image()))
    return [
        types.SampleResponse(
            sequences=[writer.sequence() for writer in writers[row]],
            **(_prompt_values(engine, snapshot, ids[row], prompt[row], is_image[row], ask) if ask.about_prompt else {}),
        )
        for row, ask in enumerate(asks)
    ]


def _decode(
    engine: Engine, snapshot: Snapshot, cache: Cache, logits: Tensor, place: Tensor, writers: Sequence[Sequence[Writer]]
) -> None:
    """Let the writers of each prompt write, ROWS at a time. logits, place: of each prompt."""
    owners = [(row, writer) for row, each in enumerate(writers) for writer in each]
    for start in range(0, len(owners), ROWS):
        rows, going = zip(*owners[start : start + ROWS], strict=True)
        chosen = torch.tensor(rows, device=place.device)
        _write(engine, snapshot, cache.chosen(chosen, ROOM), logits[chosen.to(logits.device)], place[chosen], going)


def _write(
    engine: Engine, snapshot: Snapshot, cache: Cache, logits: Tensor, place: Tensor, going: Sequence[Writer]
) -> None:
    """Until each has stopped or the model's context is full: one row of the cache, logits and place each."""
    lengths = cache.lengths.tolist()
    while True:
        tokens = advance(going, logits)
        kept = [n for n, w in enumerate(going) if w.reason is None and lengths[n] < engine.model.context]
        if not kept:
            return
        if len(kept) < len(going) or max(lengths[n] for n in kept) >= cache.capacity:
            chosen = torch.tensor(kept, device=place.device)
            cache, place = cache.chosen(chosen, ROOM), place[chosen]
        going, lengths = [going[n] for n in kept], [lengths[n] + 1 for n in kept]
        given = Positions(torch.tensor([tokens[n] for n in kept], device=place.device), place.expand(3, -1))
        hidden = engine.model.text.hidden(given, Next(cache), snapshot.factors)
        logits = engine.model.text.logits(hidden, snapshot.factors)
        cache.lengths, place = cache.lengths + 1, place + 1


def _prompt_values(
    engine: Engine, snapshot: Snapshot, ids: Tensor, hidden: Tensor, is_image: Tensor, ask: Ask
) -> dict[str, Any]:
    """The fields of SampleResponse about the prompt: hidden states (length, hidden) predict ids from position 1 on."""
    targets = None if ask.targets is None else _wanted(ask.targets, len(ids) - 1)
    parts = list(_scored(engine, snapshot, hidden[:-1], ids[1:], ask.topk_prompt_logprobs, targets))
    own, tops, chosen = ([value for part in parts for value in part[n]] for n in range(3))
    values: dict[str, Any] = {}
    if ask.prompt_logprobs:
        unscored = np.concatenate([[True], is_image[1:].cpu().numpy()])
        values["prompt_logprobs_np"] = np.where(unscored, np.nan, [np.nan, *own]).astype(np.float32)
    if ask.topk_prompt_logprobs:
        values["_topk_prompt_logprobs_list"] = [None, *tops]
    if targets is not None:
        values["target_prompt_logprobs"] = types.TensorData.from_numpy(
            np.array(chosen, np.float32).reshape(targets.shape)
        )
    return values


def _scored(
    engine: Engine, snapshot: Snapshot, hidden: Tensor, ids: Tensor, top: int, targets: Tensor | None
) -> Iterator[tuple[list[float], list[list[tuple[int, float]]], list[list[float]]]]:
    """For each position its own token's log-probability, its `top` likeliest tokens and its targets', in parts that
    keep the logits within LOGITS numbers."""
    step = max(1, LOGITS // engine.model.vocabulary)
    for start in range(0, len(hidden), step):
        end = start + step
        logits = engine.model.text.logits(hidden[start:end], snapshot.factors)
        # not log_softmax: of 150,000 float32 logits that may be 2e-4 off on a CPU, and logsumexp is not
        log_probs = logits - logits.logsumexp(-1, keepdim=True)
        own = log_probs.gather(1, ids[start:end, None].to(log_probs.device))[:, 0]
        best = log_probs.topk(top)
        tops = [list(zip(i, v, strict=True)) for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
        asked = (torch.zeros(len(hidden), 0, dtype=torch.long) if targets is None else targets)[start:end]
        asked = asked.to(log_probs.device)
        chosen = log_probs.gather(1, asked.clamp(min=0)).masked_fill(asked < 0, 0.0)
        yield own.tolist(), tops, chosen.tolist()


def _wanted(asked: types.TensorData, rows: int) -> Tensor:
    """The ids to score, (rows, any number), -1 where none is. Raises RequestError for another number of rows."""
    ids = asked.to_torch(pad_value=-1)
    if ids.ndim != 2 or len(ids) != rows:
        raise RequestError(f"target_prompt_logprobs must have {rows} rows, one a position, got {tuple(ids.shape)}")
    return ids
