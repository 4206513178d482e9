"""A plan from stored rates instead of a measurement: for a machine of `experiments.plan.machines`, which need not be
here, in seconds and without loading a model."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.plan.counts import Lengths, LengthTable, count, prompt_lengths
from experiments.plan.estimate import Estimate, Requirements, requirements
from experiments.plan.machines import (
    CPU,
    FEATURE_SHARE,
    USABLE,
    Machine,
    TextShape,
    text_shape,
    tower_pass,
    vit_forward,
    vit_training,
)
from experiments.plan.memory import ANSWER, TEXT, VlmSize, vit_size, vlm_size
from experiments.plan.time import ANSWER as ANSWER_TOKENS
from experiments.plan.time import Measurement, ProbeResult, Rates, sweep_time
from experiments.sweep.config import RunOptions
from experiments.sweep.workload import (
    CellSpec,
    Workload,
    encoding_schedule,
    feature_bytes,
    mean_size,
    model_config,
)
from kshot.errors import InputError

START = 15.0  # seconds until a worker has imported its libraries
READ = 2e9  # bytes a second at which weights come from the disk
PREPARED = 1.4e-3  # seconds of a core for an image, results/bench/data.json
HEAD = Rates(load=0.0, fixed=0.2, fit=4e-4, scored=5e-5)  # of a head on cached features, results/bench/baseline.json
PIXELS = Rates(fixed=0.5, fit=1e-3, scored=1e-3)
ROWS = 64  # sequences that are decoded together


def stored_estimate(workload: Workload, out: Path, options: RunOptions, machine: Machine, number: int) -> Estimate:
    """The whole estimate for `number` such machines, of which a worker gets options.gpus_per_worker. out: the results
    folder. Raises InputError for fewer than that."""
    needed = _requirements(workload, out, options, machine, number)
    known, reason = prompt_lengths(workload)
    lengths = known or _assumed(workload)
    counts, schedule = count(workload, lengths), encoding_schedule(workload)
    problem = _unknown(workload, needed)
    if problem:
        return Estimate(needed, schedule, counts, lengths, None, None, problem, reason)
    rates = _results(workload, machine, lengths)
    measured = Measurement(START, rates, 0.0)
    time = sweep_time(workload, measured, needed.workers)
    name = f"{number} x {machine.title}" if number > 1 else machine.title
    return Estimate(needed, schedule, counts, lengths, measured, time, machine=name, basis=machine.basis)


def _requirements(workload: Workload, out: Path, options: RunOptions, machine: Machine, number: int) -> Requirements:
    """On a GPU that is not here, with the image features that it would keep."""
    if not machine.memory:
        return requirements(workload, out, options)
    each, free = options.gpus_per_worker, int(machine.memory * USABLE)
    if each > number:
        raise InputError(f"--gpus-per-worker {each}, but --count {number}; give fewer, or a larger --count")
    if (options.workers or 0) > number // each:
        raise InputError(f"--workers {options.workers}, but --count {number} has room for {number // each}; give fewer")
    workers = options.workers or number // each
    here = requirements(workload, out, replace(options, device="cuda:0", workers=workers), free)
    features = min(sum(feature_bytes(workload).values()), machine.memory // FEATURE_SHARE)
    parts = {**here.memory.parts, "image features": features}
    there = replace(here.memory, parts=parts, free=free, location=f"the memory of {machine.title}", workers=1)
    return replace(here, memory=there)


def _unknown(workload: Workload, needed: Requirements) -> str:
    """Why no time can be told; "" where it can."""
    if not workload.cells:
        return "nothing is left to compute"
    if workload.service != "local":
        return f"the time of the service {workload.service} is not known"
    if any(cell.spec.uses_vlm and cell.settings.thinking for cell in workload.cells):
        return "not known with --thinking: how long the model thinks is not known before"
    if any(cell.method == "vlm-rl" for cell in workload.cells):
        return "not known for vlm-rl: how long its answers become is not known before"
    if needed.ranks:
        return "not known for a VLM over several processes: --plan measures it on a machine that has them"
    if needed.memory.unknown:
        return f"the size of {', '.join(needed.memory.unknown)} is not known"
    return "" if needed.memory.fits else f"it does not fit into {needed.memory.location}"


def _assumed(workload: Workload) -> LengthTable:
    """Numbers of tokens where no tokenizer is here: those of the images, and usual ones of the text."""
    cells = {(c.source, c.settings.prompt): c for c in workload.select(lambda cell: cell.spec.uses_vlm)}
    table = {}
    for key, cell in cells.items():
        prompt = _image_tokens(cell, workload) + TEXT - ANSWER
        table[key] = Lengths(prompt, prompt + ANSWER, ANSWER_TOKENS, assumed=True)
    return table


def _image_tokens(cell: CellSpec, workload: Workload) -> float:
    size = vlm_size(cell.settings.model, on_cpu=workload.device == "cpu")
    sides = mean_size(workload.datasets[cell.source], cell.settings.max_side)
    return size.features.tokens(*sides) if size else 0.0


def _results(workload: Workload, machine: Machine, lengths: LengthTable) -> Mapping[str, ProbeResult]:
    results = {}
    for source, info in workload.datasets.items():
        cells = {cell.variant: cell for cell in workload.cells if cell.source == source}
        rates = {variant: _rates(cell, workload, machine, lengths) for variant, cell in cells.items()}
        results[source] = ProbeResult(0.0, 1.0 + 1e-4 * (info.train + info.test), PREPARED, 2 * PREPARED, rates, 0)
    return results


def _rates(cell: CellSpec, workload: Workload, machine: Machine, lengths: LengthTable) -> Rates:
    if cell.spec.uses_vlm:
        config, size = model_config(cell.settings.model), vlm_size(cell.settings.model, on_cpu=machine is CPU)
        if config is None or size is None:
            return Rates()
        length = lengths[cell.source, cell.settings.prompt]
        return _vlm_rates(cell, machine, size, config, length, _image_tokens(cell, workload))
    if cell.spec.uses_backbone:
        return _backbone_rates(cell, workload, machine)
    return PIXELS


def _vlm_rates(
    cell: CellSpec, machine: Machine, size: VlmSize, config: dict[str, Any], length: Lengths, image: float
) -> Rates:
    s, shape = cell.settings, text_shape(size, config)
    forward = _forward(machine, shape, length.prompt)
    rates = Rates(load=size.weight_bytes / READ, fixed=1.0, encoded=tower_pass(machine, config, image, 8))
    if not cell.spec.generates:  # features of the model, and a head on them
        return replace(rates, fit=HEAD.fit + forward, scored=HEAD.scored + forward)
    step = machine.training_pass(shape.weights, shape.layers, shape.width, s.batch_size * length.training)
    tokens = min(s.answer_tokens, length.answer) if cell.spec.trains else s.answer_tokens
    decoded = tokens * machine.decoding_pass(shape.read, shape.layers) / ROWS
    return replace(rates, step=step if cell.spec.trains else 0.0, scored=forward, generated=forward + decoded)


def _forward(machine: Machine, shape: TextShape, prompt: float) -> float:
    """Seconds of a prompt, of ROWS that share a pass."""
    return machine.forward_pass(shape.weights, shape.layers, shape.width, ROWS * prompt) / ROWS


def _backbone_rates(cell: CellSpec, workload: Workload, machine: Machine) -> Rates:
    s, size = cell.settings, vit_size(cell.settings.backbone)
    if size is None:
        return HEAD
    width, height = mean_size(workload.datasets[cell.source], s.max_side)
    if s.image_size:
        width = height = s.image_size
    tokens = max(1.0, width / size.patch) * max(1.0, height / size.patch) + 1
    encoded = vit_forward(machine, size, tokens, 8)
    load = size.weight_bytes / READ
    if not cell.spec.trains:
        return replace(HEAD, load=load, encoded=encoded)
    step = vit_training(machine, size, tokens, s.batch_size)
    return Rates(load=load, fixed=1.0, step=step, scored=encoded, encoded=encoded)
