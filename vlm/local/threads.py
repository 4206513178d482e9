"""How many threads a model computes with on a CPU: the fewest that are about as fast as any, as far as cores are free.

A small model's threads wait for each other longer than they compute. So a small model's training step is measured with
1, 2, 4, ... threads; a large one's is not: all are faster there. Threads that wait spin, which is fastest where each
has a core; beside other programs they then wait for one that has none, and a step takes several times as long. So there
are no more threads than cores that other programs leave.
"""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch

from kshot.errors import KshotError
from kshot.files import cache_folder, facts_digest, processor, write_file
from vlm.inputs import datum, model_input
from vlm.local.engine import Engine
from vlm.local.model.lora import LoraSpec

log = logging.getLogger("kshot")

FILE = "threads.json"  # in the cache: model's shape and machine → number
WITHIN = 1.05  # of the fastest
ROUNDS = 5  # in each of which every number has its turn
SECONDS = 2.0  # after which no other round begins: beside other programs it may take long
ROWS, LEAST, MOST = 8, 64, 256  # examples of a step, and its tokens: in small steps threads wait longest
WORK = 2e10  # multiplications and additions of a step: some tenths of a second on one core
OTHERS = 0.25  # cores that other programs may have used meanwhile, for a number to be kept
WINDOW = 0.25  # seconds over which it is counted what cores others use


def choose(engine: Engine, most: int) -> int:
    """The number for a model on a CPU, from 1 to `most`: kept in the cache by the model's shape and the machine, or
    measured now, which takes a second or so. `most` where the environment sets OMP_NUM_THREADS, for a model whose step
    of LEAST tokens takes more than WORK, and for one that cannot make a step."""
    shapes = [(name, [*each.shape]) for name, each in engine.model.stock.named_parameters()]
    numbers = sum(math.prod(shape) for _, shape in shapes)
    tokens = min(MOST, int(WORK / 6 / numbers))  # 2 forward, 4 backward
    if most == 1 or is_fixed() or tokens < LEAST:
        return most
    machine = {"processor": processor(), "cores": os.cpu_count(), "most": most, "torch": str(torch.__version__)}
    key = facts_digest({"shapes": shapes, "dtype": str(engine.model.dtype), "tokens": tokens, **machine})
    path = cache_folder() / FILE
    kept = _read(path)
    if key not in kept:
        before, begun, own = _busy(), time.perf_counter(), time.process_time()
        try:
            kept[key] = fewest(_step(engine, tokens), most)
        except KshotError:  # such as NaN weights, which is said where the model is used
            return most
        seconds = time.perf_counter() - begun
        others = _busy() - before - (time.process_time() - own)
        if others < OTHERS * seconds:  # beside other programs it holds for now alone
            _write(path, {**_read(path), key: kept[key]})
    return kept[key]


def is_fixed() -> bool:
    """Whether the environment says how many."""
    return "OMP_NUM_THREADS" in os.environ


def fewest(step: Callable[[], object], most: int, clock: Callable[[], float] = time.perf_counter) -> int:
    """The fewest threads with which a step takes at most WITHIN of the shortest time. Each number's time is its
    shortest of ROUNDS, after one that warms up. This thread has its own number again afterwards."""
    before, first = torch.get_num_threads(), clock()
    numbers = [*(1 << n for n in range((most - 1).bit_length())), most]
    times: dict[int, list[float]] = {number: [] for number in numbers}
    try:
        for done in range(1 + ROUNDS):
            if done > 1 and clock() - first > SECONDS:
                break
            for number in numbers:
                torch.set_num_threads(number)
                begun = clock()
                step()
                times[number].append(clock() - begun)
    finally:
        torch.set_num_threads(before)
    shortest = {number: min(each[1:]) for number, each in times.items()}
    return next(number for number in numbers if shortest[number] <= WITHIN * min(shortest.values()))


@dataclass
class FreeCores:
    """Lets torch have at most `most` threads, and no more than there are cores that other programs do not use. To be
    called on the thread that computes, now and then; it counts anew after WINDOW seconds at the earliest."""

    most: int
    clock: Callable[[], float] = time.perf_counter
    cores: int = os.cpu_count() or 1

    def __post_init__(self) -> None:
        self._last = self._now()

    def __call__(self) -> None:
        if self.clock() - self._last[0] < WINDOW:
            return
        (begun, busy, own), self._last = self._last, self._now()
        others = (self._last[1] - busy - (self._last[2] - own)) / (self._last[0] - begun)
        number = max(1, min(self.most, round(self.cores - others)))
        if number != torch.get_num_threads():
            torch.set_num_threads(number)

    def _now(self) -> tuple[float, float, float]:
        """Seconds of the clock, of all cores that computed, and of those that this process did."""
        return self.clock(), _busy(), time.process_time()


def _step(engine: Engine, tokens: int) -> Callable[[], object]:
    """A training step on ROWS texts, of a run of its own."""
    model = engine.model
    token = next(each for each in range(model.vocabulary) if each not in model.placeholders)
    row: Sequence[int] = [token] * (tokens // ROWS)
    run = engine.start(LoraSpec(8), 0)
    return partial(engine.forward_backward, run, [datum(model_input(row[:-1]), row[-1:])] * ROWS, "cross_entropy", None)


def _busy() -> float:
    """Seconds that all cores have computed, since the machine began."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def _read(path: Path) -> dict[str, int]:
    try:
        kept = json.loads(path.read_bytes())
        return {key: number for key, number in kept.items() if isinstance(number, int) and number > 0}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        log.warning("%s cannot be read (%s); threads are measured again", path, error)
        return {}


def _write(path: Path, kept: dict[str, int]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(kept, indent=1).encode())
    except OSError as error:
        log.warning("%s cannot be written (%s); threads are measured again next time", path, error)
