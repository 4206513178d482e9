"""Training requests that do not fit the model: each a named error. Others: `test_conformance_mistakes.py`."""

from dataclasses import replace
from typing import Any

import pytest
import tinker
from tinker import types

from kshot.errors import RequestError
from tests.vlm.helpers import IMAGE, Pictured
from vlm import nano
from vlm.local.clients import LocalTrainingClient
from vlm.local.registry import LocalServiceClient
from vlm.prompts import Prompt

BAD: dict[str, tuple[list[Any] | None, str]] = {  # the chunks of the input, and what the error must name
    "a placeholder": ([types.EncodedTextChunk(tokens=[5, IMAGE])], "ImageChunk"),
    "an asset": ([types.ImageAssetPointerChunk(location="a", format="png")], "not supported"),
    "images side by side": (None, "side by side"),
    "empty": ([types.EncodedTextChunk(tokens=[])], "0 positions"),
    "too long": ([types.EncodedTextChunk(tokens=[5] * 4097)], "4097 positions"),
}


@pytest.mark.parametrize("kind", BAD)
def test_inputs_that_do_not_fit_are_named(
    kind: str, client: LocalTrainingClient, prompt: Prompt, examples: list[Pictured]
) -> None:
    good, (chunks, named) = prompt.datum(examples[0].image, 0), BAD[kind]
    datum = replace(good, model_input=tinker.ModelInput(chunks=chunks or [good.model_input.chunks[1]] * 2))
    with pytest.raises(RequestError, match=named):
        client.forward_backward([datum], "cross_entropy").result()


def test_a_target_is_never_ignored(client: LocalTrainingClient, prompt: Prompt, examples: list[Pictured]) -> None:
    """torch would take -100 for "leave this one out"."""
    datum = prompt.datum(examples[0].image, 0)
    datum.loss_fn_inputs["target_tokens"].to_numpy()[-1] = -100
    with pytest.raises(RequestError, match="target -100"):
        client.forward_backward([datum], "cross_entropy").result()


def test_parameters_of_adam_out_of_range_are_named(client: LocalTrainingClient, mixed: list[tinker.Datum]) -> None:
    with pytest.raises(RequestError, match="one AdamParams"):
        client.optim_step()
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


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5])
def test_seeds_that_are_none_are_named(service: LocalServiceClient, seed: Any) -> None:
    with pytest.raises(RequestError, match="seed"):
        service.create_lora_training_client(nano.NAME, seed=seed)
