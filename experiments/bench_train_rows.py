"""The rows and ratios of `kshot bench train`, and what must hold for them to mean anything. Runs nothing."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch

from experiments.bench import row
from experiments.bench_train_case import Case, Plan
from experiments.bench_train_peers import PLAIN, WITH_LOADERS
from kshot_errors import KshotError

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
