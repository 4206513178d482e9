"""The rows and ratios of `kshot bench score`, and what must hold for them to mean anything. Runs nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import numpy as np

from experiments.bench import row
from experiments.bench_score_case import CAR_NAMES, HUNDRED
from kshot_errors import KshotError

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
