"""`kshot bench train`: examples a second from encoded photographs to optimizer steps, against stock programs.

Ours, a plain transformers + PEFT loop and TRL train the same adapter on the same photographs in the same batches with
the same optimizer, in turn, each in a process of its own; that their losses agree is part of the result. Loading is
nobody's time. The adapter is on attention and MLP of the text model: TRL refuses one on the output head.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from experiments import bench_train_case as cases
from experiments import bench_train_rows as rows
from experiments.bench import FOLDER, finish, result
from experiments.bench_train_case import Case, Contestant, Plan
from experiments.bench_train_children import children, quiet
from experiments.bench_train_flops import dtype_of, needed, peak
from experiments.bench_train_ours import new_client, ours, step_pairs
from experiments.bench_train_peers import PLAIN, WORKERS, peers
from experiments.bench_train_rows import OURS
from experiments.bench_train_shapes import SHAPES, write
from experiments.bench_train_turns import Answer, let_go, turns
from experiments.terminal import out
from kshot_errors import InputError, UnknownNameError
from vlm import nano
from vlm.service import connect

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
    """The record of `experiments.bench`. root: a folder of class folders; None: photographs made here, from a seed.

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
        *rows.speeds(case, plan, rates),
        *rows.agreement({name: outcome.losses for name, outcome in outcomes.items()}, exact=case.device == "cpu"),
        *rows.tower(outcomes[OURS].tower or [], case.epoch),
        *rows.steps(pairs),
        *rows.use(work, seconds[OURS], reached),
        *rows.memory({name: each[-1].peak for name, each in answers.items()}, case.device),
    ]
    trl = [name for name in answers if name not in (OURS, PLAIN)]
    share = {"gemm_share": sum(work.values()) / median(seconds[OURS]) / max(reached)}
    ratios = rows.ratios(rates, trl) | rows.overhead(pairs) | share
    packages = [*PACKAGES, *(["trl"] if trl else [])]
    return result(measured, ratios, packages) | ({} if trl else {"notes": [NO_TRL]})


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
