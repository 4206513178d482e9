"""`kshot bench train`: examples a second from encoded photographs to optimizer steps, against stock programs.

Ours, a plain transformers + PEFT loop and TRL train the same adapter on the same photographs in the same batches with
the same optimizer, in turn, each in a process of its own; that their losses agree is part of the result. Each round
loads anew, which is not timed. The adapter is on attention and MLP of the text model.
"""

import gc
import os
import re
import resource
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from tinker import types

from experiments.bench import harness
from experiments.bench import train_implementations as programs
from experiments.bench.case import RANK, Case, Plan, new_case, write_shape
from experiments.bench.harness import Rows, Timed, in_turn, median_ratio, row, timed
from experiments.bench.train_implementations import OURS, PLAIN, Implementation, Outcome
from experiments.sweep.workload import published_configs
from kshot.errors import InputError, KshotError, UnknownNameError
from vlm import nano
from vlm.models import SIZES, source

NANO = "nano"
SHAPES = (NANO, "2B", "4B", "8B")  # the others do not fit one GPU with the optimizers of all implementations
FULL = Plan(classes=16, shots=4, batch=8, epochs=10, rounds=3)
FULL_GPU = Plan(classes=16, shots=4, batch=32, epochs=20, rounds=2)  # the reference protocol's batch
QUICK = Plan(classes=4, shots=2, batch=4, epochs=10, rounds=2)
WARM_STEPS = 2
PAIRS = 30  # of steps and what of them is the model's, in every round: they differ by little
THREADS = "OMP_NUM_THREADS"
COMPARED, TOLERANCE = 20, 1e-4  # steps whose losses must agree, and how closely in float32 on a CPU
PEAK_SIDE, PEAK_TIMES = {"cpu": 2048, "cuda": 8192}, 10  # of the square matrices whose product sets the peak
PACKAGES = ("accelerate", "numpy", "peft", "pillow", "tinker", "torch", "transformers")
NO_TRL = "TRL is not installed, so vs_trl is left out; install it with: pip install trl==1.16.0"


def measure(root: Path | None, quick: bool, device: str = "cpu", shape: str = NANO) -> dict[str, Any]:
    """The record of `experiments.bench.harness`. root: a folder of class folders; None: photographs made from a seed.
    shape: nano, the model itself, or a real model's sizes with random weights, on a GPU.

    Raises InputError for a shape or device that cannot be; DatasetError; KshotError for an implementation that fails,
    and as `summary`.
    """
    if shape not in SHAPES:
        raise UnknownNameError("shape", shape, SHAPES)
    harness.check_device(device)
    if device == "cpu" and shape != NANO:
        raise InputError(f"--shape {shape} would take hours on a CPU; give --device cuda")
    harness.quiet()
    plan = QUICK if quick else FULL_GPU if device == "cuda" else FULL
    implementations = programs.implementations(quick)
    with tempfile.TemporaryDirectory() as folder, harness.processes(implementations) as started:
        state = Path(folder)
        model = nano.NAME
        if shape != NANO:
            model = str(write_shape(state / "model", published_configs()[SIZES[shape]], device))
        case = programs.with_adapter(new_case(model, device, plan, root, state))  # meanwhile they import
        _free_memory()
        tasks = {name: partial(started[name], train, each, case) for name, each in implementations.items()}
        short = replace(case, batches=case.batches[:WARM_STEPS])
        # On a CPU all at once, as most of it is importing; a GPU has room for one.
        pool = ThreadPoolExecutor(len(tasks) if device == "cpu" else 1)  # without `with`: an error waits for no other
        list(pool.map(lambda name: started[name](train, implementations[name], short), tasks))
        pool.shutdown()
        seconds, trained = in_turn(tasks, plan.rounds, warm_up=False)
        pairs = started[OURS](programs.step_pairs, case, PAIRS * plan.rounds)
        made = summary(case, seconds, trained, pairs)
    if device == "cpu" and not quick:
        with tempfile.TemporaryDirectory() as folder:
            rows, ratios = ranks_against_threads(replace(case, state=Path(folder)))
        made["rows"] += rows
        made["ratios"] |= ratios
    return made


def train(implementation: Implementation, case: Any) -> Timed[Outcome]:
    """In this process: load, train, which is timed, and free what was loaded."""
    with implementation(case) as run:
        begun = process_time()
        trained = timed(run, device=case.device)
        spent = process_time() - begun
    _free_memory()
    return Timed(trained.seconds, replace(trained.value, peak=_peak_memory(case.device), processor=spent))


def ranks_against_threads(case: Case) -> tuple[Rows, dict[str, float]]:
    """Rows of two ranks of one thread and of one process of two and of one, in turn, once each has started; and how
    much faster the ranks are than each. The other programs have ended."""
    case, before, rates = replace(case, start=""), torch.get_num_threads(), dict[str, list[float]]()
    told = os.environ.get(THREADS)
    views = sum(map(len, case.batches))
    ways = ("2 ranks of 1 thread", "cpu:2", 2), ("1 rank of 2 threads", "cpu", 2), ("1 rank of 1 thread", "cpu", 1)
    try:
        for _ in range(FULL.rounds):
            for name, device, threads in ways:
                torch.set_num_threads(threads)  # shared by the ranks, one each
                os.environ[THREADS] = str(threads)  # they are as told, not as many as are fastest
                with programs.ours(replace(case, device=device)) as run:
                    run()  # images go through the tower, and are kept
                    rates.setdefault(name, []).append(views / timed(run, device="cpu").seconds)
    finally:
        torch.set_num_threads(before)
        os.environ.pop(THREADS)
        os.environ |= {} if told is None else {THREADS: told}
    many, two, one = map(median, rates.values())
    ratios = {"ranks_over_threads": many / two, "ranks_over_one_thread": many / one}
    return [row(name, each, "examples/s") for name, each in rates.items()], ratios


def _free_memory() -> None:
    """The next implementation is not to lack it."""
    gc.collect()
    torch.cuda.empty_cache()  # nothing, where there is no GPU


def _peak_memory(device: str) -> int:
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")  # begins at zero; getrusage of a child, at its parent's peak
    if status.exists() and (peak := re.search(r"VmHWM:\s+(\d+)", status.read_text(encoding="utf-8"))):
        return 1024 * int(peak[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# Rows and ratios


def summary(
    case: Case,
    seconds: Mapping[str, Sequence[float]],
    trained: Mapping[str, Outcome],
    pairs: Sequence[tuple[float, float]],
) -> dict[str, Any]:
    """The record of what was measured; pairs: of `step_pairs`. Raises KshotError where losses differ on a CPU, and
    where the tower encoded an image again after the first epoch."""
    sizes = {"batch": len(case.batches[0]), "epochs": len(case.batches) // case.epoch}
    facts = {"photographs": len(case.photographs), **sizes, **harness.device_facts(case.device)}
    views = sum(map(len, case.batches))
    rates = {name: [views / spent for spent in each] for name, each in seconds.items()}
    needed, peak = operations(case), matrix_product_rate(case)
    steps, model = zip(*pairs, strict=True)
    memory = "of the process, libraries included" if case.device == "cpu" else "allocated on the device"
    first, last = trained[OURS].tower[case.epoch - 1], trained[OURS].tower[-1]
    if last != first:
        raise KshotError(f"the tower encoded {last - first} images again after the first epoch instead of keeping them")
    rows = [
        *(row(name, rate, "examples/s", **facts) for name, rate in rates.items()),
        *agreement({name: each.losses for name, each in trained.items()}, exact=case.device == "cpu"),
        row("images through our tower, first epoch", [first], "images"),
        row("images through our tower, all epochs", [last], "images"),
        row("step", [1e3 * each for each in steps], "ms"),
        row("model alone", [1e3 * each for each in model], "ms"),
        row("needed operations", [sum(needed.values()) / s / 1e9 for s in seconds[OURS]], "GFLOP/s", flops=needed),
        row("a large matrix product, at best", [max(peak) / 1e9], "GFLOP/s", all=[each / 1e9 for each in peak]),
        *(
            row(f"peak memory, {name}", [each.peak / 1e6], "MB", what=memory)
            for name, each in trained.items()
            if not programs.TRL.get(name)  # loaders have memory of their own
        ),
    ]
    speed = {name: median(rate) for name, rate in rates.items()}
    trl = [name for name in rates if name not in (OURS, PLAIN)]
    ratios = {"vs_trl": speed[OURS] / max(speed[name] for name in trl)} if trl else {}  # the faster of its settings
    ratios |= {
        "vs_plain": speed[OURS] / speed[PLAIN],
        "step_over_model": median_ratio(steps, model),
        "gemm_share": sum(needed.values()) / median(seconds[OURS]) / max(peak),
    }
    made = harness.record(rows, ratios, [*PACKAGES, *(["trl"] if trl else [])])
    return made if trl else {**made, "notes": [NO_TRL]}


def agreement(losses: Mapping[str, Sequence[float]], *, exact: bool) -> Rows:
    """How far each peer's losses are from ours. Raises KshotError where that is too far and they must be `exact`."""
    rows = []
    for name in sorted(losses.keys() - {OURS}):
        apart = [abs(a - b) for a, b in zip(losses[OURS], losses[name], strict=True)][:COMPARED]
        if exact:
            at = apart.index(max(apart)) + 1
            harness.check_agreement(f"at step {at} our loss and that of {name!r} are", max(apart), TOLERANCE)
        rows.append(row(f"loss apart from {name}", [max(apart)], "nats", steps=len(apart)))
    return rows


# What training needs at least, and what the machine reaches


def operations(case: Case) -> dict[str, float]:
    """Floating-point operations that a case needs at least, by part of the model; a multiplication with its addition
    counts as two.

    Counted are matrix products alone, and nothing that a better program would not do: no padding, no logits without a
    label, an image once through the tower however often it is seen. So the share of the peak is a lower bound.
    """
    from transformers import AutoConfig

    prompt, config = case.prompt(), AutoConfig.from_pretrained(source(case.model), trust_remote_code=False)
    data = [prompt.datum(*photograph) for photograph in case.photographs]
    answers = [int((datum.loss_fn_inputs["weights"].to_numpy() > 0).sum()) for datum in data]
    seen = [number for batch in case.batches for number in batch]
    merge = config.vision_config.spatial_merge_size**2
    images = {case.photographs[n][0]: data[n].model_input.chunks for n in seen}
    patches = [merge * c.length for chunks in images.values() for c in chunks if isinstance(c, types.ImageChunk)]
    lengths = [data[n].model_input.length for n in seen]
    text = text_operations(config.text_config, lengths, sum(answers[n] for n in seen))
    return {**text, "tower": tower_operations(config.vision_config, patches)}


def text_operations(config: Any, lengths: Sequence[int], answers: int) -> dict[str, float]:
    """The text model's parts. lengths: positions of each view. answers: positions with a label, in all views.

    A product of T positions with weights W (in x out each) takes 2 T W, and as much for the gradient of its inputs.
    Frozen weights need no gradient, nor do the inputs of the first layer's q, k and v, below which nothing is trained.
    The gradients of LoRA's A and B, and of attention's two products, are two more.
    """
    hidden, layers, mlp = config.hidden_size, config.num_hidden_layers, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    into = [(hidden, queries), (hidden, keys), (hidden, keys)]
    layer = [*into, (queries, hidden), (hidden, mlp), (hidden, mlp), (mlp, hidden)]
    weights, first = sum(i * o for i, o in layer), sum(i * o for i, o in into)
    adapters, first_adapters = sum(i + o for i, o in layer), sum(i for i, _ in into)
    pairs, positions = sum(length * (length + 1) // 2 for length in lengths), sum(lengths)
    return {
        "forward": 2.0 * positions * weights * layers,
        "backward": 2.0 * positions * (weights * layers - first),
        "lora": 2.0 * positions * RANK * (3 * adapters * layers - first_adapters),
        "attention": 12.0 * pairs * queries * layers,
        "head": 4.0 * answers * hidden * config.vocab_size,
    }


def tower_operations(config: Any, patches: Sequence[int]) -> float:
    """The frozen vision tower, forward, for images of these numbers of patches before they are merged: the patch
    embedding, layers with attention of all patches to all, and a merger at the end and at each deepstack layer."""
    hidden, merge = config.hidden_size, config.spatial_merge_size**2
    pixels = config.in_channels * config.temporal_patch_size * config.patch_size**2
    layer = 4 * hidden**2 + 2 * hidden * config.intermediate_size
    merger = hidden * (merge * hidden + config.out_hidden_size)
    mergers = 1 + len(config.deepstack_visual_indexes)
    each = 2.0 * (pixels * hidden + config.depth * layer + mergers * merger)
    return sum(n * each + 4.0 * n**2 * hidden * config.depth for n in patches)


def matrix_product_rate(case: Case) -> list[float]:
    """Operations a second of a large matrix product in the case's type, with the threads that training has."""
    from transformers import AutoConfig

    side, dtype = PEAK_SIDE[case.device], AutoConfig.from_pretrained(source(case.model), trust_remote_code=False).dtype
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator).to(case.device, dtype) for _ in range(2))
    products = [timed(torch.mm, a, b, device=case.device) for _ in range(1 + PEAK_TIMES)][1:]
    return [2.0 * side**3 / each.seconds for each in products]
