"""Requests that do not fit the model: each a named error, and the run stays as it was."""

from typing import Any

import numpy as np
import pytest
import tinker
from tinker import types

from kshot.errors import ImageError, RequestError, UnknownNameError
from tests.vlm.helpers import IMAGE, Pictured
from vlm import nano
from vlm.local.clients import LocalTrainingClient
from vlm.local.registry import LocalServiceClient
from vlm.prompts import Prompt

ADAM = types.AdamParams(learning_rate=3e-3, eps=1e-8)


def ones(length: int, dtype: type = np.float32) -> tinker.TensorData:
    return tinker.TensorData.from_numpy(np.ones(length, dtype))


BAD: dict[str, dict[str, Any]] = {  # what is changed in a good datum, and what the error must name
    "no targets": {"fields": None, "named": "target_tokens"},
    "two lengths": {"fields": {"weights": ones(5)}, "named": "one length"},
    "not the input's length": {
        "fields": {"weights": ones(5), "target_tokens": ones(5, np.int64)},
        "named": "5 entries",
    },
    "advantages": {"fields": {"advantages": ones(5)}, "named": "advantages"},
    "off the vocabulary": {"chunks": [types.EncodedTextChunk(tokens=[5, 4096])], "named": "4096"},
    "a placeholder": {"chunks": [types.EncodedTextChunk(tokens=[5, IMAGE])], "named": "ImageChunk"},
    "an audio chunk": {"chunks": [types.ImageAssetPointerChunk(location="a", format="png")], "named": "not supported"},
    "side by side": {"chunks": "twice", "named": "side by side"},
    "empty": {"chunks": [], "named": "0 positions"},
    "too long": {"chunks": [types.EncodedTextChunk(tokens=[5] * 4097)], "named": "4097 positions"},
    "ignored target": {"fields": {"target_tokens": "-100"}, "named": "target -100"},
    "miscounted image": {"expected_tokens": 17, "named": "Expected 17 tokens, got 16"},
}


def spoiled(good: tinker.Datum, change: dict[str, Any]) -> tinker.Datum:
    fields = {**good.loss_fn_inputs, **(change.get("fields") or {})}
    if isinstance(fields["target_tokens"], str):  # torch would take -100 for "leave this one out"
        targets = good.loss_fn_inputs["target_tokens"].to_numpy().copy()
        targets[-1] = -100
        fields["target_tokens"] = tinker.TensorData.from_numpy(targets)
    chunks = change.get("chunks", good.model_input.chunks)
    if chunks == "twice":
        chunks = [good.model_input.chunks[1]] * 2
    if "expected_tokens" in change:
        chunks = [types.ImageChunk(data=good.model_input.chunks[1].data, format="jpeg", expected_tokens=17)]  # type: ignore[union-attr]
    if change.get("fields", {}) is None:
        fields = {}
    return tinker.Datum(model_input=tinker.ModelInput(chunks=chunks), loss_fn_inputs=fields)


@pytest.mark.parametrize("kind", BAD)
def test_requests_that_do_not_fit_are_named(
    kind: str, client: LocalTrainingClient, prompt: Prompt, examples: list[Pictured]
) -> None:
    datum = spoiled(prompt.datum(examples[0].image, 0), BAD[kind])
    with pytest.raises(RequestError, match=BAD[kind]["named"]):
        client.forward_backward([datum], "cross_entropy").result()


def test_other_bad_requests_are_named(client: LocalTrainingClient, mixed: list[tinker.Datum]) -> None:
    with pytest.raises(UnknownNameError, match="cross_entropy"):
        client.forward_backward(mixed, "gspo").result()
    with pytest.raises(RequestError, match="no configuration"):
        client.forward_backward(mixed, "cross_entropy", {"clip": 0.1}).result()
    with pytest.raises(RequestError, match="forward_backward first"):
        client.optim_step(ADAM).result()
    with pytest.raises(RequestError, match="one AdamParams"):
        client.optim_step()
    with pytest.raises(RequestError, match="one AdamParams"):
        client.optim_step(types.DimuonParams(learning_rate=1e-3))
    client.forward_backward(mixed, "cross_entropy").result()
    bad: list[dict[str, float]] = [
        {"grad_clip_norm": -1.0},
        {"grad_clip_norm": float("nan")},
        {"learning_rate": float("inf")},
        {"weight_decay": float("nan")},
        {"beta1": 1.0},
        {"beta2": 1.5},
        {"eps": 0.0},
    ]
    for wrong in bad:
        with pytest.raises(RequestError, match=f"{next(iter(wrong))} = "):
            client.optim_step(types.AdamParams(**wrong)).result()
    broken = tinker.ModelInput(chunks=[types.ImageChunk(data=b"no image", format="png")])
    with pytest.raises(ImageError):
        client.forward(
            [tinker.Datum(model_input=broken, loss_fn_inputs=mixed[0].loss_fn_inputs)], "cross_entropy"
        ).result()


def test_creation_that_cannot_be_is_named(service: LocalServiceClient) -> None:
    with pytest.raises(UnknownNameError, match="unknown model 'kshot/nano'"):
        service.create_lora_training_client("kshot/nano").result()
    for seed in (-1, 2**64, 1.5):
        with pytest.raises(RequestError, match="seed"):
            service.create_lora_training_client(nano.NAME, seed=seed)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="trains nothing"):
        service.create_lora_training_client(nano.NAME, rank=0).result()
