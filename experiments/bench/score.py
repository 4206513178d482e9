"""`kshot bench score`: seconds per image from an encoded photograph to the exact posterior over N class names.

Against what it cannot do without (the prompts' own forward pass) and what else people do: a forward pass for each
label, with and without a cache of the prompt, and generating an answer. All score the same photographs with the same
adapter, in turn; that scores agree is part of the result. Images are `new` (decoded, and encoded by the vision tower)
or `known` (their features are cached, and only the text model works). Loading and tuning are not timed.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from data.benchmarks.layouts import CALTECH101, CARS
from data.dataset import clean_name
from data.preparation import prepare
from experiments.bench import case as cases
from experiments.bench.case import Case, new_case, write_vocabulary
from experiments.bench.harness import (
    Process,
    Rows,
    check_agreement,
    check_device,
    device_facts,
    in_turn,
    median_ratio,
    processes,
    quiet,
    record,
    row,
)
from experiments.bench.score_implementations import Ours, Stock, Tuned, begin, call
from vlm import label_trie, nano
from vlm.models import source


@dataclass(frozen=True)
class Plan(cases.Plan):
    """How much is measured. few: photographs for what takes many times as long as one pass; the first one alone gets a
    stock program's own forward pass for each label, and that for so many `labels` of a list. epochs: of the tuning, at
    most."""

    few: int = 1
    labels: int = 1


FULL = Plan(classes=16, shots=4, batch=8, epochs=40, rounds=7, few=4, labels=200)
QUICK = Plan(classes=8, shots=2, batch=4, epochs=40, rounds=3, few=1, labels=10)
PACKAGES = ("numpy", "peft", "pillow", "tinker", "torch", "transformers")
TOLERANCE = 1e-4  # nats, in float32 on a CPU

UNUSED = ("BACKGROUND_Google", "Faces_easy")  # by CoOp's protocol
HUNDRED, CAR_NAMES = "100 names", "196 car names"
LISTS = {
    HUNDRED: tuple(clean_name(name) for name in CALTECH101 if name not in UNUSED),
    CAR_NAMES: tuple(map(clean_name, CARS)),
}

PREFILL = "prefill"
HUNDRED_SCORED, CARS_SCORED = f"constrained, {HUNDRED}", f"constrained, {CAR_NAMES}"
LIKELIHOOD = f"likelihood, {HUNDRED}"
LABELS, STOCK_LABELS = "label by label (kshot)", "label by label (transformers)"
PREFIX_CACHED = "prefix-cached (transformers)"
GENERATE, STOCK_GENERATE = "generate (kshot)", "generate (transformers)"
NEW, CACHED = ", images new", ", images known"  # whether the vision tower has encoded them before
RATIOS = {
    "constrained_over_prefill": (HUNDRED_SCORED + NEW, PREFILL + NEW),
    "cars_over_prefill": (CARS_SCORED + NEW, PREFILL + NEW),
    "constrained_over_text_prefill": (HUNDRED_SCORED + CACHED, PREFILL + CACHED),
    "cars_over_text_prefill": (CARS_SCORED + CACHED, PREFILL + CACHED),
    "label_by_label_over_constrained": (LABELS + CACHED, HUNDRED_SCORED + CACHED),
    "stock_label_by_label_over_constrained": (STOCK_LABELS + NEW, HUNDRED_SCORED + NEW),
    "prefix_cached_over_constrained": (PREFIX_CACHED + CACHED, HUNDRED_SCORED + CACHED),
    "generate_over_constrained": (STOCK_GENERATE + NEW, HUNDRED_SCORED + NEW),
    "generate_known_over_constrained_known": (STOCK_GENERATE + CACHED, HUNDRED_SCORED + CACHED),
    "own_generate_over_constrained": (GENERATE + NEW, HUNDRED_SCORED + NEW),
}


def measure(root: Path | None, quick: bool, tokenizer: str | None = None, device: str = "cpu") -> dict[str, Any]:
    """The record of `experiments.bench.harness`. root: a folder of class folders; None: photographs made here, from a
    seed.

    tokenizer: a folder, model or hub id; with it the model has the nano's shapes, that vocabulary and random weights.
    Raises InputError for a device that cannot be; ModelError without that tokenizer; DatasetError; KshotError where the
    tuning fails, or where scores differ on a CPU.
    """
    check_device(device)
    quiet()
    plan = QUICK if quick else FULL
    with tempfile.TemporaryDirectory() as folder, processes(["kshot", "transformers"]) as started:
        state = Path(folder)
        model = nano.NAME if tokenizer is None else str(write_vocabulary(state / "model", tokenizer))
        case = prepared_case(model, device, plan, root, state / "state")
        ours, stock = started["kshot"], started["transformers"]
        ours.run(begin, Ours, case, tuple(LISTS.items()))
        tuned = ours.run(call, "tuned").value
        stock.run(begin, Stock, replace(case, adapter=tuned.adapter), tuned.prompts, plan.few)
        tasks, images = _tasks(ours, stock, tuned, plan)
        spent, results = in_turn(tasks, plan.rounds)
        seconds = {name: [each / images[name] for each in values] for name, values in spent.items()}
        cars = stock.run(call, "label_by_label", tuned.choices[CAR_NAMES], plan.labels).value[1]
        facts = device_facts(device)
        rows = [
            *(row(n, each, "s/image", images=images[n], **facts) for n, each in seconds.items()),
            *agreement(_compared(results, cars), exact=device == "cpu"),
            *_lengths(tuned, {name: results[name + NEW] for name in (GENERATE, STOCK_GENERATE)}),
            row("vocabulary", [_vocabulary(case)], "tokens"),
            row("tuning before", [tuned.steps], "steps"),
        ]
    return record(rows, ratios(seconds), PACKAGES)


def prepared_case(model: str, device: str, plan: Plan, root: Path | None, state: Path) -> Case:
    """The case with its photographs as models get them. Raises as `new_case` does, and ImageError."""
    case = new_case(model, device, plan, root, state)
    return replace(case, photographs=tuple((prepare(image), label) for image, label in case.photographs))


def _tasks(
    ours: Process, stock: Process, tuned: Tuned, plan: Plan
) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """What runs in turn, and the photographs that each scores in a round: below one where it scores a part of the
    labels."""
    everything, choices = float(len(tuned.prompts)), tuned.choices[HUNDRED]
    labels = min(plan.labels, len(choices))
    calls: dict[str, tuple[Process, float, tuple[Any, ...]]] = {}
    for kind, cached in ((NEW, False), (CACHED, True)):
        calls[PREFILL + kind] = ours, everything, ("prefill", cached)
        calls[HUNDRED_SCORED + kind] = ours, everything, ("score", None, cached, HUNDRED)
        calls[CARS_SCORED + kind] = ours, everything, ("score", None, cached, CAR_NAMES)
        calls[GENERATE + kind] = ours, everything, ("generate", cached)
    calls[LIKELIHOOD + CACHED] = ours, plan.few, ("score", plan.few, True, HUNDRED, "likelihood")
    calls[LABELS + CACHED] = ours, plan.few, ("label_by_label", plan.few, HUNDRED)
    calls[STOCK_GENERATE + NEW] = stock, everything, ("generate", False)
    calls[STOCK_GENERATE + CACHED] = stock, everything, ("generate", True)
    calls[PREFIX_CACHED + CACHED] = stock, plan.few, ("prefix_cached", choices)
    calls[STOCK_LABELS + NEW] = stock, labels / len(choices), ("label_by_label", choices, labels)
    tasks: dict[str, Callable[[], Any]] = {
        n: partial(process.run, call, *args) for n, (process, _, args) in calls.items()
    }
    return tasks, {name: images for name, (_, images, _) in calls.items()}


def ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """From the seconds per photograph of each round."""
    return {name: median_ratio(seconds[over], seconds[under]) for name, (over, under) in RATIOS.items()}


def _compared(results: Mapping[str, Any], cars: Sequence[float]) -> dict[str, tuple[np.ndarray, Any]]:
    """Our scores beside those of whoever has scored the same; cars: the stock ones of the first photograph."""
    constrained, likelihood = results[HUNDRED_SCORED + NEW], results[LIKELIHOOD + CACHED]
    alone, among = results[STOCK_LABELS + NEW]
    return {
        "constrained: images known": (constrained, results[HUNDRED_SCORED + CACHED]),
        "constrained: kshot, label by label": (constrained, results[LABELS + CACHED]),
        "constrained: transformers, label by label": (constrained, [among]),
        f"{CAR_NAMES}: transformers, label by label": (results[CARS_SCORED + NEW], [cars]),
        "likelihood: transformers, prefix-cached": (likelihood, results[PREFIX_CACHED + CACHED]),
        "likelihood: transformers, label by label": (likelihood, [alone]),
    }


def agreement(scores: Mapping[str, tuple[Any, Any]], *, exact: bool) -> Rows:
    """How far two (photographs, names) scores are apart, on the first photographs and names, which both have. Raises
    KshotError where they must be `exact` and are not: speed bought with errors."""
    rows = []
    for name, (ours, others) in scores.items():
        theirs = np.asarray(others, np.float64)
        apart = np.abs(np.asarray(ours, np.float64)[: theirs.shape[0], : theirs.shape[1]] - theirs).max()
        if exact:
            check_agreement(f"{name}: scores", apart, TOLERANCE)
        rows.append(row(f"apart, {name}", [float(apart)], "nats", scores=theirs.size))
    return rows


def _lengths(tuned: Tuned, answers: Mapping[str, Sequence[list[int]]]) -> Rows:
    """Tokens: of a prompt; that each list of names adds to it; of a free answer, its end included, and the share of
    answers that are those of the first implementation, token by token."""
    first = next(iter(answers.values()))
    rows = [row("prompt", [mean(map(len, tuned.prompts))], "tokens")]
    for name, choices in tuned.choices.items():
        rows.append(row(f"extra, {name}", [len(label_trie.build(choices, "constrained").tokens)], "tokens"))
    for name, each in answers.items():
        lengths, same = list(map(len, each)), mean(a == b for a, b in zip(each, first, strict=True))
        rows.append(row(f"answer, {name}", [mean(lengths)], "tokens", longest=max(lengths), same=same))
    return rows


def _vocabulary(case: Case) -> int:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(source(case.model)).text_config.vocab_size
