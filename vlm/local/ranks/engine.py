"""An engine over ranks, as the process with the clients sees it: it has no weights, and shares requests out.

A training request's data go to the ranks by length, each rank makes packs of its share, and one pass of every rank is
a round. Runs and snapshots live in the ranks; here are their numbers. Where a rank is lost, the engine starts again with
new ones, and what lived in the old ones says so.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from multiprocessing.connection import wait
from typing import Any, cast
from weakref import finalize

import numpy as np
import tinker
import torch
from tinker import types
from torch import Tensor

from kshot.checks import check_adam
from kshot.errors import EngineLostError, RequestError
from kshot.images import image_key
from vlm.label_trie import Trie
from vlm.local import scoring
from vlm.local.engine import (
    ROWS,
    Between,
    BetweenLayers,
    CustomLoss,
    Engine,
    Item,
    Pack,
    Snapshot,
    check_total,
    custom_output,
    length_of,
    output_of,
    packs_of,
    slopes_of,
)
from vlm.local.losses import loss
from vlm.local.model.load import Outline
from vlm.local.model.lora import Adapter, Layout, LoraSpec
from vlm.local.ranks import rank
from vlm.local.ranks.group import LIMIT, Ranks
from vlm.local.ranks.rank import ModelOptions
from vlm.local.training_run import MOMENTS, moments_of

log = logging.getLogger("kshot")

BASE = 0  # the number that stands for the base model alone, among snapshots


class Held:
    """Something that lives in the ranks, by its number there. name: for errors."""

    def __init__(self, engine: "RanksEngine", layout: Layout | None = None, name: str = "an adapter") -> None:
        self.engine, self.generation, self.number = engine, engine.generation, next(engine.numbers)
        self.held_layout, self.name = layout, name
        finalize(self, engine.dropped.append, self.number)

    def check(self) -> None:
        """Raise EngineLostError where its ranks are gone."""
        if not self.engine.holds(self.generation):
            raise EngineLostError(f"{self.name} is gone: {self.engine.lost}; go on from what was saved")


class RemoteSnapshot(Held):
    """In the place of `Factors`."""

    @property
    def spec(self) -> LoraSpec:
        return cast(Layout, self.held_layout).spec


class RemoteRun(Held):
    """In the place of `TrainingRun`."""

    def __init__(self, engine: "RanksEngine", layout: Layout) -> None:
        super().__init__(engine, layout)
        self._started = self._has_gradients = False

    @property
    def layout(self) -> Layout:
        return cast(Layout, self.held_layout)

    def call(self, name: str) -> None:
        self.name = name
        self.engine.command("call", self.number, name)

    @contextmanager
    def request(self) -> Iterator[None]:
        """As `TrainingRun.request`."""
        self.check()
        self._started = False
        try:
            yield
        except BaseException:
            if self._started and self.engine.holds(self.generation):
                self.clear_gradients()
            raise

    def started(self) -> None:
        """A pass with a gradient begins."""
        self._started = self._has_gradients = True

    def clear_gradients(self) -> None:
        self._has_gradients = False
        self.engine.command("clear", self.number)

    def step(self, params: types.AdamParams) -> float:
        """As `TrainingRun.step`."""
        self.check()
        if not self._has_gradients:
            raise RequestError("optim_step without gradients; call forward_backward first")
        check_adam(params)
        self._has_gradients = False
        norm: float = self.engine.command("optim_step", self.number, params)[0]
        return norm

    def weights(self) -> dict[str, Tensor]:
        """As `TrainingRun.weights`."""
        return self._named(self._fetch(optimizer=False)[0])

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """As `TrainingRun.optimizer_tensors`."""
        _, *flats = self._fetch(optimizer=True)
        if not flats:
            return {}
        *moments, step = flats
        tensors = {"step": step}
        for moment, flat in zip(MOMENTS, moments, strict=True):
            tensors |= {f"{name}.{moment}": tensor for name, tensor in self._named(flat).items()}
        return tensors

    def restore(self, adapter: Adapter, optimizer: Mapping[str, Tensor]) -> None:
        """As `TrainingRun.restore`."""
        self.check()
        moments = moments_of(adapter.layout, optimizer)
        flats = [*adapter.flats.values(), *(flat for each in moments.values() for flat in each.values())]
        self._has_gradients = False
        self.engine.command("restore", self.number, [*flats, optimizer["step"]] if moments else flats)

    def _fetch(self, *, optimizer: bool) -> list[Tensor]:
        self.check()
        flats: list[Tensor] = self.engine.command("fetch", self.number, optimizer)[0]
        return flats

    def _named(self, flat: Tensor) -> dict[str, Tensor]:
        flats = {device: flat for device in self.layout.sizes}
        return {name: piece.of(flats).clone() for name, piece in self.layout.pieces.items()}


class RemoteVision:
    """In the place of `Vision`: images are decoded where they are looked at."""

    def __init__(self, engine: "RanksEngine") -> None:
        self._engine, self.forwards, self._encoded = engine, 0, set[tuple[int, str]]()

    def prefetch(self, chunks: Sequence[types.ImageChunk]) -> None:
        """Nothing."""

    def uncached(self, chunks: Sequence[types.ImageChunk]) -> list[types.ImageChunk]:
        """Those that were not encoded by `features` yet."""
        generation = self._engine.generation
        return [chunk for chunk in chunks if (generation, image_key(chunk.data)) not in self._encoded]

    def features(self, chunks: Sequence[types.ImageChunk]) -> None:
        """Encode images, each on one rank."""
        if chunks and not self._engine.model.takes_images:
            _ = self._engine.model.rule  # raises
        self._engine.command("encode", each=[(each,) for each in dealt(chunks, self._engine.count)])
        self._encoded |= {(self._engine.generation, image_key(chunk.data)) for chunk in chunks}


class RanksEngine(Engine):
    """The engine of a model over ranks.

    generation: how often they were started. lost: why the last ones ended. numbers, dropped: of what lives in the
    ranks, and of what nobody has any more. on_loss: called, on a thread of its own, when ranks are lost.
    """

    def __init__(
        self,
        options: ModelOptions,
        devices: Sequence[str],
        threads: int,
        *,
        limit: float = LIMIT,
        ranks: Callable[[], Ranks] | None = None,
        on_loss: Callable[[], object] = lambda: None,
    ) -> None:
        self.devices, self.count, self.generation, self.lost = tuple(devices), len(devices), 0, ""
        self.numbers, self.dropped = count(BASE + 1), deque[int]()
        self.on_loss = on_loss
        self._start_ranks = ranks or (lambda: Ranks.start(rank.run, devices, threads, options, limit=limit))
        self._ranks: Ranks | None = None
        self._profiles = list[dict[str, float]]()
        self.vision: Any = RemoteVision(self)
        self.model: Any = Outline(options.name, torch.device(devices[0]), options.dtype, options.path, self._profiles)
        self.start_ranks()

    def start_ranks(self) -> None:
        """Start them, unless they are there. Raises what loading the model raises."""
        if self._ranks is not None and not self._ranks.lost:
            return
        ranks = self._start_ranks()
        self.generation += 1
        self.vision.forwards = 0
        try:
            ranks.answers()
        except BaseException:
            ranks.end()
            raise
        self._ranks = ranks
        threading.Thread(target=self._watch, args=(ranks,), name="kshot-ranks", daemon=True).start()

    def holds(self, generation: int) -> bool:
        """Whether the ranks of that generation are still there."""
        return generation == self.generation and self._ranks is not None and not self._ranks.lost

    def end(self) -> None:
        """Stop the ranks."""
        self.on_loss = lambda: None
        if self._ranks is not None:
            self._ranks.end()

    def command(self, method: str, *arguments: Any, each: Sequence[tuple[Any, ...]] | None = None) -> list[Any]:
        """What all ranks give. each: arguments of one rank alone, behind the common ones. Raises as `Ranks.call`."""
        self.start_ranks()
        ranks = cast(Ranks, self._ranks)
        try:
            if method != "drop" and self.dropped:
                self.command("drop", [self.dropped.popleft() for _ in range(len(self.dropped))])
            own, profiled = each or [()] * self.count, bool(self._profiles)
            answers = ranks.call([(method, (*arguments, *more), profiled) for more in own])
        except EngineLostError as error:
            self.lost = str(error)
            raise
        self.vision.forwards = sum(forwards for _, forwards, _ in answers)
        for profile in self._profiles:
            for part, seconds in answers[0][2].items():
                profile[part] += seconds
        return [value for value, _, _ in answers]

    def _watch(self, ranks: Ranks) -> None:
        """Until a rank dies."""
        if sentinels := ranks.sentinels:
            wait(sentinels)
            if self._ranks is ranks:
                self.on_loss()

    def start(self, spec: LoraSpec, seed: int) -> Any:
        run = RemoteRun(self, self.model.layout(spec))
        self.command("start", run.number, spec, seed)
        return run

    def snapshot(self, adapter: Adapter) -> Any:
        made = RemoteSnapshot(self, adapter.layout, adapter.name)
        (flat,) = adapter.flats.values()
        self.command("snapshot", made.number, adapter.layout.spec, flat, adapter.name)
        return made

    def snapshot_of(self, run: Any) -> Any:
        run.check()
        made = RemoteSnapshot(self, run.layout, run.name)
        self.command("snapshot_of", made.number, run.number)
        return made

    def forward_backward(
        self,
        run: Any,
        data: Sequence[tinker.Datum],
        loss_fn: str,
        config: Mapping[str, Any] | None,
        *,
        forward_only: bool = False,
        between: Between = lambda last: None,
        between_layers: BetweenLayers | None = None,
    ) -> types.ForwardBackwardOutput:
        chosen = loss(loss_fn, config)
        every = (forward_only or chosen.uses_sampled) and not chosen.closed
        items = self._items(data, chosen, every=every)
        rounds = self._rounds(items)
        total, outputs = 0.0, dict[int, tinker.TensorData]()
        with run.request():
            self._prepare(run, rounds, between)
            for number, _ in enumerate(rounds):
                method = "forward" if forward_only else "backward"
                if not forward_only:
                    run.started()
                for log_probs, value in self.command(method, run.number, number, (loss_fn, config), True):
                    outputs |= log_probs
                    total += value
                if number < len(rounds) - 1:
                    between(False)
            check_total(loss_fn, total)
            between(True)
        return output_of([outputs[item.number] for item in items], {"loss:sum": total})

    def forward_backward_custom(
        self,
        run: Any,
        data: Sequence[tinker.Datum],
        loss_fn: CustomLoss,
        *,
        between: Between = lambda last: None,
        between_layers: BetweenLayers | None = None,
    ) -> types.ForwardBackwardOutput:
        items = self._targets_alone(data)
        rounds, outputs = self._rounds(items), dict[int, tinker.TensorData]()
        with run.request():
            self._prepare(run, rounds, between)
            for number, _ in enumerate(rounds):
                for log_probs, _ in self.command("forward", run.number, number, None, False):
                    outputs |= log_probs
                between(False)
            log_probs_of = [outputs[item.number] for item in items]
            value, metrics, slopes = slopes_of(loss_fn, list(data), [each.to_torch() for each in log_probs_of])
            for number, packs in enumerate(rounds):
                run.started()
                own = [{item.number: slopes[item.number] for item in pack.items} if pack else {} for pack in packs]
                self.command("backward", run.number, number, each=[(each, True) for each in own])
                between(number == len(rounds) - 1)
        return custom_output(value, metrics, slopes, log_probs_of)

    def _rounds(self, items: Sequence[Item]) -> list[list[Pack | None]]:
        """The packs of each pass of all ranks."""
        shares = [packs_of(share) for share in shared(items, self.count)]
        passes = max(map(len, shares))
        return [[packs[n] if n < len(packs) else None for packs in shares] for n in range(passes)]

    def _prepare(self, run: RemoteRun, rounds: Sequence[Sequence[Pack | None]], between: Between) -> None:
        for number, packs in enumerate(rounds):  # a bad datum stops them all, before any pass
            self.command("prepare", run.number, number, number == 0, each=[(pack,) for pack in packs])
            between(False)


def shared(items: Sequence[Item], count: int) -> list[list[Item]]:
    """The items of each rank: the longest first, each to the rank that has the fewest positions so far."""
    shares, filled = [list[Item]() for _ in range(count)], [0] * count
    for item in sorted(items, key=lambda each: -each.length):
        least = filled.index(min(filled))
        shares[least].append(item)
        filled[least] += item.length
    return shares


def dealt(values: Sequence[Any], count: int) -> list[list[Any]]:
    """Every rank's part, in turn."""
    return [[*values[n::count]] for n in range(count)]


def _number(snapshot: Snapshot | RemoteSnapshot) -> int:
    """Of weights in the ranks. Raises EngineLostError."""
    if snapshot is None:
        return BASE
    held = cast(RemoteSnapshot, snapshot)
    held.check()
    return held.number


def _by_length(engine: RanksEngine, prompts: Sequence[tinker.ModelInput]) -> Iterator[list[int]]:
    """The numbers of prompts that are read in one command, those of about one length together."""
    order = sorted(range(len(prompts)), key=lambda n: length_of(prompts[n]))
    size = ROWS * engine.count
    return (order[n : n + size] for n in range(0, len(order), size))


def _rows(engine: RanksEngine, members: Sequence[int], method: str, *arguments: Any, of: Sequence[Any]) -> np.ndarray:
    """A row for each of the members, that one of the ranks gives."""
    shares = dealt(members, engine.count)
    parts = engine.command(method, *arguments, each=[([of[n] for n in share],) for share in shares])
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
        scores[members] = _rows(engine, members, "score", _number(snapshot), trie, of=prompts)
    return scores


@scoring.embed.register
def _(
    engine: RanksEngine, snapshot: Any, prompts: Sequence[tinker.ModelInput], *, tower: bool, hidden: bool
) -> np.ndarray:
    width = engine.model.width * (tower + hidden)
    features, wanted = np.empty((len(prompts), width), np.float32), {"tower": tower, "hidden": hidden}
    for members in _by_length(engine, prompts):
        features[members] = _rows(engine, members, "embed", _number(snapshot), wanted, of=prompts)
    return features
