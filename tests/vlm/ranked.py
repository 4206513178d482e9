"""An engine over ranks beside one of a single process, on the same model, and what both make of the same requests."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tinker
import torch
from tinker import types
from torch import Tensor

from vlm import label_trie
from vlm.local import scoring as local_scoring
from vlm.local.engine import Engine
from vlm.local.model.load import Model
from vlm.local.model.lora import LoraSpec
from vlm.local.ranks.inference import ModelOptions, RanksEngine
from vlm.local.sampling.sampler import SamplingRequest, sample
from vlm.local.vision import Vision

ADAM = types.AdamParams(learning_rate=1e-3)
SPEC = LoraSpec(4)
TRIE_TOKENS = [[7, 8, 9], [7, 8, 11, 3], [7, 5, 9], [12, 9]]


class Engines(NamedTuple):
    """one: of this process. many: over ranks. tolerance: relative, of what both compute."""

    one: Engine
    many: RanksEngine
    tolerance: float


@contextmanager
def engines(path: str | Path, count: int, dtype: torch.dtype, *, divided: bool, **options: Any) -> Iterator[Engines]:
    model = Model(str(path), dtype=dtype)
    one = Engine(model, Vision(model, threads=0) if model.takes_images else None)
    settings = ModelOptions(str(path), str(path), dtype, "divided" if divided else "whole", decoders=0, **options)
    many = RanksEngine(settings, ["cpu"] * count, 1, limit=60)
    try:
        yield Engines(one, many, 1e-9 if dtype == torch.float64 else 1e-4)
    finally:
        many.end()


def error(one: Tensor, other: Tensor) -> float:
    """Relative L2."""
    return float((one - other).norm() / one.norm().clamp(min=1e-300)) if one.shape == other.shape else float("inf")


def errors(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(error(each.double(), other[name].double()) for name, each in one.items())


class Trained(NamedTuple):
    """losses: of each step. log_probs: of the last. gradient: Adam's first moment after one step, times ten.
    weights: after all."""

    losses: list[float]
    log_probs: list[Tensor]
    gradient: dict[str, Tensor]
    weights: dict[str, Tensor]


def trained(engine: Engine, data: Sequence[tinker.Datum], run: Any = None, steps: int = 10) -> Trained:
    run = run or engine.start(SPEC, 3)
    losses, gradient, log_probs = [], dict[str, Tensor](), list[Tensor]()
    for step in range(steps):
        out = engine.forward_backward(run, data, "cross_entropy", None)
        losses.append(out.metrics["loss:sum"])
        log_probs = [each["logprobs"].to_torch() for each in out.loss_fn_outputs]
        engine.optim_step(run, ADAM)
        if not step:
            tensors = run.optimizer_tensors()
            gradient = {name: tensor for name, tensor in tensors.items() if name.endswith("exp_avg")}
    return Trained(losses, log_probs, gradient, run.weights())


def check_trained(both: Engines, one: Trained, many: Trained) -> None:
    np.testing.assert_allclose(many.losses, one.losses, rtol=both.tolerance)
    for ours, theirs in zip(one.log_probs, many.log_probs, strict=True):
        assert error(ours, theirs) < max(both.tolerance, 2e-7)  # answers are float32
    assert errors(one.gradient, many.gradient) < both.tolerance
    assert errors(one.weights, many.weights) < both.tolerance


def check_answers(both: Engines, prompts: Sequence[tinker.ModelInput], data: Sequence[tinker.Datum]) -> None:
    """Scores, greedy samples, log-probabilities of prompts and features, of a trained snapshot and of the base."""
    trie = label_trie.build(TRIE_TOKENS, "constrained")
    found = list[Any]()
    for engine in (both.one, both.many):
        run = engine.start(SPEC, 5)
        trained(engine, data, run, steps=3)
        snapshot = engine.snapshot_of(run)
        params = types.SamplingParams(max_tokens=9, temperature=0.0)
        samples = sample(engine, snapshot, [SamplingRequest(each, params, topk_sample_logprobs=2) for each in prompts])
        seeded = types.SamplingParams(max_tokens=5, temperature=1.0, seed=4)
        drawn = sample(engine, None, [SamplingRequest(prompts[0], seeded, 3, prompt_logprobs=True)])
        scores = local_scoring.score_tree(engine, snapshot, prompts, trie)
        features = local_scoring.embed(engine, None, prompts, tower=False, hidden=True)
        tokens = [s.tokens for each in (*samples, *drawn) for s in each.sequences]
        values = [s.logprobs for each in (*samples, *drawn) for s in each.sequences]
        found.append((tokens, values, drawn[0].prompt_logprobs, scores, features))
    (tokens, values, of_prompt, scores, features), other = found
    assert tokens == other[0]
    for ours, theirs in zip(values, other[1], strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.array(other[2], float), np.array(of_prompt, float), rtol=1e-4)
    np.testing.assert_allclose(other[3], scores, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(other[4], features, rtol=1e-4, atol=1e-5)
