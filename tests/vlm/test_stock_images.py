"""Models that see and have no row of their own, by the stock forward: against transformers and PEFT alone."""

from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import tinker
import torch
from tinker import types
from transformers import AutoModelForImageTextToText

from kshot.checks import folder_of
from kshot.errors import ModelError, RequestError
from tests.vlm import brute_force
from tests.vlm.checkpoints import SEEING, RandomModel, seeing_model, with_weights
from tests.vlm.helpers import (
    IMAGE,
    Pictured,
    assert_gradients_equal,
    disturb,
    greedy,
    logits_of,
    plain_loss,
    plain_peft,
    stock_logits,
    taken,
)
from tests.vlm.services import stock_log_probs
from tests.vlm.test_text_models import Side, params
from vlm.inputs import ImageRule, datum, image_chunk, model_input
from vlm.local.engine import Engine
from vlm.local.exchange.export import export
from vlm.local.model.load import Model, check
from vlm.local.model.lora import Layout
from vlm.local.model.stock import StockText
from vlm.local.registry import LocalServiceClient
from vlm.prompts import PREFILL, QUESTION, Prompt
from vlm.scoring import score_choices
from vlm.server.openai.chat import conversation
from vlm.server.openai.requests import ChatRequest

CHOICES = [[5, 6, 9], [5, 7, 9], [5, 7, 8, 9], [11, 9], [12, 5, 6, 9]]


@pytest.fixture(scope="module", params=SEEING)
def side(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    kind = request.param
    folder, state = seeing_model(tmp_path_factory.mktemp(kind), kind), tmp_path_factory.mktemp("state")
    service = LocalServiceClient(state)
    yield Side(service, folder, state, AutoModelForImageTextToText.from_pretrained(folder).eval())
    service.close()


@pytest.fixture(scope="module")
def asked(examples: list[Pictured], rule: ImageRule) -> list[tinker.ModelInput]:
    """About one image, two, one of another size, and none."""
    one, two, three = (image_chunk(each.image, rule) for each in examples[:3])
    mixed = [[[300, 301], one, [302, 303]], [[4079], two, [4080, 7, 4079], three, [4080, 9]], [[8], three, [9, 10, 11]]]
    return [model_input(*parts) for parts in (*mixed, [[300, 301, 302]])]


def test_loss_and_gradients_equal_stock_peft(side: Side, asked: list[tinker.ModelInput], rule: ImageRule) -> None:
    client, data = side.start(), [datum(each, [20 + n, 30, 40 + n]) for n, each in enumerate(asked)]
    plain = plain_peft(client, side.stock)
    expected = plain_loss(plain, data, rule)
    expected.backward()
    got = client.forward_backward(data, "cross_entropy").result().metrics["loss:sum"]
    assert got == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients_equal(client, plain)


def test_samples_log_probs_and_scores_are_the_stock_models(
    side: Side, asked: list[tinker.ModelInput], rule: ImageRule
) -> None:
    sampler = side.base()
    together = sampler.sample_batch(asked, params(6))
    for each, response in zip(asked, together, strict=True):
        expected = stock_log_probs(side.stock, each, rule)[:-1]
        got = sampler.compute_logprobs(each).result()
        ids = _ids(each)
        own = [None if token == IMAGE else float(expected[n, token]) for n, token in enumerate(ids[1:])]
        assert [value is None for value in got[1:]] == [value is None for value in own]
        assert [v for v in got[1:] if v is not None] == pytest.approx(
            [v for v in own if v is not None], abs=1e-4, rel=1e-5
        )
        assert response.sequences[0].tokens == greedy(side.stock, each, rule, 6)
    for method in ("constrained", "likelihood"):
        scores = score_choices(sampler, asked, CHOICES, method)
        for row, each in zip(scores, asked, strict=True):
            assert row == pytest.approx(
                brute_force.scores(side.stock, each, CHOICES, rule, IMAGE)[method], abs=1e-4, rel=1e-5
            )


def test_an_image_goes_through_a_frozen_tower_once(side: Side, asked: list[tinker.ModelInput]) -> None:
    service = LocalServiceClient(side.state)
    client = service.create_lora_training_client(str(side.folder), rank=2, seed=0).result()
    data = [datum(each, [5, 6]) for each in asked]
    losses = [client.forward_backward(data, "cross_entropy").result().metrics["loss:sum"] for _ in range(2)]
    sampler = client.save_weights_and_get_sampling_client().result()
    sampler.sample_batch(asked, params(2))
    assert client.tower_forwards == sampler.tower_forwards == 3
    assert losses[0] == losses[1]
    service.close()


def test_an_image_that_was_counted_otherwise_is_refused(side: Side, asked: list[tinker.ModelInput]) -> None:
    chunk: Any = asked[0].chunks[1]
    wrong = types.ImageChunk(data=chunk.data, format=chunk.format, expected_tokens=chunk.expected_tokens + 1)
    with pytest.raises(
        RequestError, match=f"Expected {wrong.expected_tokens} tokens, got {chunk.expected_tokens} from"
    ):
        side.base().compute_logprobs(model_input([5], wrong, [6])).result()
    with pytest.raises(RequestError, match=f"token {IMAGE} stands for image features"):
        side.base().compute_logprobs(model_input([5, IMAGE, 6])).result()


TURNS = {
    "glm4v": "[gMASK]<sop><|user|>\n<|begin_of_image|><|image|><|end_of_image|>{}<|assistant|>\n{}",
    "qwen": "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n{}",
}


def test_a_prompt_has_the_models_own_marks_around_an_image(side: Side, examples: list[Pictured]) -> None:
    sampler = side.base()
    prompt, encode = Prompt(sampler.get_tokenizer(), sampler.rule, ("a", "b")), sampler.get_tokenizer().encode
    expected = TURNS.get(side.stock.config.model_type, TURNS["qwen"]).format(QUESTION, PREFILL)
    assert prompt.as_text() == expected
    whole, image = encode(expected), image_chunk(examples[0].image, sampler.rule)
    at = whole.index(IMAGE)
    assert prompt.question(examples[0].image).chunks == model_input(whole[:at], image, whole[at + 1 :]).chunks
    content = [{"type": "image_url", "image_url": {"url": "data:,"}}, {"type": "text", "text": QUESTION}]
    request = ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": content}]})
    assert f"{conversation(request, sampler.get_tokenizer()).text}{PREFILL}" == expected


@pytest.mark.filterwarnings("ignore")  # of PEFT and of what it calls in transformers
def test_merged_it_is_the_adapter_over_the_model(side: Side, asked: list[tinker.ModelInput], tmp_path: Path) -> None:
    client = side.start()
    folder = folder_of(side.state, client.save_weights_for_sampler("merged").result().path)
    assert export(folder, tmp_path / "merged", "merged").prompts == 8
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    sampler, rule = client.save_weights_and_get_sampling_client().result(), side.base().rule
    for each in asked:
        assert (logits_of(sampler, each) - stock_logits(merged, each, rule)).abs().max() < 1e-3


def test_heads_that_predict_several_tokens_are_left_out(tmp_path: Path) -> None:
    """Those of published Qwen3.5 checkpoints, which transformers does not compute."""
    folder = seeing_model(tmp_path, "qwen3_5")
    with_weights(folder, {"mtp.fc.weight": torch.zeros(3, 3)})
    check(str(folder), images=True)
    with_weights(folder, {"other.fc.weight": torch.zeros(3, 3)})
    with pytest.raises(ModelError, match="has 1 tensors that the model does not know, first other"):
        check(str(folder), images=True)


def test_lora_on_a_tower_is_refused_where_the_packed_way_has_none(side: Side, tmp_path: Path) -> None:
    service = LocalServiceClient(tmp_path, train_vision=True)
    with pytest.raises(RequestError, match=r"no LoRA is computed on the vision tower of a \w+; leave it frozen"):
        service.create_lora_training_client(str(side.folder), rank=2).result()
    service.close()


def _ids(each: tinker.ModelInput) -> list[int]:
    parts = ([IMAGE] * chunk.length if isinstance(chunk, types.ImageChunk) else chunk.tokens for chunk in each.chunks)
    return [token for part in parts for token in part]


# Qwen3-VL by both ways


def _both(folder: Path, tmp_path: Path) -> list[LocalServiceClient]:
    """A service that computes a family with a row as packed, and one that has the stock forward compute it."""
    services = [LocalServiceClient(tmp_path / way) for way in ("packed", "stock")]
    for service, model in zip(services, (Model(str(folder)), Model(str(folder))), strict=True):
        if service is services[1]:
            model.text = StockText(model.stock)
            model.layout = cache(partial(Layout, model.stock, together=False))
        service._registry.engines[str(folder)] = Engine(model)
    return services


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_the_stock_way_on_qwen3_vl_equals_the_packed_one(
    kind: str, random_model: RandomModel, asked: list[tinker.ModelInput], tmp_path: Path
) -> None:
    folder = random_model(kind, tied=True)
    data = [datum(each, [20 + n, 30, 40 + n]) for n, each in enumerate(asked)]
    found = []
    for service in _both(folder, tmp_path):
        client = service.create_lora_training_client(str(folder), rank=4, seed=0).result()
        disturb(client)
        loss = client.forward_backward(data, "cross_entropy").result().metrics["loss:sum"]
        gradients, sampler = taken(client), client.save_weights_and_get_sampling_client().result()
        written = [each.sequences[0].tokens for each in sampler.sample_batch(asked, params(5))]
        scores = score_choices(sampler, asked, CHOICES, "likelihood")
        features = sampler.embed_prompts(asked[:1], tower=True, hidden=True)
        found.append((loss, gradients, written, scores, features, type(client._engine.model.text).__name__))
        service.close()
    packed, stock = found
    assert (packed[-1], stock[-1]) == ("Text", "StockText")
    assert stock[0] == pytest.approx(packed[0], rel=1e-5)
    assert packed[1].keys() == stock[1].keys()
    for name, gradient in packed[1].items():
        assert (stock[1][name] - gradient).norm() <= 1e-5 * gradient.norm().clamp(min=1e-3), name
    assert stock[2] == packed[2]
    assert stock[3] == pytest.approx(packed[3], abs=1e-4)
    assert stock[4] == pytest.approx(packed[4], abs=1e-4)
