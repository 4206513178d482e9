"""A rank's own process: the ordinary engine on one device, and the commands that it performs.

What a run gathers stays on its rank until the optimizer's step; there the flat gradient is summed over all ranks by one
all-reduce, and every rank makes the same step.
"""

import ctypes
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import tinker
import torch
import torch.distributed as dist
from tinker import types
from torch import Tensor

from kshot.errors import KshotError
from vlm.label_trie import Trie
from vlm.local import losses, scoring
from vlm.local.engine import Batch, Engine, Snapshot
from vlm.local.model.load import Model
from vlm.local.model.lora import Adapter, LoraSpec
from vlm.local.packs import Pack
from vlm.local.ranks.divide import DividedEngine, DividedModel, DividedVision, counted
from vlm.local.ranks.group import Seat, answer, in_a_line, send, serve
from vlm.local.sampling import sampler
from vlm.local.sampling.decoder import Decoder, TokenSequence
from vlm.local.sampling.grammar import Grammar
from vlm.local.sampling.sampler import SamplingRequest
from vlm.local.training_run import MOMENTS, TrainingRun
from vlm.local.vision import Vision

log = logging.getLogger("kshot")

DIVIDED = "divided"
BASE = 0  # the number that stands for the base model alone, among snapshots
WAIT = timedelta(minutes=10)  # for all of torchrun's processes to come
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
# Commands in which ranks with whole weights do not wait for each other, and that may fail on one of them alone: what
# they make is new, and whoever asked for gradients drops them.
ALONE = {"start", "snapshot", "snapshot_of", "prepare", "forward", "backward", "fetch"}
ALONE |= {"score", "embed", "encode", "prefill", "decode"}
Key = tuple[int, int]  # of a sample: its request's number, and its own in there


@dataclass(frozen=True)
class ModelOptions:
    """What each rank loads: see `vlm.local.registry.EngineRegistry`. shard: whether every rank holds the `whole`
    weights, or they are `divided`. whole_tower: whether the vision tower stays whole all the same, as it is trained."""

    name: str
    path: str
    dtype: torch.dtype | None = None
    shard: str = "whole"
    whole_tower: bool = False
    cache_bytes: int | None = None
    features: Path | None = None
    decoders: int | None = None
    pixel_bytes: int = 1 << 30

    @property
    def tower_is_whole(self) -> bool:
        """A folder of features has a digest of the tower's weights, so it needs them whole."""
        return self.shard != DIVIDED or self.whole_tower or self.features is not None


@dataclass(frozen=True)
class Token:
    """What a sample has got: see `vlm.local.sampling.decoder.TokenSequence`. error: of its grammar."""

    token: int
    log_prob: float
    top: tuple[Sequence[int], Sequence[float]] | None
    reason: types.StopReason | None
    error: str = ""

    @classmethod
    def last_of(cls, sequence: TokenSequence) -> "Token":
        top = sequence.tops[-1] if sequence.tops else None
        error = "" if sequence.walk is None else sequence.walk.error
        return cls(sequence.tokens[-1], sequence.log_probs[-1], top, sequence.reason, error)


def run(channel: Connection, seat: Seat, options: ModelOptions) -> bool:
    """The whole life of a rank; it ends with the process that started it. Says whether it was told to end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a terminal sends to all: the parent ends them
    if (parent := parent_process()) is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel, seat.store), daemon=True).start()
    torch.set_num_threads(seat.threads)
    if torch.device(seat.device).type == "cuda":
        torch.cuda.set_device(seat.device)
    workers = list[Worker]()
    begun = answer(lambda: workers.append(Worker(seat, options)), lambda: None)
    send(channel, begun)
    return bool(workers) and serve(channel, workers[0].perform, workers[0].settled)


def _end_with(sentinel: int, store: str) -> None:
    """End with the parent; what that has not removed goes too."""
    wait([sentinel])
    if store:
        shutil.rmtree(Path(store).parent, ignore_errors=True)
    os._exit(1)


def torchrun_store() -> Any:
    """What the processes of torchrun know of each other. It stays when torchrun starts them again, with what the last
    ones have said: each attempt has keys of its own."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=WAIT)
    return dist.PrefixStore(f"kshot/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _return_freed_memory() -> None:
    """Have glibc give what is freed back to the system from 1 MB on: gathered layers come and go, and it would keep
    the memory of as many as there are."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 20)


class Worker:
    """The engine of a rank, and what it holds for clients by the numbers that they have given. Methods are commands."""

    def __init__(self, seat: Seat, options: ModelOptions) -> None:
        self.seat = seat
        if seat.count > 1:
            backend = "cpu:gloo,cuda:nccl" if torch.device(seat.device).type == "cuda" else "gloo"
            store = dist.FileStore(seat.store, seat.count) if seat.store else torchrun_store()
            limit = timedelta(seconds=seat.limit)
            dist.init_process_group(backend, timeout=limit, store=store, rank=seat.rank, world_size=seat.count)
        self.engine = self._engine(options)
        self._runs, self._snapshots = dict[int, TrainingRun](), dict[int, Snapshot]()
        self._decoders, self._samples = dict[int, Decoder](), dict[int, dict[Key, TokenSequence]]()
        self._packs, self._batches = dict[int, Pack](), dict[int, Batch]()

    def _engine(self, options: ModelOptions) -> Engine:
        model: Model
        kind, looking = Engine, Vision
        if options.shard == DIVIDED:
            _return_freed_memory()
            arguments = options.name, self.seat.device, options.dtype, options.path
            model = DividedModel(*arguments, whole_tower=options.tower_is_whole)
            kind, looking = DividedEngine, Vision if options.tower_is_whole else DividedVision
        else:
            model = Model(options.name, self.seat.device, options.dtype, options.path)
        settings: dict[str, Any] = {"threads": options.decoders, "pixel_bytes": options.pixel_bytes}
        vision = looking(model, options.cache_bytes, options.features, **settings) if model.takes_images else None
        return kind(model, vision)

    def settled(self) -> None:
        """After each command."""
        if isinstance(self.engine.model, DividedModel):
            self.engine.model.turns.drain()

    def perform(self, method: str, arguments: Sequence[Any], profiled: bool) -> tuple[Any, int, dict[str, float]]:
        """The result of a command, images that the tower has seen so far, and seconds by part of the model."""
        if not profiled:
            return self._perform(method, arguments), self.engine.vision.forwards, {}
        with self.engine.model.profile() as seconds:
            return self._perform(method, arguments), self.engine.vision.forwards, seconds

    def _perform(self, method: str, arguments: Sequence[Any]) -> Any:
        """Raises KshotError also for what else fails where other requests may go on: out of memory, mostly."""
        try:
            return getattr(self, method)(*arguments)
        except (KshotError, torch.AcceleratorError):  # after the latter the device gives nothing but errors
            raise
        except Exception as error:
            if method not in ALONE or isinstance(self.engine.model, DividedModel):
                raise
            log.exception("a request failed")
            where = f"rank {self.seat.rank} of {self.seat.count} ({self.seat.device})"
            way_out = "where memory is short, send less at once"
            raise KshotError(f"{where} failed in {method!r}: {in_a_line(error)}; {way_out}") from error

    # What is held

    def facts(self) -> dict[str, Any]:
        """Of the model, once it is loaded."""
        model = self.engine.model
        about = {"dtype": model.dtype, "device": str(model.device), "threads": torch.get_num_threads()}
        return about | {"weights": counted.parts, "peak": counted.peak}

    def drop(self, numbers: Iterable[int]) -> None:
        """Forget runs, snapshots and decoders."""
        for number in numbers:
            for held in (self._runs, self._snapshots, self._decoders, self._samples):
                held.pop(number, None)

    def start(self, number: int, spec: LoraSpec, seed: int) -> None:
        self._runs[number] = self.engine.start(spec, seed)

    def call(self, number: int, name: str) -> None:
        self._runs[number].call(name)

    def snapshot_of(self, number: int, run: int) -> None:
        self._snapshots[number] = self.engine.snapshot_of(self._runs[run])

    def snapshot(self, number: int, spec: LoraSpec, flat: Tensor, name: str) -> None:
        self._snapshots[number] = self.engine.snapshot(self._adapter(spec, flat, name))

    def fetch(self, run: int, optimizer: bool) -> list[Tensor]:
        """The flat adapter, and Adam's moments and steps as far as there are any; of the first rank alone."""
        if self.seat.rank:
            return []
        flats = [*self._runs[run].adapter.flats.values()]
        if optimizer and (state := self._runs[run].optimizer_flats()):
            flats += [*state.values()]
        return [flat.detach().cpu() for flat in flats]

    def restore(self, run: int, flats: Sequence[Tensor]) -> None:
        """The other way. Without moments the optimizer begins anew."""
        held = self._runs[run]
        adapter = self._adapter(held.layout.spec, flats[0], held.adapter.name)
        (device,) = adapter.flats
        moments = {moment: {device: flat.to(device)} for moment, flat in zip(MOMENTS, flats[1:3], strict=False)}
        held.restore_flats(adapter, moments, flats[3] if moments else None)

    def _adapter(self, spec: LoraSpec, flat: Tensor, name: str) -> Adapter:
        layout = self.engine.model.layout(spec)
        (device,) = layout.sizes
        return Adapter(layout, {device: flat.to(device)}, name)

    # Training

    def prepare(self, run: int, number: int, first: bool, pack: Pack | None) -> None:
        """Take a pack of the request that begins with the `first`, and read it, unless the tower is trained: there all
        graphs would be in memory together."""
        if first:
            self._packs.clear()
            self._batches.clear()
        if pack is not None:
            self._packs[number] = pack
            factors = self._runs[run].factors
            if not factors.spec.in_tower:
                self._batches[number] = self.engine.batch(pack, factors)

    def forward(self, run: int, number: int, loss: Any, last: bool) -> Any:
        """Log-probabilities by datum and loss of a pack, without a gradient. loss: see `_value_of`."""
        with torch.no_grad():
            return self._pass(run, number, loss, last)

    def backward(self, run: int, number: int, loss: Any, last: bool) -> Any:
        """The same, and its gradient."""
        with torch.enable_grad():
            return self._pass(run, number, loss, last)

    def _pass(self, run: int, number: int, loss: Any, last: bool) -> tuple[dict[int, tinker.TensorData], float]:
        """last: whether the pack is not needed any more."""
        held, pack = self._runs[run], self._packs.get(number)
        if pack is None:
            return {}, 0.0
        batch = self._batches.get(number) or self.engine.batch(pack, held.factors)
        if last:
            self._packs.pop(number)
            self._batches.pop(number, None)
        log_probs, value = self.engine.computed(held, pack, batch, _value_of(loss, pack))
        return pack.log_probs_of(log_probs, self.engine.model.name, held.adapter.name), float(value.detach())

    def clear(self, run: int) -> None:
        self._runs[run].clear_gradients()

    def optim_step(self, run: int, params: types.AdamParams) -> float:
        """AdamW on the sum of all ranks' gradients."""
        held = self._runs[run]
        held.gather(dist.all_reduce if self.seat.count > 1 else lambda _: None)
        with self.engine.model.timed("optimizer"):
            return held.step(params)

    # Scores, features, samples

    def _weights(self, snapshot: int) -> Snapshot:
        """A number that is not here is an error: the base model's answers would look like the adapter's."""
        return None if snapshot == BASE else self._snapshots[snapshot]

    def score(self, snapshot: int, trie: Trie, prompts: Sequence[tinker.ModelInput]) -> np.ndarray:
        return scoring.score_tree(self.engine, self._weights(snapshot), prompts, trie)

    def embed(self, snapshot: int, wanted: Mapping[str, bool], prompts: Sequence[tinker.ModelInput]) -> np.ndarray:
        return scoring.embed(self.engine, self._weights(snapshot), prompts, **wanted)

    def encode(self, chunks: Sequence[types.ImageChunk]) -> None:
        """Put the features of images into the caches."""
        self.engine.vision.features(self.engine.vision.uncached(chunks))

    def prefill(
        self, number: int, snapshot: int, rows: int, requests: Mapping[int, tuple[SamplingRequest, Any]]
    ) -> dict[int, tuple[list[Token], dict[str, Any]]]:
        """Read prompts, by the number of their requests, each with its grammar's ends and text: the first token of each
        sample, and the fields about the prompt."""
        if number not in self._decoders:
            self._decoders[number] = sampler.decoder_of(self.engine, self._weights(snapshot), rows)
        decoder = self._decoders[number]
        samples = self._samples.setdefault(number, {})
        if not requests:
            return {}
        results = sampler.prefill(decoder, [self._with_grammar(*each) for each in requests.values()])
        found = dict[int, tuple[list[Token], dict[str, Any]]]()
        for name, result in zip(requests, results, strict=True):
            samples |= {(name, n): each for n, each in enumerate(result.sequences)}
            found[name] = [Token.last_of(each) for each in result.sequences], result.prompt_fields
        self._forget_ended(number)
        return found

    def decode(self, number: int, ended: Iterable[Key]) -> dict[Key, Token]:
        """A token for every sample of a decoder that has a row, and has not been `ended` elsewhere."""
        samples = self._samples[number]
        for key in ended:
            if (sequence := samples.pop(key, None)) is not None:
                sequence.end()
        grown = {id(each) for each in self._decoders[number].step()}
        found = {key: Token.last_of(each) for key, each in samples.items() if id(each) in grown}
        self._forget_ended(number)
        return found

    def _forget_ended(self, decoder: int) -> None:
        samples = self._samples[decoder].items()
        self._samples[decoder] = {key: each for key, each in samples if each.reason is None}

    def _with_grammar(self, request: SamplingRequest, grammar: tuple[Sequence[int], str] | None) -> SamplingRequest:
        if grammar is None:
            return request
        model = self.engine.model
        return replace(request, grammar=Grammar(model.tokenizer, model.vocabulary, *grammar))


def _value_of(loss: Any, pack: Pack) -> Any:
    """What makes a loss of a pack's log-probabilities: none, one by name and configuration, or a sum with slopes."""
    if loss is None:
        return lambda log_probs: log_probs.new_zeros(())
    if isinstance(loss, tuple):
        chosen = losses.loss(*loss)
        return lambda log_probs: pack.loss(chosen, log_probs)
    slope = torch.cat([loss[item.number] for item in pack.items])
    return lambda log_probs: (log_probs * slope.to(log_probs)).sum()
