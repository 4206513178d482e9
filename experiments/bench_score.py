"""`kshot bench score`: seconds per image from an encoded photograph to the exact posterior over N class names.

Against what it cannot do without (the prompts' own forward pass) and what else people do: a forward pass for each
label, with and without a cache of the prompt, and generating an answer. All score the same photographs with the same
adapter, in turn, called from one thread of this process; that scores agree is part of the result. Images are `new`
(decoded, and seen by the vision tower) or `known` (its features are there, and only the text model works). Loading and
tuning are nobody's time.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from experiments import bench_score_rows as rows
from experiments.bench import FOLDER, finish, in_turn, result
from experiments.bench_score_case import HUNDRED, Plan, Tuned, new_case, tune
from experiments.bench_score_contestants import compared, of_ours, of_peers
from experiments.bench_score_model import write
from experiments.bench_score_ours import Ours
from experiments.bench_score_stock import Stock
from experiments.bench_train_children import quiet
from kshot_errors import InputError, UnknownNameError
from vlm import labels, nano
from vlm.local.batch import length_of

FULL = Plan(classes=16, shots=4, batch=8, epochs=40, rounds=7, few=4, labels=200)
QUICK = Plan(classes=8, shots=2, batch=4, epochs=40, rounds=3, few=1, labels=10)
PACKAGES = ("numpy", "peft", "pillow", "tinker", "torch", "transformers")


def bench(
    root: Path | None, quick: bool, json_path: Path | None, tokenizer: str | None = None, device: str = "cpu"
) -> None:
    """Measure, print the table and write the JSON file (default results/bench/score.json). Raises as `run` does, and
    ResultsError."""
    finish(run(root, quick, tokenizer, device), json_path or FOLDER / "score.json")


def run(root: Path | None, quick: bool, tokenizer: str | None = None, device: str = "cpu") -> dict[str, Any]:
    """The record of `experiments.bench`. root: a folder of class folders; None: photographs made here, from a seed.

    tokenizer: a folder, model or hub id; with it the model has the nano's shapes, that vocabulary and random weights.
    Raises InputError for a device that cannot be; ModelError without that tokenizer; DatasetError; KshotError where the
    tuning fails, and as `compare`.
    """
    _check(device)
    quiet()
    plan = QUICK if quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder)
        model = nano.NAME if tokenizer is None else str(write(state / "model", tokenizer))
        return compare(tune(new_case(model, device, plan, root, state / "state")), plan)


def compare(tuned: Tuned, plan: Plan) -> dict[str, Any]:
    """The record of all contestants on this case. Raises KshotError where scores differ on a CPU."""
    ours, stock = Ours(tuned), Stock(tuned.case)
    stock.check_prompts(stock.inputs(tuned.images), ours.known)
    tries = {name: len(labels.build(prompt.choices, "constrained").tokens) for name, prompt in ours.prompts.items()}
    contestants = {**of_ours(ours, plan, tries[HUNDRED]), **of_peers(ours, stock, tuned.images, plan)}
    kept: dict[str, Any] = {}
    timed = in_turn({name: _keeping(kept, name, each.run) for name, each in contestants.items()}, plan.rounds)
    images = {name: each.images for name, each in contestants.items()}
    seconds = {name: [spent / images[name] for spent in each] for name, each in timed.items()}
    scores = compared(ours, stock, tuned.images, plan, kept)
    answers = {name: kept[name + rows.NEW] for name in (rows.OWN, rows.PEER)}
    facts = {"device": torch.cuda.get_device_name() if tuned.case.device == "cuda" else "cpu"}
    measured = [
        *rows.speeds(seconds, images, threads=torch.get_num_threads(), **facts),
        *rows.agreement(scores, exact=tuned.case.device == "cpu"),
        *rows.lengths([length_of(each) for each in ours.known], tries, answers),
        *rows.model(ours.vocabulary, tuned.steps),
    ]
    return result(measured, rows.ratios(seconds), PACKAGES)


def _keeping(kept: dict[str, Any], name: str, run: Callable[[], Any]) -> Callable[[], None]:
    """run, with its last result in `kept`."""

    def task() -> None:
        kept[name] = run()

    return task


def _check(device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise UnknownNameError("device", device, ["cpu", "cuda"])
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("this torch sees no CUDA device; leave --device out to measure on the CPU")
