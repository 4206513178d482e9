"""What is asked of an engine over ranks beside training: scores, features, samples.

Prompts are shared out by length. Each sample is decoded on one rank, and its tokens are repeated here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import finalize

import numpy as np
import tinker
from tinker import types

from kshot.errors import EngineLostError, RequestError
from vlm.label_trie import Trie
from vlm.local import scoring
from vlm.local.engine import ROWS, Between, Snapshot, length_of
from vlm.local.ranks.engine import BASE, RanksEngine, dealt
from vlm.local.ranks.rank import Key, Token
from vlm.local.ranks.rank import ModelOptions as ModelOptions
from vlm.local.sampling import sampler
from vlm.local.sampling.decoder import TokenSequence
from vlm.local.sampling.sampler import SamplingRequest, SamplingResult


def _number(snapshot: Any) -> int:
    """Of weights in the ranks."""
    return BASE if snapshot is None else int(snapshot.number)


def _check(snapshot: Any) -> None:
    """Raise EngineLostError where the weights are gone; any ranks have the base model's."""
    if snapshot is not None:
        snapshot.check()


def _by_length(engine: RanksEngine, prompts: Sequence[tinker.ModelInput]) -> Iterator[list[int]]:
    """The numbers of prompts that are read in one command, those of about one length together."""
    order = sorted(range(len(prompts)), key=lambda n: length_of(prompts[n]))
    size = ROWS * engine.count
    return (order[n : n + size] for n in range(0, len(order), size))


def _rows(
    engine: RanksEngine, snapshot: Any, members: Sequence[int], method: str, wanted: Any, of: Sequence[Any]
) -> np.ndarray:
    """A row for each of the members, that one of the ranks gives."""
    shares = dealt(members, engine.count)
    each = [([of[n] for n in share],) for share in shares]
    parts = engine.command(method, _number(snapshot), wanted, each=each, check=partial(_check, snapshot))
    width = max(part.shape[1] for part in parts)
    rows = np.empty((len(of), width), np.float32)
    for share, part in zip(shares, parts, strict=True):
        rows[share] = part
    return rows[[*members]]


@scoring.score_tree.register
def _(
    engine: RanksEngine,
    snapshot: Any,
    prompts: Sequence[tinker.ModelInput],
    trie: Trie,
    *,
    between: Between = lambda last: None,
) -> np.ndarray:
    scores = np.empty((len(prompts), len(trie.edges)), np.float32)
    for number, members in enumerate(_by_length(engine, prompts)):
        if number:
            between(False)
        scores[members] = _rows(engine, snapshot, members, "score", trie, prompts)
    return scores


@scoring.embed.register
def _(
    engine: RanksEngine, snapshot: Any, prompts: Sequence[tinker.ModelInput], *, tower: bool, hidden: bool
) -> np.ndarray:
    width = engine.model.width * (tower + hidden)
    features, wanted = np.empty((len(prompts), width), np.float32), {"tower": tower, "hidden": hidden}
    for members in _by_length(engine, prompts):
        features[members] = _rows(engine, snapshot, members, "embed", wanted, prompts)
    return features


class RemoteSequence(TokenSequence):
    """A sample of a rank, as far as it is known here. error: of its grammar, which is followed there."""

    error = ""

    def take(self, token: Token) -> None:
        """Note what it has got."""
        self.tokens.append(token.token)
        self.log_probs.append(token.log_prob)
        if token.top is not None:
            self.tops.append(token.top)
        self.reason, self.error = self.reason or token.reason, token.error

    def sampled(self) -> types.SampledSequence:
        if self.error:
            raise RequestError(f"the schema cannot be followed any further: {self.error}; give a simpler one")
        return super().sampled()


class RanksDecoder:
    """In the place of `Decoder`; `rows` is of each rank. Where the ranks are lost, what runs is gone with them; after
    that it begins anew with those that are there then."""

    def __init__(self, engine: RanksEngine, snapshot: Any, rows: int) -> None:
        self.engine, self.snapshot, self.rows = engine, snapshot, rows * engine.count
        self._each, self._number = rows, next(engine.numbers)
        self._generation = 0  # of the ranks that have what runs
        finalize(self, engine.dropped.append, self._number)
        self._running: list[dict[Key, RemoteSequence]] = [{} for _ in range(engine.count)]
        self._ended: list[list[Key]] = [[] for _ in range(engine.count)]

    @property
    def active(self) -> int:
        return sum(self._active(rank) for rank in range(self.engine.count))

    @property
    def free_rows(self) -> int:
        return max(0, self.rows - self.active)

    def _active(self, rank: int) -> int:
        return sum(each.reason is None for each in self._running[rank].values())

    def prefill(self, requests: Sequence[SamplingRequest]) -> list[SamplingResult]:
        """As `vlm.local.sampling.sampler.prefill`: each prompt on the rank with the fewest samples."""
        self._begin()
        shares: list[dict[int, tuple[SamplingRequest, Any]]] = [{} for _ in range(self.engine.count)]
        load = [self._active(rank) for rank in range(self.engine.count)]
        made: list[tuple[int, int]] = []  # of each request: its rank, and its number there
        for request in requests:
            rank, number = load.index(min(load)), next(self.engine.numbers)
            load[rank] += request.num_samples
            grammar = None if request.grammar is None else request.grammar.source
            shares[rank][number] = replace(request, grammar=None), grammar
            made.append((rank, number))
        weights = _number(self.snapshot)
        try:
            answers = self._command("prefill", weights, self._each, each=[(s,) for s in shares])
        except BaseException:
            for (rank, number), request in zip(made, requests, strict=True):  # other ranks may have begun
                self._ended[rank] += [(number, n) for n in range(request.num_samples)]
            raise
        results = list[SamplingResult]()
        for (rank, number), request in zip(made, requests, strict=True):
            tokens, fields = answers[rank][number]
            results.append(self._result(rank, number, tokens, fields, request))
        return results

    def _begin(self) -> None:
        """With the ranks that are there, unless others have what runs."""
        if not self.active:
            self.engine.start_ranks()
            self._generation = self.engine.generation

    def _command(self, method: str, *arguments: Any, each: Sequence[tuple[Any, ...]]) -> list[Any]:
        return self.engine.command(method, self._number, *arguments, each=each, check=self._check)

    def _check(self) -> None:
        """Raise EngineLostError where the ranks with the weights or with what runs are gone."""
        _check(self.snapshot)
        if why := self.engine.why_lost(self._generation):
            raise EngineLostError(f"what was sampled is gone: {why}; ask again")

    def _result(
        self, rank: int, number: int, tokens: Sequence[Token], fields: dict[str, Any], request: SamplingRequest
    ) -> SamplingResult:
        model, sequences = self.engine.model, list[TokenSequence]()
        for n, token in enumerate(tokens):
            sequence = RemoteSequence(model.tokenizer, request.params, n, request.topk_sample_logprobs)
            sequence.take(token)
            self._running[rank][number, n] = sequence
            sequences.append(sequence)
        return SamplingResult(sequences, fields, model.name, self.snapshot.name if self.snapshot else "")

    def step(self) -> list[TokenSequence]:
        """As `Decoder.step`."""
        for running, ended in zip(self._running, self._ended, strict=True):
            over = [key for key, each in running.items() if each.reason is not None]
            ended += over
            for key in over:
                del running[key]
        if not any(self._running):
            return []
        told, self._ended = self._ended, [[] for _ in self._ended]
        grown = list[TokenSequence]()
        answers = self._command("decode", each=[(each,) for each in told])
        for running, tokens in zip(self._running, answers, strict=True):
            for key, token in tokens.items():
                if key in running:
                    running[key].take(token)
                    grown.append(running[key])
        return grown


@sampler.decoder_of.register
def _(engine: RanksEngine, snapshot: Snapshot, rows: int) -> Any:
    return RanksDecoder(engine, snapshot, rows)


@sampler.prefill.register
def _(decoder: RanksDecoder, requests: Sequence[SamplingRequest]) -> list[SamplingResult]:  # type: ignore[misc]
    return decoder.prefill(requests)
