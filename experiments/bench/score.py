"""`kshot bench score`: seconds per image from an encoded photograph to the exact posterior over N class names.

Against what it cannot do without (the prompts' own forward pass) and what else people do: a forward pass for each
label, with and without a cache of the prompt, and generating an answer. All score the same photographs with the same
adapter, in turn, called from one thread of this process; that scores agree is part of the result. Images are `new`
(decoded, and seen by the vision tower) or `known` (its features are there, and only the text model works). Loading and
tuning are nobody's time.

TODO The rows and ratios of `kshot bench score`, and what must hold for them to mean anything. Runs nothing.
TODO Who takes part in `kshot bench score`, on what, and whose scores are compared. Knows no clock.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import tinker
import torch

from experiments.bench.harness import FOLDER, finish, in_turn, quiet, result, row
from experiments.bench.score_case import CAR_NAMES, HUNDRED, Plan, Tuned, new_case, tune, write
from experiments.bench.score_implementations import Ours, Stock
from kshot.errors import InputError, KshotError, UnknownNameError
from vlm import label_trie, nano
from vlm.local.engine import length_of

# ---- The rows and ratios of `kshot bench score`, and what must hold for them to mean anything. Runs nothing.

PREFILL = "prefill"
CONSTRAINED, CARS, LIKELIHOOD = f"constrained, {HUNDRED}", f"constrained, {CAR_NAMES}", f"likelihood, {HUNDRED}"
LABELS, STOCK_LABELS = "label by label (kshot)", "label by label (transformers)"
CACHED = "prefix-cached (transformers)"
OWN, PEER = "generate (kshot)", "generate (transformers)"
NEW, KNOWN = ", images new", ", images known"  # whether the vision tower has seen them before
RATIOS = {
    "constrained_over_prefill": (CONSTRAINED + NEW, PREFILL + NEW),
    "cars_over_prefill": (CARS + NEW, PREFILL + NEW),
    "constrained_over_text_prefill": (CONSTRAINED + KNOWN, PREFILL + KNOWN),
    "cars_over_text_prefill": (CARS + KNOWN, PREFILL + KNOWN),
    "label_by_label_over_constrained": (LABELS + KNOWN, CONSTRAINED + KNOWN),
    "stock_label_by_label_over_constrained": (STOCK_LABELS + NEW, CONSTRAINED + NEW),
    "prefix_cached_over_constrained": (CACHED + KNOWN, CONSTRAINED + KNOWN),
    "generate_over_constrained": (PEER + NEW, CONSTRAINED + NEW),
    "generate_known_over_constrained_known": (PEER + KNOWN, CONSTRAINED + KNOWN),
    "own_generate_over_constrained": (OWN + NEW, CONSTRAINED + NEW),
}
TOLERANCE = 1e-4  # nats, in float32 on a CPU
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Scores:
    """The same photographs and names, scored twice: (photographs, names) each."""

    ours: np.ndarray
    theirs: np.ndarray

    @property
    def apart(self) -> float:
        return float(np.abs(np.asarray(self.ours, np.float64) - self.theirs).max())


def ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """From each contestant's seconds per photograph, round by round: the median over rounds of their quotients, since
    what ran in one round ran within moments."""
    pairs = {name: zip(seconds[over], seconds[under], strict=True) for name, (over, under) in RATIOS.items()}
    return {name: median(over / under for over, under in each) for name, each in pairs.items()}


def speeds(seconds: Mapping[str, Sequence[float]], images: Mapping[str, float], **facts: Any) -> Rows:
    """Seconds per photograph of each contestant. images: how many it scored in a round, below one where it scored a
    part of the labels."""
    return [row(name, each, "s/image", images=images[name], **facts) for name, each in seconds.items()]


def agreement(scores: Mapping[str, Scores], *, exact: bool) -> Rows:
    """How far they are apart. Raises KshotError where they must be `exact` and are not: speed bought with errors."""
    for name, each in scores.items():
        if exact and not each.apart <= TOLERANCE:
            raise KshotError(f"{name}: scores {each.apart:.2g} apart, more than {TOLERANCE}: nothing to compare")
    return [row(f"apart, {name}", [each.apart], "nats", scores=each.ours.size) for name, each in scores.items()]


def lengths(prompts: Sequence[int], tries: Mapping[str, int], answers: Mapping[str, Sequence[Sequence[int]]]) -> Rows:
    """Tokens: of a prompt; that each list of names adds to it; of a free answer, its end included.

    Rows of answers say how many of them are those of the first contestant, token by token.
    """
    first = next(iter(answers.values()))
    return [
        row("prompt", [mean(prompts)], "tokens"),
        *(row(f"extra, {name}", [count], "tokens") for name, count in tries.items()),
        *(
            row(
                f"answer, {name}",
                [mean(map(len, each))],
                "tokens",
                longest=max(map(len, each)),
                same=_same(each, first),
            )
            for name, each in answers.items()
        ),
    ]


def _same(answers: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> float:
    """The share of answers that are equal."""
    return mean(list(a) == list(b) for a, b in zip(answers, others, strict=True))


def model(vocabulary: int, steps: int) -> Rows:
    """What was scored with."""
    return [row("vocabulary", [vocabulary], "tokens"), row("tuning before", [steps], "steps")]


# ---- Who takes part in `kshot bench score`, on what, and whose scores are compared. Knows no clock.


@dataclass(frozen=True)
class Implementation:
    """run scores so many photographs, or a part of one where it scores a part of the labels; what it gives is kept for
    the comparison."""

    run: Callable[[], Any]
    images: float


def of_ours(ours: Ours, plan: Plan, extra: int) -> dict[str, Implementation]:
    """extra: the tokens that the hundred names add to a prompt."""
    tasks: dict[str, Callable[[Sequence[tinker.ModelInput]], Any]] = {
        PREFILL: partial(ours.prefill, extra=extra),
        CONSTRAINED: partial(ours.score, names=HUNDRED),
        CARS: partial(ours.score, names=CAR_NAMES),
        OWN: ours.generate,
    }
    count = len(ours.known)
    new = {name + NEW: Implementation(partial(_anew, ours, task), count) for name, task in tasks.items()}
    known = {name + KNOWN: Implementation(partial(task, ours.known), count) for name, task in tasks.items()}
    few = ours.known[: plan.few]  # for what computes many times as much
    return {
        **new,
        **known,
        LIKELIHOOD + KNOWN: Implementation(partial(ours.score, few, HUNDRED, "likelihood"), plan.few),
        LABELS + KNOWN: Implementation(partial(ours.label_by_label, few, HUNDRED), plan.few),
    }


def of_peers(ours: Ours, stock: Stock, images: Sequence[bytes], plan: Plan) -> dict[str, Implementation]:
    """On the tokens of our names."""
    choices = ours.prompts[HUNDRED].choices
    known = stock.known(stock.inputs(images))
    few = [stock.known(stock.inputs([image])) for image in images[: plan.few]]
    count = min(plan.labels, len(choices))
    return {
        PEER + NEW: Implementation(lambda: stock.generate(stock.inputs(images)), len(images)),
        PEER + KNOWN: Implementation(lambda: stock.generate(known), len(images)),
        CACHED + KNOWN: Implementation(lambda: [stock.prefix_cached(each, choices) for each in few], len(few)),
        STOCK_LABELS + NEW: Implementation(
            lambda: stock.label_by_label(stock.inputs(images[:1]), choices, count), count / len(choices)
        ),
    }


def compared(
    ours: Ours, stock: Stock, images: Sequence[bytes], plan: Plan, kept: Mapping[str, Any]
) -> dict[str, Scores]:
    """Our scores beside those of whoever has scored the same. kept: what the contestants gave last."""
    constrained, likelihood = kept[CONSTRAINED + NEW], kept[LIKELIHOOD + KNOWN]
    alone, among = kept[STOCK_LABELS + NEW]
    cars = stock.label_by_label(stock.inputs(images[:1]), ours.prompts[CAR_NAMES].choices, plan.labels)
    return {
        "constrained: images known": _scores(constrained, kept[CONSTRAINED + KNOWN]),
        "constrained: kshot, label by label": _scores(constrained, kept[LABELS + KNOWN]),
        "constrained: transformers, label by label": _scores(constrained, [among]),
        f"{CAR_NAMES}: transformers, label by label": _scores(kept[CARS + NEW], [cars[1]]),
        "likelihood: transformers, prefix-cached": _scores(likelihood, kept[CACHED + KNOWN]),
        "likelihood: transformers, label by label": _scores(likelihood, [alone]),
    }


def _anew(ours: Ours, task: Callable[[Sequence[tinker.ModelInput]], Any]) -> Any:
    return task(ours.new())


def _scores(ours: np.ndarray, others: Any) -> Scores:
    """Of the first photographs and names, which both have scored."""
    theirs = np.asarray(others)
    return Scores(ours[: theirs.shape[0], : theirs.shape[1]], theirs)


# ---- `kshot bench score`: seconds per image from an encoded photograph to the exact posterior over N class names.

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
    """The record of `experiments.bench.harness`. root: a folder of class folders; None: photographs made here, from a seed.

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
    tries = {name: len(label_trie.build(prompt.choices, "constrained").tokens) for name, prompt in ours.prompts.items()}
    contestants = {**of_ours(ours, plan, tries[HUNDRED]), **of_peers(ours, stock, tuned.images, plan)}
    kept: dict[str, Any] = {}
    timed = in_turn({name: _keeping(kept, name, each.run) for name, each in contestants.items()}, plan.rounds)
    images = {name: each.images for name, each in contestants.items()}
    seconds = {name: [spent / images[name] for spent in each] for name, each in timed.items()}
    scores = compared(ours, stock, tuned.images, plan, kept)
    answers = {name: kept[name + NEW] for name in (OWN, PEER)}
    facts = {"device": torch.cuda.get_device_name() if tuned.case.device == "cuda" else "cpu"}
    measured = [
        *speeds(seconds, images, threads=torch.get_num_threads(), **facts),
        *agreement(scores, exact=tuned.case.device == "cpu"),
        *lengths([length_of(each) for each in ours.known], tries, answers),
        *model(ours.vocabulary, tuned.steps),
    ]
    return result(measured, ratios(seconds), PACKAGES)


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
