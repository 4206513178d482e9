"""Adapters of dense models and of experts, with and without the vision tower, against stock transformers and PEFT."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tinker
import torch
from peft import PeftModel, get_peft_model_state_dict
from tinker import types
from transformers import AutoModelForImageTextToText

from kshot.errors import RequestError
from tests.vlm.checkpoints import RandomModel
from tests.vlm.helpers import (
    CLASSES,
    Pictured,
    adapter_of,
    assert_gradients_equal,
    disturb,
    greedy,
    plain_loss,
    plain_peft,
)
from tests.vlm.services import step
from vlm.classifier import predict
from vlm.inputs import ImageRule, model_input
from vlm.local.clients import LocalTrainingClient
from vlm.local.model.lora import LoraSpec
from vlm.local.registry import LocalServiceClient
from vlm.prompts import Prompt

ADAM = types.AdamParams(learning_rate=1e-2, eps=1e-8)


@pytest.fixture(scope="module")
def folders(random_model: RandomModel) -> dict[str, Path]:
    return {"dense": random_model("dense", tied=True), "sparse": random_model("sparse", tied=False)}


Start = Callable[[str, bool], LocalTrainingClient]


@pytest.fixture(scope="module")
def start(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Start:
    """A new run on the dense or the sparse model, with or without LoRA on the tower."""
    services = {
        vision: LocalServiceClient(tmp_path_factory.mktemp("state"), train_vision=vision) for vision in (False, True)
    }

    def make(kind: str, vision: bool) -> LocalTrainingClient:
        return services[vision].create_lora_training_client(str(folders[kind]), rank=4, seed=3).result()

    return make


@pytest.fixture(scope="module")
def plain(folders: dict[str, Path]) -> Callable[[str], Any]:
    return lambda kind: AutoModelForImageTextToText.from_pretrained(folders[kind]).eval()


KINDS = pytest.mark.parametrize(("kind", "vision"), [(k, v) for k in ("dense", "sparse") for v in (False, True)])


@KINDS
def test_loss_and_gradients_equal_stock_peft(
    kind: str, vision: bool, start: Start, plain: Any, mixed: list[tinker.Datum], rule: ImageRule
) -> None:
    client = start(kind, vision)
    disturb(client)
    theirs = plain_peft(client, plain(kind))
    assert set(get_peft_model_state_dict(theirs, save_embedding_layers=False)) == set(adapter_of(client))
    expected = plain_loss(theirs, mixed, rule)
    expected.backward()
    got = client.forward_backward(mixed, "cross_entropy").result().metrics["loss:sum"]
    assert got == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients_equal(client, theirs)
    touched = [name for name in adapter_of(client) if ".visual." in name]
    assert len(touched) == (2 * 4 * 4 if vision else 0)
    assert not any(".mlp.gate." in name for name in adapter_of(client))  # the router is never trained


@KINDS
def test_the_files_load_in_stock_peft_and_merged_too(
    kind: str, vision: bool, start: Start, plain: Any, mixed: list[tinker.Datum], rule: ImageRule
) -> None:
    client = start(kind, vision)
    disturb(client)
    client.save_state("peft").result()
    folder = next(p for p in client._state.rglob(f"{client.model_id.replace(':', '_')}/weights/peft"))
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        base = plain(kind)
        if kind == "dense":  # merging into a tied head would change the embeddings
            base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.clone())
            base.config.tie_word_embeddings = base.config.text_config.tie_word_embeddings = False
        loaded = PeftModel.from_pretrained(base, folder)
        before = plain_loss(loaded, mixed, rule).item()
        after = plain_loss(loaded.merge_and_unload(), mixed, rule).item()
    ours = client.forward(mixed, "cross_entropy").result().metrics["loss:sum"]
    assert before == pytest.approx(ours, rel=1e-5)
    assert after == pytest.approx(ours, rel=1e-4)


@KINDS
def test_training_goes_on_from_a_checkpoint_and_samples_what_it_learnt(
    kind: str, vision: bool, start: Start, prompt: Prompt, examples: list[Pictured], mixed: list[tinker.Datum]
) -> None:
    client = start(kind, vision)
    losses = [step(client, mixed, ADAM) for _ in range(3)]
    assert losses[-1] < losses[0]
    path = client.save_state("resume").result().path
    again = [step(client, mixed, ADAM) for _ in range(2)]
    client.load_state_with_optimizer(path).result()
    assert [step(client, mixed, ADAM) for _ in range(2)] == again
    sampler = client.save_weights_and_get_sampling_client().result()
    images = [e.image for e in examples[:3]]
    one_pass = predict(sampler, images, prompt, "likelihood")
    for row, image in zip(one_pass, images, strict=True):  # the SDK's own way, from compute_logprobs of each answer
        for score, choice in zip(row, prompt.choices, strict=True):
            question = prompt.question(image)
            log_probs = sampler.compute_logprobs(model_input(*question.chunks, choice)).result()[question.length :]
            assert score == pytest.approx(sum(v for v in log_probs if v is not None), abs=1e-3)


def test_an_expert_model_samples_as_stock_generate(start: Start, plain: Any, prompt: Prompt, rule: ImageRule) -> None:
    sampler = start("sparse", False).save_weights_and_get_sampling_client().result()
    asked = model_input(prompt.tokenizer.encode(" ".join(CLASSES)))
    params = types.SamplingParams(max_tokens=8, temperature=0.0, stop=[])
    answer = sampler.sample(asked, 1, params).result().sequences[0].tokens
    assert answer == greedy(plain("sparse"), asked, rule, 8)


def test_an_adapter_that_trains_nothing_is_an_error() -> None:
    with pytest.raises(RequestError, match="trains nothing"):
        LoraSpec(rank=4, train_mlp=False, train_attn=False, train_unembed=False)
