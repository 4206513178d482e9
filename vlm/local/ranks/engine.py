"""An engine over ranks, as the process with the clients sees it: it has no weights, and shares requests out.

A training request's data go to the ranks by length, each rank makes packs of its share, and one pass of every rank is
a round. Runs and snapshots live in the ranks; here are their numbers. Where a rank is lost, the engine starts again
with new ones, and what lived in the old ones says so.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import count
from multiprocessing.connection import wait
from typing import Any, cast
from weakref import finalize, ref

import tinker
import torch
from tinker import types
from torch import Tensor

from kshot.checks import check_adam
from kshot.errors import EngineLostError, KshotError, RequestError
from kshot.images import image_key
from vlm.local.engine import (
    Between,
    BetweenLayers,
    CustomLoss,
    Engine,
    check_total,
    custom_output,
    output_of,
    slopes_of,
)
from vlm.local.losses import loss
from vlm.local.model import placement
from vlm.local.model.load import Outline
from vlm.local.model.lora import Adapter, Layout, LoraSpec
from vlm.local.packs import Item, Pack, packs_of
from vlm.local.ranks import rank
from vlm.local.ranks.group import LIMIT, Ranks
from vlm.local.ranks.rank import BASE, DIVIDED, ModelOptions
from vlm.local.training_run import MOMENTS, moments_of

log = logging.getLogger("kshot")


def dealt(values: Sequence[Any], count: int) -> list[list[Any]]:
    """Every rank's part, in turn."""
    return [[*values[n::count]] for n in range(count)]


class Held:
    """Something that lives in the ranks, by its number there. name: for errors."""

    def __init__(self, engine: "RanksEngine", layout: Layout | None = None, name: str = "an adapter") -> None:
        engine.start_ranks()
        self.engine, self.generation, self.number = engine, engine.generation, next(engine.numbers)
        self.held_layout, self.name = layout, name
        finalize(self, engine.dropped.append, self.number)

    @property
    def lost(self) -> str:
        """Why it is gone; "" as long as its ranks are there."""
        return self.engine.why_lost(self.generation)

    def check(self) -> None:
        """Raise EngineLostError where its ranks are gone."""
        if why := self.lost:
            raise EngineLostError(f"{self.name} is gone: {why}; go on from what was saved")

    def command(self, method: str, *arguments: Any, each: Sequence[tuple[Any, ...]] | None = None) -> list[Any]:
        """A command about it. Raises as `RanksEngine.command` and `check`."""
        return self.engine.command(method, self.number, *arguments, each=each, check=self.check)


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
        self.command("call", name)

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
        self.command("clear")

    def step(self, params: types.AdamParams) -> float:
        """As `TrainingRun.step`."""
        self.check()
        if not self._has_gradients:
            raise RequestError("optim_step without gradients; call forward_backward first")
        check_adam(params)
        self._has_gradients = False
        norm: float = self.command("optim_step", params)[0]
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
        self.command("restore", [*flats, optimizer["step"]] if moments else flats)

    def _fetch(self, *, optimizer: bool) -> list[Tensor]:
        self.check()
        flats: list[Tensor] = self.command("fetch", optimizer)[0]
        return flats

    def _named(self, flat: Tensor) -> dict[str, Tensor]:
        flats = dict.fromkeys(self.layout.sizes, flat)
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


def shard_of(model: Outline, devices: Sequence[str]) -> str:
    """How the weights are held by ranks on these devices: `whole` where they fit each beside what else is needed."""
    free = min(placement.free_bytes(torch.device(each)) for each in devices)
    beside = placement.reserve(model.stock, model.layout(LoraSpec()).run_bytes(model.dtype), model.dtype)
    on_cpu = sum(each == "cpu" for each in devices)
    weights = sum(each.numel() * each.element_size() for each in model.stock.parameters())
    return "whole" if weights + beside <= free // max(1, on_cpu) else DIVIDED


class RanksEngine(Engine):
    """The engine of a model over ranks.

    generation: how often they were started. lost: why the last ones ended. numbers, dropped: of what lives in the
    ranks, and of what nobody has any more. ranks: has them, where they are not started here. on_loss: called, on a
    thread of its own, when ranks are lost.
    """

    def __init__(
        self,
        options: ModelOptions,
        devices: Sequence[str],
        threads: int,
        *,
        limit: float = LIMIT,
        ranks: Callable[[ModelOptions], Ranks] | None = None,
        on_loss: Callable[[], object] = lambda: None,
    ) -> None:
        self.devices, self.count, self.generation, self.lost = tuple(devices), len(devices), 0, ""
        self.numbers, self.dropped = count(BASE + 1), deque[int]()
        self.on_loss, self._lock = on_loss, threading.RLock()
        self._ranks: Ranks | None = None
        self._profiles = list[dict[str, float]]()
        self.vision: Any = RemoteVision(self)
        self.model: Any = Outline(options.name, torch.device(devices[0]), options.dtype, options.path, self._profiles)
        if options.shard == "auto":
            options = replace(options, shard=shard_of(self.model, devices))
        self.shard = options.shard
        self._whole_tower = options.tower_is_whole
        start = ranks or (lambda options: Ranks.start(rank.run, devices, threads, options, limit=limit))
        self._start_ranks = partial(start, options)
        self.start_ranks()

    def start_ranks(self) -> None:
        """Start them, unless they are there. Raises what loading the model raises."""
        with self._lock:
            if self._ranks is None or self._ranks.lost:
                self._start()

    def _start(self) -> None:
        ranks = self._start_ranks()
        self.generation += 1
        self.vision.forwards = 0
        try:
            ranks.answers()
        except BaseException:
            ranks.end()
            raise
        self._ranks = ranks
        if processes := [each.process for each in ranks.members if each.process is not None]:
            threading.Thread(target=_watch, args=(ref(self), processes), name="kshot-ranks", daemon=True).start()

    @property
    def processes(self) -> list[int]:
        """The ids of the ranks' processes, as far as they were started here."""
        members = self._ranks.members if self._ranks else []
        return [each.process.pid for each in members if each.process is not None]

    def holds(self, generation: int) -> bool:
        """Whether the ranks of that generation are still there."""
        return generation == self.generation and self._ranks is not None and not self._ranks.lost

    def why_lost(self, generation: int) -> str:
        """Why they are not; "" where they are."""
        return "" if self.holds(generation) else self.lost or "the engine was started again"

    def end(self) -> None:
        """Stop the ranks."""
        self.on_loss = lambda: None
        if self._ranks is not None:
            self._ranks.end()

    def command(
        self,
        method: str,
        *arguments: Any,
        each: Sequence[tuple[Any, ...]] | None = None,
        check: Callable[[], object] | None = None,
    ) -> list[Any]:
        """What all ranks give. each: arguments of one rank alone, behind the common ones. check: raises where what the
        command is about has gone with its ranks; without it, new ranks do as well. Raises as `Ranks.call`."""
        with self._lock:  # of schedulers: others may create runs while this one works
            if check is not None:
                check()
            self.start_ranks()
            return self._command(cast(Ranks, self._ranks), method, arguments, each)

    def _command(
        self, ranks: Ranks, method: str, arguments: Sequence[Any], each: Sequence[tuple[Any, ...]] | None
    ) -> list[Any]:
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

    def note_dead(self, processes: Sequence[Any]) -> None:
        """A rank has died, of those with these processes; whatever was asked of them meanwhile is answered first."""
        with self._lock:
            ranks = self._ranks
            if ranks is None or ranks.members[0].process not in processes:
                return
            ranks.note_dead()
            self.lost = ranks.lost
        with suppress(KshotError):  # the service is being closed, or the next request says what is wrong
            self.on_loss()

    def start(self, spec: LoraSpec, seed: int) -> Any:
        layout = self.model.layout(spec)
        if spec.in_tower and not self._whole_tower:
            raise RequestError(
                f"a LoRA on the vision tower cannot be trained here: the tower of {self.model.name} is divided over "
                f"{self.count} processes; serve it with --train-vision"
            )
        run = RemoteRun(self, layout)
        run.command("start", spec, seed)
        return run

    def snapshot(self, adapter: Adapter) -> Any:
        made = RemoteSnapshot(self, adapter.layout, adapter.name)
        (flat,) = adapter.flats.values()
        made.command("snapshot", adapter.layout.spec, flat, adapter.name)
        return made

    def snapshot_of(self, run: Any) -> Any:
        run.check()
        made = RemoteSnapshot(self, run.layout, run.name)
        self.command("snapshot_of", made.number, run.number, check=run.check)
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
                for log_probs, value in run.command(method, number, (loss_fn, config), True):
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
                for log_probs, _ in run.command("forward", number, None, False):
                    outputs |= log_probs
                between(False)
            log_probs_of = [outputs[item.number] for item in items]
            value, metrics, slopes = slopes_of(loss_fn, list(data), [each.to_torch() for each in log_probs_of])
            for number, packs in enumerate(rounds):
                run.started()
                own = [{item.number: slopes[item.number] for item in pack.items} if pack else {} for pack in packs]
                run.command("backward", number, each=[(each, True) for each in own])
                between(number == len(rounds) - 1)
        return custom_output(value, metrics, slopes, log_probs_of)

    def _rounds(self, items: Sequence[Item]) -> list[list[Pack | None]]:
        """The packs of each pass of all ranks."""
        shares = [packs_of(share) for share in shared(items, self.count)]
        passes = max(map(len, shares))
        return [[packs[n] if n < len(packs) else None for packs in shares] for n in range(passes)]

    def _prepare(self, run: RemoteRun, rounds: Sequence[Sequence[Pack | None]], between: Between) -> None:
        for number, packs in enumerate(rounds):  # a bad datum stops them all, before any pass
            run.command("prepare", number, number == 0, each=[(pack,) for pack in packs])
            between(False)


def _watch(engine: "ref[RanksEngine]", processes: Sequence[Any]) -> None:
    """Until a rank dies. The engine is not held: one that nobody has any more ends, and its ranks with it."""
    wait([each.sentinel for each in processes])
    if (held := engine()) is not None:
        held.note_dead(processes)


def shared(items: Sequence[Item], count: int) -> list[list[Item]]:
    """The items of each rank: the longest first, each to the rank that has the fewest positions so far."""
    shares, filled = [list[Item]() for _ in range(count)], [0] * count
    for item in sorted(items, key=lambda each: -each.length):
        least = filled.index(min(filled))
        shares[least].append(item)
        filled[least] += item.length
    return shares
