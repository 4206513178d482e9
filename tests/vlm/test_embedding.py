"""Features of the model's own against stock transformers and PEFT: the tower's mean, the last hidden state."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
import torch

from kshot.errors import ImageError, RequestError, UnknownNameError
from tests.vlm.helpers import OtherService, Pictured, disturb, plain_peft, stock_inputs
from vlm import nano
from vlm.embedding import FEATURES, Embedder, embed, embed_images
from vlm.inputs import ImageRule
from vlm.local.clients import LocalSamplingClient, LocalTrainingClient
from vlm.local.model.packed import Text
from vlm.local.registry import LocalServiceClient
from vlm.prompts import Prompt


@pytest.fixture
def asked(prompt: Prompt, examples: list[Pictured]) -> list[tinker.ModelInput]:
    """Questions about images of three sizes."""
    return [prompt.question(e.image) for e in examples[:6]]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every pass of the text model."""
    seen: list[int] = []
    original = Text.hidden

    def noted(self: Text, given: Any, attention: Any, *args: Any) -> torch.Tensor:
        seen.append(attention.rows.count)
        return original(self, given, attention, *args)

    monkeypatch.setattr(Text, "hidden", noted)
    return seen


@torch.no_grad()
def expected(model: Any, prompts: list[tinker.ModelInput], rule: ImageRule) -> dict[str, np.ndarray]:
    """Row of FEATURES → what a stock Qwen3VLModel says, prompt by prompt; the tower's mean in numpy."""
    tower, hidden = [], []
    for each in prompts:
        inputs = stock_inputs(each, rule)
        model.rope_deltas = None
        hidden.append(model(**inputs).last_hidden_state[0, -1].float().numpy())
        (image,) = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        tower.append(image.float().numpy().astype(np.float64).mean(0))
    return {"tower": np.array(tower), "hidden": np.array(hidden), "tower+hidden": np.hstack([tower, hidden])}


@pytest.mark.parametrize("what", FEATURES)
def test_features_equal_the_stock_models(
    what: str, sampler: LocalSamplingClient, stock: Any, asked: list[tinker.ModelInput], rule: ImageRule
) -> None:
    got = embed(sampler, asked, what)
    assert got.dtype == np.float32
    reference = expected(stock.model, asked, rule)[what]
    assert np.abs(reference).max() > 0.1
    assert np.ptp(reference, 0).max() > 0.1  # the images differ in it
    np.testing.assert_allclose(got, reference, atol=1e-4)


def test_hidden_of_any_prompt_is_what_the_head_turns_into_the_next_token(
    sampler: LocalSamplingClient, stock: Any, prompt: Prompt, prompts: list[tinker.ModelInput], rule: ImageRule
) -> None:
    """Also about two images, or none."""
    some = [*prompts[3:], prompt.without_image()]
    for row, each in zip(embed(sampler, some, "hidden"), some, strict=True):
        with torch.no_grad():
            logits = stock(**stock_inputs(each, rule)).logits[0, -1]
            np.testing.assert_allclose(stock.lm_head(torch.from_numpy(row)), logits, atol=1e-4)


@pytest.mark.parametrize("limit", ["ROWS", "POSITIONS"])
def test_company_order_and_passes_change_no_more_than_rounding(
    limit: str,
    sampler: LocalSamplingClient,
    asked: list[tinker.ModelInput],
    passes: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = embed(sampler, asked, "tower+hidden")
    assert passes == [6]
    backwards = embed(sampler, asked[::-1], "tower+hidden")[::-1]
    monkeypatch.setattr(f"vlm.local.scoring.{limit}", {"ROWS": 2, "POSITIONS": 130}[limit])
    parts = embed(sampler, asked, "tower+hidden")
    assert len(passes) >= 5
    assert max(passes[2:]) == 2
    alone = np.concatenate([embed(sampler, [each], "tower+hidden") for each in asked])
    width = whole.shape[1] // 2
    for other in (backwards, parts, alone):
        np.testing.assert_allclose(other, whole, atol=1e-4)
        np.testing.assert_array_equal(other[:, :width], whole[:, :width])  # the tower's: bit for bit


def test_the_tower_alone_makes_no_text_pass_and_sees_an_image_once(
    service: LocalServiceClient, prompt: Prompt, make_image: Callable[..., bytes], passes: list[int]
) -> None:
    sampler = service.create_sampling_client(base_model=nano.NAME).result()
    vision = sampler._engine.vision
    asked = [prompt.question(make_image(seed, 64, 96)) for seed in range(500, 503)]
    before = vision.forwards
    first = embed(sampler, asked, "tower")
    assert vision.forwards == before + 3
    np.testing.assert_array_equal(embed(sampler, asked, "tower"), first)
    assert not passes
    np.testing.assert_array_equal(embed(sampler, asked, "tower+hidden")[:, : first.shape[1]], first)
    assert vision.forwards == before + 3
    assert passes == [3]


def test_an_adapter_of_the_text_model_changes_the_hidden_state_alone(
    client: LocalTrainingClient,
    sampler: LocalSamplingClient,
    stock: Any,
    asked: list[tinker.ModelInput],
    rule: ImageRule,
) -> None:
    disturb(client)
    tuned = client.save_weights_and_get_sampling_client().result()
    reference = expected(plain_peft(client, stock).base_model.model.model, asked, rule)
    got = embed(tuned, asked, "hidden")
    np.testing.assert_allclose(got, reference["hidden"], atol=1e-4)
    assert np.abs(got - embed(sampler, asked, "hidden")).max(1).min() > 0.1
    np.testing.assert_array_equal(embed(tuned, asked, "tower"), embed(sampler, asked, "tower"))


def test_an_adapter_of_the_tower_changes_its_features(
    sampler: LocalSamplingClient, stock: Any, asked: list[tinker.ModelInput], rule: ImageRule, tmp_path: Path
) -> None:
    service = LocalServiceClient(tmp_path, train_vision=True)
    client = service.create_lora_training_client(nano.NAME, rank=4, seed=7).result()
    disturb(client)
    tuned = client.save_weights_and_get_sampling_client().result()
    reference = expected(plain_peft(client, stock).base_model.model.model, asked, rule)
    vision = client._engine.vision
    got = embed(tuned, asked, "tower+hidden")
    assert vision.forwards == len(asked)  # both features from one
    service.close()
    np.testing.assert_allclose(got, reference["tower+hidden"], atol=1e-4)
    assert np.abs(got - embed(sampler, asked, "tower+hidden")).max(1).min() > 0.1


def test_bfloat16_comes_back_as_float32_and_is_averaged_in_it(
    sampler: LocalSamplingClient, asked: list[tinker.ModelInput], tmp_path: Path
) -> None:
    service = LocalServiceClient(tmp_path, dtype=torch.bfloat16)
    half = service.create_sampling_client(base_model=nano.NAME).result()
    tower, hidden = (embed(half, asked, what) for what in ("tower", "hidden"))
    service.close()
    assert tower.dtype == hidden.dtype == np.float32
    np.testing.assert_array_equal(torch.from_numpy(hidden).bfloat16().float().numpy(), hidden)
    for row, each in zip(tower, asked, strict=True):
        values = half._engine.vision.features([each.chunks[1]])[0].values[0]  # type: ignore[list-item]
        assert values.dtype == torch.bfloat16
        np.testing.assert_allclose(row, values.float().numpy().astype(np.float64).mean(0), atol=1e-5)
    for what, got in (("tower", tower), ("hidden", hidden)):
        for one, other in zip(got, embed(sampler, asked, what), strict=True):
            assert one @ other > 0.99 * np.linalg.norm(one) * np.linalg.norm(other), what


def test_images_are_asked_about_in_windows(
    sampler: LocalSamplingClient,
    stock: Any,
    prompt: Prompt,
    examples: list[Pictured],
    rule: ImageRule,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images, sizes = [e.image for e in examples[:7]], list[int]()
    original = LocalSamplingClient.embed_prompts

    def noted(self: LocalSamplingClient, prompts: Any, **asked: bool) -> np.ndarray:
        sizes.append(len(prompts))
        return original(self, prompts, **asked)

    monkeypatch.setattr(LocalSamplingClient, "embed_prompts", noted)
    monkeypatch.setattr("vlm.classifier.WINDOW", 3)
    got = embed_images(sampler, images, prompt, "tower+hidden")
    assert sizes == [3, 3, 1]
    reference = expected(stock.model, [prompt.question(image) for image in images], rule)
    np.testing.assert_allclose(got, reference["tower+hidden"], atol=1e-4)


@pytest.mark.parametrize("what", FEATURES)
def test_no_prompts_have_features_of_the_right_width(
    what: str, sampler: LocalSamplingClient, stock: Any, prompt: Prompt
) -> None:
    width = stock.config.text_config.hidden_size * (2 if what == "tower+hidden" else 1)
    for got in (embed(sampler, [], what), embed_images(sampler, [], prompt, what)):
        assert got.shape == (0, width)
        assert got.dtype == np.float32


def test_what_cannot_be_asked_is_named(
    sampler: LocalSamplingClient, asked: list[tinker.ModelInput], prompts: list[tinker.ModelInput], prompt: Prompt
) -> None:
    with pytest.raises(UnknownNameError, match=r"'towr'.*'tower'.*: tower, hidden, tower\+hidden"):
        embed(sampler, asked, "towr")
    for what in ("tower", "tower+hidden"):
        with pytest.raises(RequestError, match="prompt 6 holds 2 images"):
            embed(sampler, [*asked, prompts[3]], what)
        with pytest.raises(RequestError, match="prompt 0 holds 0 images"):
            embed(sampler, [prompt.without_image()], what)
    with pytest.raises(RequestError, match="0 positions"):
        embed(sampler, [tinker.ModelInput(chunks=[])], "hidden")
    with pytest.raises(ImageError):
        embed_images(sampler, [b"no image"], prompt, "tower")


def test_services_without_features_are_named(sampler: LocalSamplingClient, asked: list[tinker.ModelInput]) -> None:
    assert not issubclass(tinker.SamplingClient, Embedder)  # the hosted service and every server over http
    with pytest.raises(RequestError, match=r"features 'hidden' need the local service.*--service local"):
        embed(OtherService(sampler), asked, "hidden")  # type: ignore[arg-type]
