"""Who takes part in `kshot bench score`, on what, and whose scores are compared. Knows no clock."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import tinker

from experiments import bench_score_rows as rows
from experiments.bench_score_case import CAR_NAMES, HUNDRED, Plan
from experiments.bench_score_ours import Ours
from experiments.bench_score_rows import KNOWN, NEW, Scores
from experiments.bench_score_stock import Stock


@dataclass(frozen=True)
class Contestant:
    """run scores so many photographs, or a part of one where it scores a part of the labels; what it gives is kept for
    the comparison."""

    run: Callable[[], Any]
    images: float


def of_ours(ours: Ours, plan: Plan, extra: int) -> dict[str, Contestant]:
    """extra: the tokens that the hundred names add to a prompt."""
    tasks: dict[str, Callable[[Sequence[tinker.ModelInput]], Any]] = {
        rows.PREFILL: partial(ours.prefill, extra=extra),
        rows.CONSTRAINED: partial(ours.score, names=HUNDRED),
        rows.CARS: partial(ours.score, names=CAR_NAMES),
        rows.OWN: ours.generate,
    }
    count = len(ours.known)
    new = {name + NEW: Contestant(partial(_anew, ours, task), count) for name, task in tasks.items()}
    known = {name + KNOWN: Contestant(partial(task, ours.known), count) for name, task in tasks.items()}
    few = ours.known[: plan.few]  # for what computes many times as much
    return {
        **new,
        **known,
        rows.LIKELIHOOD + KNOWN: Contestant(partial(ours.score, few, HUNDRED, "likelihood"), plan.few),
        rows.LABELS + KNOWN: Contestant(partial(ours.label_by_label, few, HUNDRED), plan.few),
    }


def of_peers(ours: Ours, stock: Stock, images: Sequence[bytes], plan: Plan) -> dict[str, Contestant]:
    """On the tokens of our names."""
    choices = ours.prompts[HUNDRED].choices
    known = stock.known(stock.inputs(images))
    few = [stock.known(stock.inputs([image])) for image in images[: plan.few]]
    count = min(plan.labels, len(choices))
    return {
        rows.PEER + NEW: Contestant(lambda: stock.generate(stock.inputs(images)), len(images)),
        rows.PEER + KNOWN: Contestant(lambda: stock.generate(known), len(images)),
        rows.CACHED + KNOWN: Contestant(lambda: [stock.prefix_cached(each, choices) for each in few], len(few)),
        rows.STOCK_LABELS + NEW: Contestant(
            lambda: stock.label_by_label(stock.inputs(images[:1]), choices, count), count / len(choices)
        ),
    }


def compared(
    ours: Ours, stock: Stock, images: Sequence[bytes], plan: Plan, kept: Mapping[str, Any]
) -> dict[str, Scores]:
    """Our scores beside those of whoever has scored the same. kept: what the contestants gave last."""
    constrained, likelihood = kept[rows.CONSTRAINED + NEW], kept[rows.LIKELIHOOD + KNOWN]
    alone, among = kept[rows.STOCK_LABELS + NEW]
    cars = stock.label_by_label(stock.inputs(images[:1]), ours.prompts[CAR_NAMES].choices, plan.labels)
    return {
        "constrained: images known": _scores(constrained, kept[rows.CONSTRAINED + KNOWN]),
        "constrained: kshot, label by label": _scores(constrained, kept[rows.LABELS + KNOWN]),
        "constrained: transformers, label by label": _scores(constrained, [among]),
        f"{CAR_NAMES}: transformers, label by label": _scores(kept[rows.CARS + NEW], [cars[1]]),
        "likelihood: transformers, prefix-cached": _scores(likelihood, kept[rows.CACHED + KNOWN]),
        "likelihood: transformers, label by label": _scores(likelihood, [alone]),
    }


def _anew(ours: Ours, task: Callable[[Sequence[tinker.ModelInput]], Any]) -> Any:
    return task(ours.new())


def _scores(ours: np.ndarray, others: Any) -> Scores:
    """Of the first photographs and names, which both have scored."""
    theirs = np.asarray(others)
    return Scores(ours[: theirs.shape[0], : theirs.shape[1]], theirs)
