"""What the tests of vlm share beside fixtures: class names, an example, and the same by transformers and PEFT alone."""

import copy
import warnings
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import pytest
import tinker
import torch
from peft import get_peft_model, set_peft_model_state_dict
from tinker import types

from kshot.images import open_image
from vlm import smollm2
from vlm.inputs import ImageRule
from vlm.local.clients import LocalSamplingClient, LocalTrainingClient
from vlm.local.model.attention import Causal

IMAGE = 4082  # the nano tokenizer's <|image_pad|>
CLASSES = ("star", "car", "cart", "crocodile", "crocodile head", "café ☕")


@dataclass(frozen=True)
class Pictured:
    """An example as `vlm.classifier` takes it."""

    image: bytes
    label: int
    mirrored: bytes | None = None


class OtherService:
    """The same weights behind the SDK's `sample` alone, as every other service offers them."""

    def __init__(self, inner: LocalSamplingClient) -> None:
        self.sample = inner.sample


def stock_inputs(datum_input: tinker.ModelInput, rule: ImageRule, image: int = IMAGE) -> dict[str, torch.Tensor]:
    """What the stock forward takes for one model input, made by the stock image processor. image: <|image_pad|>."""
    ids: list[int] = []
    images = []
    for chunk in datum_input.chunks:
        if isinstance(chunk, types.ImageChunk):
            images.append(rule.processor(images=[open_image(chunk.data)], return_tensors="pt"))
            ids += [image] * chunk.length
        else:
            assert isinstance(chunk, types.EncodedTextChunk)
            ids += chunk.tokens
    inputs = {"input_ids": torch.tensor([ids])}
    if images:
        inputs["pixel_values"] = torch.cat([i["pixel_values"] for i in images])
        inputs["image_grid_thw"] = torch.cat([i["image_grid_thw"] for i in images])
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == image).int()
    return inputs


def greedy(model: Any, prompt: tinker.ModelInput, rule: ImageRule, length: int) -> list[int]:
    """What the model's own generate writes."""
    inputs = stock_inputs(prompt, rule)
    written = model.generate(**inputs, max_new_tokens=length, do_sample=False, eos_token_id=-1, pad_token_id=0)
    tokens: list[int] = written[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens


def logits_of(client: LocalSamplingClient, asked: tinker.ModelInput) -> torch.Tensor:
    """(positions, vocabulary) of a prompt, by the engine."""
    engine, factors = client._engine, client._snapshot
    with torch.inference_mode():
        batch = engine.collate([asked], factors)
        return engine.model.text.logits(engine.model.text.hidden(batch.inputs, Causal(batch.rows), factors), factors)


def stock_logits(model: Any, asked: tinker.ModelInput, rule: ImageRule) -> torch.Tensor:
    """The same by transformers, and PEFT."""
    with torch.inference_mode():
        logits: torch.Tensor = model(**stock_inputs(asked, rule)).logits[0].float()
    return logits


def adapter_of(client: LocalTrainingClient) -> dict[str, torch.Tensor]:
    """PEFT's name → a view of the run's tensor."""
    return {name: tensor.detach() for name, tensor in client._run.adapter.named().items()}


def gradients_of(client: LocalTrainingClient) -> dict[str, torch.Tensor]:
    """PEFT's name → the view of that tensor's accumulated gradient."""
    run = client._run
    flats = {device: master.grad for device, master in run._masters.items() if master.grad is not None}
    return {name: piece.of(flats) for name, piece in run.adapter.layout.pieces.items()}


def taken(client: LocalTrainingClient) -> dict[str, torch.Tensor]:
    """The gathered gradients, and forget them."""
    gradients = {name: gradient.clone() for name, gradient in gradients_of(client).items()}
    client._run.clear_gradients()
    return gradients


def assert_gradients_equal(client: LocalTrainingClient, plain: Any) -> None:
    """Those of a run and of the same adapter under PEFT, each tensor to 3e-5 of its norm: float32 rounds as much
    where a state recurs."""
    theirs = {name.replace(".default.", "."): p.grad for name, p in plain.named_parameters() if p.grad is not None}
    ours = gradients_of(client)
    assert len(ours) == len(theirs)
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).norm() <= 3e-5 * theirs[name].norm().clamp(min=1e-3), name


def disturb(client: LocalTrainingClient, seed: int = 0) -> None:
    """Give B random values: at its zeros, A has no gradient and a wrong A would not be seen."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in adapter_of(client).items():
        if ".lora_B." in name:
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))


def plain_peft(client: LocalTrainingClient, stock: Any) -> Any:
    """A stock model under stock PEFT with this run's adapter, loaded from what the client would save."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = get_peft_model(copy.deepcopy(stock), client._run.adapter.layout.config())
    found = set_peft_model_state_dict(plain, adapter_of(client))
    assert not found.unexpected_keys
    return plain


def plain_loss(plain: Any, data: list[tinker.Datum], rule: ImageRule) -> torch.Tensor:
    """Σ −log p · weight of each datum in a forward pass of its own, all logits."""
    total = torch.zeros(())
    for datum in data:
        log_probs = plain(**stock_inputs(datum.model_input, rule)).logits[0].float().log_softmax(-1)
        targets = datum.loss_fn_inputs["target_tokens"].to_torch()
        picked = log_probs.gather(1, targets[:, None])[:, 0]
        total = total - (picked * datum.loss_fn_inputs["weights"].to_torch()).sum()
    return total


def needs_smollm2() -> None:
    """Skip the test where the weights of SmolLM2, or what reads them, are not installed."""
    for package in ("gguf", smollm2.PACKAGE):
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed: {smollm2.INSTALL}")
