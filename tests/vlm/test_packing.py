"""Packed rows: packed = padded = single, several packs = one, positions as the stock ones, the head where it counts."""

from typing import Any

import numpy as np
import pytest
import tinker
import torch
from tinker import types
from torch.nn.utils.rnn import pad_sequence

from kshot.errors import RequestError
from tests.vlm.helpers import IMAGE, Pictured, adapter_of, disturb, gradients_of, stock_inputs, taken
from vlm import nano
from vlm.classifier import predict
from vlm.inputs import ImageRule, image_chunk, model_input
from vlm.local import packs
from vlm.local.clients import LocalTrainingClient
from vlm.local.model.attention import Causal
from vlm.local.packs import groups
from vlm.local.registry import LocalServiceClient
from vlm.prompts import Prompt


@pytest.fixture
def inputs(mixed: list[tinker.Datum], rule: ImageRule, examples: list[Pictured]) -> list[tinker.ModelInput]:
    """Also one that ends with an image, and one that begins with it."""
    first, second = image_chunk(examples[0].image, rule), image_chunk(examples[2].image, rule)
    return [*(datum.model_input for datum in mixed), model_input([5, 6], first), model_input(second, [7])]


def test_packed_equals_padded_and_single(
    client: LocalTrainingClient, stock: Any, inputs: list[tinker.ModelInput], rule: ImageRule
) -> None:
    """The hidden states of a pack, of each row alone, and of the stock model on right-padded rows."""
    engine, model = client._engine, client._engine.model
    batch = engine.collate(inputs, None)
    with torch.no_grad():
        packed = model.text.hidden(batch.inputs, Causal(batch.rows), None).split(batch.rows.lengths)
        for each, together in zip(inputs, packed, strict=True):
            one = engine.collate([each], None)
            alone = model.text.hidden(one.inputs, Causal(one.rows), None)
            assert torch.allclose(alone, together, atol=1e-4)
        padded = _padded(stock, [stock_inputs(each, rule) for each in inputs])
    for row, together in enumerate(packed):
        assert torch.allclose(padded[row, : len(together)], together, atol=1e-4)


def _padded(stock: Any, rows: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    ids = pad_sequence([row["input_ids"][0] for row in rows], batch_first=True)
    mask = pad_sequence([torch.ones_like(row["input_ids"][0]) for row in rows], batch_first=True)
    pictures = [row for row in rows if "pixel_values" in row]
    hidden: torch.Tensor = stock.model(
        input_ids=ids,
        attention_mask=mask,
        mm_token_type_ids=(ids == IMAGE).int(),
        pixel_values=torch.cat([row["pixel_values"] for row in pictures]),
        image_grid_thw=torch.cat([row["image_grid_thw"] for row in pictures]),
    ).last_hidden_state
    return hidden


def test_positions_equal_the_stock_ones(
    client: LocalTrainingClient, stock: Any, inputs: list[tinker.ModelInput], rule: ImageRule
) -> None:
    """M-RoPE for images of several sizes, two in one prompt, none, at the beginning and at the end."""
    batch = client._engine.collate(inputs, None)
    ours = batch.inputs.position_ids.split(batch.rows.lengths, 1)
    for each, places, after in zip(inputs, ours, batch.next_position.tolist(), strict=True):
        row = stock_inputs(each, rule)
        kinds = row.get("mm_token_type_ids", torch.zeros_like(row["input_ids"]).int())
        expected, delta = stock.model.get_rope_index(
            row["input_ids"], mm_token_type_ids=kinds, image_grid_thw=row.get("image_grid_thw")
        )
        assert (places == expected[:, 0]).all()
        assert after == int(delta) + places.shape[1]


def test_the_head_at_positions_equals_the_full_head(
    client: LocalTrainingClient, inputs: list[tinker.ModelInput]
) -> None:
    """So does the last layer, which is asked for these positions alone."""
    disturb(client)
    model, factors = client._engine.model, client._run.factors
    batch = client._engine.collate(inputs, None)
    wanted = torch.tensor([3, 10, 11, batch.rows.lengths[0] + 2, int(batch.rows.row.shape[0]) - 1])
    with torch.no_grad():
        full = model.text.logits(model.text.hidden(batch.inputs, Causal(batch.rows), factors), factors)
        some = model.text.hidden(batch.inputs, Causal(batch.rows, wanted), factors)
    assert torch.allclose(model.text.logits(some, factors), full[wanted], atol=1e-3)


@pytest.mark.parametrize(("limit", "value"), [("packs.PACK", 60), ("engine.LOGITS", 5 * 4096)])
def test_several_packs_and_logits_in_parts_equal_those_at_once(
    client: LocalTrainingClient, mixed: list[tinker.Datum], limit: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    disturb(client)
    one = client.forward_backward(mixed, "cross_entropy").result()
    gradients = taken(client)
    monkeypatch.setattr(f"vlm.local.{limit}", value)
    several = client.forward_backward(mixed, "cross_entropy").result()
    assert several.metrics["loss:sum"] == pytest.approx(one.metrics["loss:sum"], rel=1e-5)
    for name, gradient in gradients_of(client).items():
        assert torch.allclose(gradient, gradients[name], atol=1e-4, rtol=1e-4), name


def test_a_bad_datum_stops_all_packs(
    client: LocalTrainingClient, mixed: list[tinker.Datum], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was gathered before stays gathered."""
    client.forward_backward(mixed[:1], "cross_entropy").result()
    before = {name: gradient.clone() for name, gradient in gradients_of(client).items()}
    monkeypatch.setattr(packs, "PACK", 60)
    short = tinker.Datum(model_input=mixed[3].model_input, loss_fn_inputs=mixed[2].loss_fn_inputs)
    with pytest.raises(RequestError, match="datum 3"):
        client.forward_backward([*mixed[:3], short], "cross_entropy").result()
    assert all(torch.equal(gradient, before[name]) for name, gradient in gradients_of(client).items())
    client.optim_step(types.AdamParams(learning_rate=1e-3)).result()


@pytest.mark.parametrize("fails", [1, 2])
def test_a_pass_that_fails_drops_what_was_gathered(
    client: LocalTrainingClient, mixed: list[tinker.Datum], fails: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it, and by the request's other passes. A step with a part of the gradients would be silent; without any it
    is an error, also in a pipeline, where the step was submitted behind the request."""
    client.forward_backward(mixed[:1], "cross_entropy").result()
    monkeypatch.setattr(packs, "PACK", 60)
    backward, calls = torch.Tensor.backward, []

    def full(*args: Any) -> None:
        calls.append(args)
        if len(calls) == fails:
            raise MemoryError("no memory left")
        backward(*args)

    monkeypatch.setattr(torch.Tensor, "backward", full)
    loss = client.forward_backward(mixed, "cross_entropy")
    step = client.optim_step(types.AdamParams(learning_rate=1e-3))
    with pytest.raises(MemoryError):
        loss.result()
    with pytest.raises(RequestError, match="forward_backward first"):
        step.result()


def test_the_callers_list_may_change_after_the_call(client: LocalTrainingClient, mixed: list[tinker.Datum]) -> None:
    alone = client.forward(mixed, "cross_entropy").result().metrics
    data = list(mixed)
    client.forward_backward(mixed, "cross_entropy")  # keeps the worker busy
    future = client.forward(data, "cross_entropy")
    data.clear()
    assert future.result().metrics == alone


def test_rows_of_one_length_go_together() -> None:
    """A long row beside short ones would make padding of most of a pass."""
    assert groups([10, 500, 10, 10], 8, 4096) == [[0, 2, 3], [1]]
    assert groups([5, 5, 5], 2, 4096) == [[0, 1], [2]]
    assert groups([100, 90, 80], 8, 200) == [[2, 1], [0]]
    assert groups([5000], 8, 4096) == [[0]]
    assert groups([], 8, 4096) == []


def test_weights_that_are_all_zero_give_a_gradient_of_zero(
    client: LocalTrainingClient, mixed: list[tinker.Datum]
) -> None:
    """The SDK sends them for a custom loss that happens to be flat."""
    fields = dict(mixed[0].loss_fn_inputs)
    fields["weights"] = tinker.TensorData.from_numpy(np.zeros(mixed[0].model_input.length, np.float32))
    flat = tinker.Datum(model_input=mixed[0].model_input, loss_fn_inputs=fields)
    before = {name: tensor.clone() for name, tensor in adapter_of(client).items()}
    assert client.forward_backward([flat], "cross_entropy").result().metrics["loss:sum"] == 0
    client.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_of(client).items())


def test_layers_on_several_devices(
    service: LocalServiceClient, mixed: list[tinker.Datum], prompt: Prompt, examples: list[Pictured]
) -> None:
    """What a pass carries moves from layer to layer; cpu:0 stands for the second device."""
    client = service.create_lora_training_client(nano.NAME, rank=2, seed=0).result()
    sampler = client.save_weights_and_get_sampling_client().result()
    images, params = [e.image for e in examples[:3]], types.SamplingParams(max_tokens=5, temperature=0.0, stop=[])

    def everything() -> tuple[Any, ...]:
        loss = client.forward(mixed, "cross_entropy").result().metrics
        tokens = sampler.sample(mixed[0].model_input, 2, params).result().sequences[0].tokens
        return loss, tokens, predict(sampler, images, prompt).tolist()

    expected, layers = everything(), client._engine.model.text.layers
    try:
        for layer in layers[2:]:
            layer.device = torch.device("cpu", 0)
        assert everything() == expected
    finally:
        for layer in layers:
            layer.device = torch.device("cpu")
