"""The engine in bfloat16, as real checkpoints are loaded: every path runs, and stays near the float32 numbers."""

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from tests.vlm.helpers import Pictured
from vlm import label_trie, nano
from vlm.local.clients import LocalSamplingClient
from vlm.local.engine import Engine
from vlm.local.model.load import Model
from vlm.local.model.lora import LoraSpec
from vlm.local.sampling.sampler import SamplingRequest, sample
from vlm.local.scoring import score_tree
from vlm.prompts import Prompt


@pytest.fixture(scope="module")
def engines(sampler: LocalSamplingClient) -> tuple[Engine, Engine]:
    half = Engine(Model(nano.NAME, dtype=torch.bfloat16))
    assert half.model.stock.dtype == torch.bfloat16
    return half, sampler._engine


def test_training(engines: tuple[Engine, Engine], mixed: list[tinker.Datum]) -> None:
    losses = []
    for engine in engines:
        run = engine.start(LoraSpec(rank=4), seed=0)
        assert all(t.dtype == torch.float32 for t in run.adapter.named().values())
        for _ in range(5):
            losses.append(engine.forward_backward(run, mixed, "cross_entropy", None).metrics["loss:sum"])
            engine.optim_step(run, types.AdamParams(learning_rate=1e-2, eps=1e-8))
    assert losses[0] == pytest.approx(losses[5], rel=0.02)
    assert losses[4] < losses[0] / 2
    assert losses[9] < losses[5] / 2


def test_scoring_and_sampling(engines: tuple[Engine, Engine], prompt: Prompt, examples: list[Pictured]) -> None:
    asked = [prompt.question(e.image) for e in examples[:4]]
    trie = label_trie.build(prompt.choices, "constrained")
    half, full = (score_tree(engine, None, asked, trie) for engine in engines)
    assert np.abs(half - full).max() < 0.2
    tuned = engines[0].snapshot(engines[0].start(LoraSpec(rank=4), seed=0).adapter)
    assert (score_tree(engines[0], tuned, asked, trie) == half).all()  # B is zero
    params = types.SamplingParams(max_tokens=4, temperature=0.0, stop=[])
    answers = sample(engines[0], None, [SamplingRequest(p, params, prompt_logprobs=True) for p in asked])
    assert [len(answer.sequences[0].tokens) for answer in answers] == [4] * 4
    assert answers[0].prompt_logprobs is not None
