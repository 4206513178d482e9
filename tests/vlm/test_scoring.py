"""Scores of labels against a forward pass for each, path by path, and in parts."""

from typing import Any

import pytest
import tinker
import torch

from tests.vlm.helpers import OtherService, Pictured, stock_inputs
from vlm import nano
from vlm.classifier import predict
from vlm.inputs import ImageRule, image_chunk, model_input
from vlm.local.clients import LocalSamplingClient
from vlm.local.registry import LocalServiceClient
from vlm.prompts import Prompt
from vlm.scoring import score_choices


@pytest.fixture(scope="module")
def sampler(service: LocalServiceClient) -> LocalSamplingClient:
    return service.create_sampling_client(base_model=nano.NAME).result()


@pytest.fixture(scope="module")
def prompts(prompt: Prompt, examples: list[Pictured], rule: ImageRule) -> list[tinker.ModelInput]:
    """Questions about images of three sizes, one about two images, one about none."""
    encode = prompt.tokenizer.encode
    first, second = (image_chunk(e.image, rule) for e in examples[:2])
    two = model_input(first, encode("<|vision_end|> or <|vision_start|>"), second, encode("Which one?"))
    return [*(prompt.question(e.image) for e in examples[:5]), two, model_input(encode("Once upon a"))]


@pytest.mark.parametrize("method", ["constrained", "likelihood"])
def test_scores_equal_a_forward_pass_for_each_label(
    method: str, sampler: LocalSamplingClient, stock: Any, prompt: Prompt, examples: list[Pictured], rule: ImageRule
) -> None:
    """Among the labels: a word that begins another, one-token differences, and Unicode."""
    got = predict(sampler, [e.image for e in examples[:3]], prompt, method)
    for row, example in zip(got, examples, strict=False):
        asked = prompt.question(example.image)
        assert row == pytest.approx(brute_force(stock, asked, prompt.choices, rule, method), abs=1e-4)


def brute_force(stock: Any, asked: tinker.ModelInput, choices: Any, rule: ImageRule, method: str) -> list[float]:
    totals = []
    for choice in choices:
        with torch.no_grad():
            logits = stock(**stock_inputs(model_input(*asked.chunks, choice), rule)).logits[0].double()
        total = 0.0
        for depth, token in enumerate(choice):
            values = logits[asked.length - 1 + depth]
            allowed = sorted({c[depth] for c in choices if c[:depth] == choice[:depth]})
            among = values[allowed] if method == "constrained" else values
            total += (values[token] - among.logsumexp(-1)).item()
        totals.append(total)
    return totals


@pytest.mark.parametrize("method", ["constrained", "likelihood"])
def test_the_tree_equals_the_sdks_requests_path_by_path(
    method: str, sampler: LocalSamplingClient, prompt: Prompt, examples: list[Pictured]
) -> None:
    asked = [prompt.question(e.image) for e in examples[:2]]
    tree = score_choices(sampler, asked, prompt.choices, method)
    paths = score_choices(OtherService(sampler), asked, prompt.choices, method)  # type: ignore[arg-type]
    assert tree == pytest.approx(paths, abs=1e-4)


def test_scores_in_parts_equal_those_at_once(
    sampler: LocalSamplingClient, prompt: Prompt, prompts: list[tinker.ModelInput], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither logits nor masks of many nodes are in memory together."""
    for method in ("constrained", "likelihood"):
        whole = score_choices(sampler, prompts[:4], prompt.choices, method)
        with monkeypatch.context() as patch:
            patch.setattr("vlm.local.scoring.LOGITS", 3 * 4096)
            patch.setattr("vlm.local.scoring.MASK", 3000)
            assert score_choices(sampler, prompts[:4], prompt.choices, method) == pytest.approx(whole, abs=1e-4)
