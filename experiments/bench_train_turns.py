"""The rounds of `kshot bench train`: every contestant trains in its own process, one after the other.

A round runs every contestant once, so that only one computes at any time and a slow minute of the machine meets all of
them. Each round loads anew, which is nobody's time. Knows no contestant.
"""

import gc
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import torch

from experiments.bench_train_case import Case, Contestant, Outcome
from experiments.bench_train_children import Child
from experiments.bench_train_flops import synchronize
from experiments.terminal import err

WARM_STEPS = 2


@dataclass(frozen=True)
class Answer:
    """What a child says of a training. peak: bytes, the most so far: on a CPU of the process, libraries included; on a
    GPU what torch had allocated there."""

    seconds: float
    outcome: Outcome
    peak: int


def turns(
    children: Mapping[str, Child], contestants: Mapping[str, Contestant], case: Case, rounds: int
) -> dict[str, list[Answer]]:
    """Each contestant's answers, one a round; a first short training does not count. Says how far it is: on a GPU
    loading takes minutes."""
    answers: dict[str, list[Answer]] = {name: [] for name in contestants}
    _warm(children, contestants, replace(case, batches=case.batches[:WARM_STEPS]))
    for number in range(rounds):
        for name, contestant in contestants.items():
            answer = children[name].ask(training, contestant, case)
            answers[name].append(answer)
            rate = case.views / answer.seconds
            err.print(f"round {number + 1} of {rounds}, {name}: {rate:.1f} examples/s", style="dim", highlight=False)
    return answers


def _warm(children: Mapping[str, Child], contestants: Mapping[str, Contestant], case: Case) -> None:
    """On a CPU all at once, as most of it is importing; a GPU has room for one."""
    begun = (children[name].begin(training, contestant, case) for name, contestant in contestants.items())
    for answer in list(begun) if case.device == "cpu" else begun:
        answer()


def training(contestant: Contestant, case: Case) -> Answer:
    """In this process: load the contestant, let it train, and let go of it."""
    seconds, outcome = _timed(contestant, case)
    let_go(case.device)
    return Answer(seconds, outcome, _peak(case.device))


def _timed(contestant: Contestant, case: Case) -> tuple[float, Outcome]:
    with contestant(case) as train:
        start = perf_counter()
        outcome = train()
        synchronize(case.device)
        return perf_counter() - start, outcome


def let_go(device: str) -> None:
    """Give back what nobody holds any more: the next contestant is not to miss it."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def _peak(device: str) -> int:
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    try:  # what getrusage says of a child begins at its parent's peak, this at nothing
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
