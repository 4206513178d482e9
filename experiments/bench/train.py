"""`kshot bench train`: examples a second from encoded photographs to optimizer steps, against stock programs.

Ours, a plain transformers + PEFT loop and TRL train the same adapter on the same photographs in the same batches with
the same optimizer, in turn, each in a process of its own; that their losses agree is part of the result. Loading is
nobody's time. The adapter is on attention and MLP of the text model: TRL refuses one on the output head.

TODO The rows and ratios of `kshot bench train`, and what must hold for them to mean anything. Runs nothing.
TODO The rounds of `kshot bench train`: every contestant trains in its own process, one after the other.

A round runs every contestant once, so that only one computes at any time and a slow minute of the machine meets all of
them. Each round loads anew, which is nobody's time. Knows no contestant.
"""

import gc
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch

from experiments.bench import train_case as cases
from experiments.bench.flops import dtype_of, needed, peak, synchronize
from experiments.bench.harness import FOLDER, Child, children, finish, quiet, result, row
from experiments.bench.train_case import SHAPES, Case, Contestant, Outcome, Plan, write
from experiments.bench.train_implementations import PLAIN, WITH_LOADERS, WORKERS, new_client, ours, peers, step_pairs
from experiments.terminal import err, out
from kshot.errors import InputError, KshotError, UnknownNameError
from vlm import nano
from vlm.service import connect

# ---- The rows and ratios of `kshot bench train`, and what must hold for them to mean anything. Runs nothing.

OURS = "ours"
COMPARED, TOLERANCE = 20, 1e-4  # steps whose losses must agree, and how closely in float32 on a CPU
Rows = list[dict[str, Any]]


def speeds(case: Case, plan: Plan, rates: Mapping[str, Sequence[float]]) -> Rows:
    """Examples a second of each contestant."""
    machine = {"device": torch.cuda.get_device_name() if case.device == "cuda" else "cpu"}
    facts = {"photographs": len(case.photographs), "batch": plan.batch, "epochs": plan.epochs}
    threads = {"threads": torch.get_num_threads()}
    return [row(name, rate, "examples/s", **facts, **machine, **threads) for name, rate in rates.items()]


def ratios(rates: Mapping[str, Sequence[float]], trl: Sequence[str]) -> dict[str, float]:
    """How many times faster we are; TRL counts with the faster of its settings."""
    speed = {name: median(each) for name, each in rates.items()}
    against_trl = {"vs_trl": speed[OURS] / max(speed[name] for name in trl)} if trl else {}
    return {**against_trl, "vs_plain": speed[OURS] / speed[PLAIN]}


def agreement(losses: Mapping[str, Sequence[float]], *, exact: bool) -> Rows:
    """How far each peer's losses are from ours. Raises KshotError where they must be `exact` and are not."""
    rows = []
    for name in losses.keys() - {OURS}:
        apart = [abs(a - b) for a, b in zip(losses[OURS], losses[name], strict=True)][:COMPARED]
        if exact and not max(apart) <= TOLERANCE:
            step = apart.index(max(apart)) + 1
            raise KshotError(
                f"at step {step} our loss is {max(apart):.2g} from that of {name!r}: not the same training"
            )
        rows.append(row(f"loss apart from {name}", [max(apart)], "nats", steps=len(apart)))
    return sorted(rows, key=lambda each: each["name"])


def tower(images: Sequence[int], epoch: int) -> Rows:
    """Images that went through our tower. Raises KshotError where it saw one again after the first epoch."""
    first, last = images[epoch - 1], images[-1]
    if last != first:
        raise KshotError(f"the tower encoded {last - first} images again after the first epoch; it should know them")
    return [
        row("images through our tower, first epoch", [first], "images"),
        row("images through our tower, all epochs", [last], "images"),
    ]


def use(work: Mapping[str, float], seconds: Sequence[float], peak: Sequence[float]) -> Rows:
    """Needed operations a second of ours, beside those of a large matrix product."""
    total = sum(work.values())
    return [
        row("needed operations", [total / each / 1e9 for each in seconds], "GFLOP/s", flops=dict(work)),
        row("a large matrix product, at best", [max(peak) / 1e9], "GFLOP/s", all=[each / 1e9 for each in peak]),
    ]


def memory(peaks: Mapping[str, int], device: str) -> Rows:
    """Peak memory of each contestant, but of those whose memory is that of several processes."""
    what = "of the process, libraries included" if device == "cpu" else "allocated on the device"
    alone = {name: peak for name, peak in peaks.items() if name not in WITH_LOADERS}
    return [row(f"peak memory, {name}", [peak / 1e6], "MB", what=what) for name, peak in alone.items()]


def steps(pairs: Sequence[tuple[float, float]]) -> Rows:
    """One of our steps with every image known, and what of it is the model."""
    whole, alone = ([1e3 * seconds for seconds in each] for each in zip(*pairs, strict=True))
    return [row("step", whole, "ms"), row("model alone", alone, "ms")]


def overhead(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """How many times longer a step takes than its model alone: the median over pairs, each measured within moments."""
    return {"step_over_model": median(step / alone for step, alone in pairs)}


# ---- The rounds of `kshot bench train`: every contestant trains in its own process, one after the other.

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


# ---- `kshot bench train`: examples a second from encoded photographs to optimizer steps, against stock programs.

NANO = "nano"
FULL = Plan(classes=16, shots=4, batch=8, epochs=10, rounds=3)
FULL_GPU = Plan(classes=16, shots=4, batch=32, epochs=20, rounds=2)  # the reference protocol's batch
QUICK = Plan(classes=4, shots=2, batch=4, epochs=10, rounds=2)
PAIRS = 30  # of steps with and without what is around the model, in every round: they differ by little
PACKAGES = ("accelerate", "numpy", "peft", "pillow", "tinker", "torch", "transformers")
NO_TRL = "TRL is not installed, so vs_trl is left out; install it with: pip install trl==1.16.0"


def bench(root: Path | None, quick: bool, json_path: Path | None, device: str = "cpu", shape: str = NANO) -> None:
    """Measure, print the table and write the JSON file (default results/bench/train.json). Raises as `run` does, and
    ResultsError."""
    measured = run(root, quick, device, shape)
    finish(measured, json_path or FOLDER / "train.json")
    for note in measured.get("notes", []):
        out.print(note, style="yellow", markup=False, highlight=False)


def run(root: Path | None, quick: bool, device: str = "cpu", shape: str = NANO) -> dict[str, Any]:
    """The record of `experiments.bench.harness`. root: a folder of class folders; None: photographs made here, from a seed.

    shape: nano, the model itself, or a real model's sizes with random weights, on a GPU.
    Raises InputError for a shape or device that cannot be; DatasetError; KshotError as `compare`.
    """
    _check(device, shape)
    quiet()
    plan = QUICK if quick else FULL_GPU if device == "cuda" else FULL
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder)
        model = nano.NAME if shape == NANO else str(write(state / "model", SHAPES[shape], device))
        workers = WORKERS[:1] if quick else WORKERS  # starting more takes a large share of a short training
        return compare(_case(model, device, plan, root, state), plan, {OURS: ours, **peers(workers)})


def compare(case: Case, plan: Plan, contestants: Mapping[str, Contestant]) -> dict[str, Any]:
    """The record of these contestants on this case; OURS and PLAIN are among them, TRL where it is installed.

    Raises KshotError as `record` does, and for a contestant that fails.
    """
    with children(contestants) as started:
        begun = _with_adapter(case)  # meanwhile they import
        answers = turns(started, contestants, begun, plan.rounds)
        pairs = started[OURS].ask(step_pairs, begun, PAIRS * plan.rounds)
    return record(begun, plan, answers, pairs)


def record(
    case: Case, plan: Plan, answers: Mapping[str, Sequence[Answer]], pairs: Sequence[tuple[float, float]]
) -> dict[str, Any]:
    """What follows from the contestants' answers and `step_pairs`. Raises KshotError where losses differ on a CPU."""
    seconds = {name: [answer.seconds for answer in each] for name, each in answers.items()}
    outcomes = {name: each[-1].outcome for name, each in answers.items()}
    rates = {name: [case.views / spent for spent in each] for name, each in seconds.items()}
    work, reached = needed(case), peak(case.device, dtype_of(case))
    measured = [
        *speeds(case, plan, rates),
        *agreement({name: outcome.losses for name, outcome in outcomes.items()}, exact=case.device == "cpu"),
        *tower(outcomes[OURS].tower or [], case.epoch),
        *steps(pairs),
        *use(work, seconds[OURS], reached),
        *memory({name: each[-1].peak for name, each in answers.items()}, case.device),
    ]
    trl = [name for name in answers if name not in (OURS, PLAIN)]
    share = {"gemm_share": sum(work.values()) / median(seconds[OURS]) / max(reached)}
    found = ratios(rates, trl) | overhead(pairs) | share
    packages = [*PACKAGES, *(["trl"] if trl else [])]
    return result(measured, found, packages) | ({} if trl else {"notes": [NO_TRL]})


def _check(device: str, shape: str) -> None:
    if shape not in (NANO, *SHAPES):
        raise UnknownNameError("shape", shape, [NANO, *SHAPES])
    if device not in ("cpu", "cuda"):
        raise UnknownNameError("device", device, ["cpu", "cuda"])
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("this torch sees no CUDA device; leave --device out to measure on the CPU")
    if device == "cpu" and shape != NANO:
        raise InputError(f"--shape {shape} would take hours on a CPU; give --device cuda")


def _case(model: str, device: str, plan: Plan, root: Path | None, state: Path) -> Case:
    rng = np.random.default_rng(0)
    classes, photographs = cases.made(plan, rng) if root is None else cases.found(root, plan, rng)
    return Case(model, device, classes, photographs, cases.order(plan, rng), state)


def _with_adapter(case: Case) -> Case:
    """The case with an adapter to begin with, which a client has saved."""
    service: Any = connect("local", state_dir=case.state, device=case.device)
    try:
        start = new_client(service, case).save_state("start").result().path
    finally:
        service.close()
    let_go(case.device)
    return replace(case, start=start, adapter=next(case.state.rglob("adapter_config.json")).parent)
