"""The loss over the class names alone: it is −log of the constrained score, and its gradient that of plain autograd."""

from typing import Any

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from kshot.errors import RequestError
from tests.vlm.helpers import (
    CLASSES,
    Pictured,
    adapter_of,
    assert_gradients_equal,
    disturb,
    gradients_of,
    plain_peft,
    stock_inputs,
)
from tests.vlm.services import PATIENCE, Service
from vlm.classifier import fit, predict
from vlm.inputs import ImageRule, model_input
from vlm.label_trie import branches
from vlm.local.clients import LocalTrainingClient
from vlm.prompts import Prompt

ADAM = types.AdamParams(learning_rate=3e-3, eps=1e-8)


@pytest.fixture
def data(prompt: Prompt, examples: list[Pictured]) -> list[tinker.Datum]:
    return [prompt.closed_datum(example.image, example.label) for example in examples[:6]]


def test_branches_say_where_a_choice_parts_from_others() -> None:
    crocodile, head, star = (3, 4, 5, 6), (3, 4, 5, 1, 6), (2, 6)
    found = [[(b.position, b.candidates) for b in each] for each in branches([crocodile, head, star])]
    assert found == [[(0, (2, 3)), (3, (1, 6))], [(0, (2, 3)), (3, (1, 6))], [(0, (2, 3))]]


def test_the_datum_holds_the_candidates_where_the_token_is_chosen(
    prompt: Prompt, examples: list[Pictured], data: list[tinker.Datum]
) -> None:
    asked, choice = prompt.question(examples[4].image).length, prompt.choices[4]
    fields = data[4].loss_fn_inputs
    targets, weights = fields["target_tokens"].to_numpy(), fields["weights"].to_numpy()
    dense = fields["candidates"].to_numpy(pad_value=-1)
    assert dense.shape[0] == len(targets) == data[4].model_input.length
    for place, token in enumerate(choice):
        allowed = {c[place] for c in prompt.choices if c[:place] == choice[:place]}
        row = asked - 1 + place
        if row < len(targets):
            assert targets[row] == token
            assert set(dense[row][dense[row] >= 0]) == (allowed if len(allowed) > 1 else set())
            assert weights[row] == (len(allowed) > 1)
        else:
            assert len(allowed) == 1  # what follows the last branch is certain: it is not even computed
    assert not weights[: asked - 1].any()


def test_the_loss_is_the_constrained_score(
    client: LocalTrainingClient, prompt: Prompt, examples: list[Pictured], data: list[tinker.Datum]
) -> None:
    disturb(client)
    sampler = client.save_weights_and_get_sampling_client().result()
    log_probs = predict(sampler, [e.image for e in examples[:6]], prompt)
    expected = [-row[e.label] for row, e in zip(log_probs, examples, strict=False)]
    for loss in (client.forward(data, "closed_set"), client.forward_backward(data, "closed_set")):
        assert loss.result().metrics["loss:sum"] == pytest.approx(sum(expected), abs=1e-4)
        each = [-output["logprobs"].to_numpy().sum() for output in loss.result().loss_fn_outputs]
        assert each == pytest.approx(expected, abs=1e-4)


def test_gradients_equal_plain_autograd(
    client: LocalTrainingClient, stock: Any, data: list[tinker.Datum], rule: ImageRule
) -> None:
    disturb(client)
    plain = plain_peft(client, stock)
    total = torch.zeros(())
    for datum in data:
        logits = plain(**stock_inputs(datum.model_input, rule)).logits[0].float()
        fields = datum.loss_fn_inputs
        dense = fields["candidates"].to_torch(pad_value=-1)
        for row in fields["weights"].to_torch().nonzero()[:, 0].tolist():
            among = dense[row][dense[row] >= 0]
            chosen = (among == fields["target_tokens"].to_torch()[row]).nonzero()[0, 0]
            total = total - logits[row, among].log_softmax(-1)[chosen]
    total.backward()
    loss = client.forward_backward(data, "closed_set").result()
    assert loss.metrics["loss:sum"] == pytest.approx(float(total.detach()), rel=1e-5)
    assert_gradients_equal(client, plain)


@pytest.mark.parametrize("power", [0.0, 0.3, 1.0])
def test_powers_are_those_of_the_brute_force_posterior(
    power: float,
    client: LocalTrainingClient,
    stock: Any,
    prompt: Prompt,
    examples: list[Pictured],
    rule: ImageRule,
) -> None:
    """Of names that begin alike (car, cart; crocodile, crocodile head), and of classes that stand twice in a batch."""
    disturb(client)
    plain, shown = plain_peft(client, stock).double(), examples[1:9]  # whose own rounding does not count
    chances = [brute_force_chance(plain, prompt, each, rule) for each in shown]
    terms = [(1 - chance**power) / power if power else -chance.log() for chance in chances]
    total = torch.stack(terms).sum()
    total.backward()
    data = [prompt.closed_datum(each.image, each.label) for each in shown]
    config = {"power": power} if power else None
    loss = client.forward_backward(data, "closed_set", config).result()
    assert loss.metrics["loss:sum"] == pytest.approx(float(total.detach()), rel=1e-5)
    theirs = {n.replace(".default.", "."): p.grad for n, p in plain.named_parameters() if p.grad is not None}
    ours = gradients_of(client)
    assert ours.keys() == theirs.keys()
    whole = torch.cat([gradient.flatten().double() for gradient in theirs.values()])
    gap = torch.cat([ours[name].flatten() for name in theirs]) - whole
    assert gap.norm() <= 1e-5 * whole.norm()


def brute_force_chance(plain: Any, prompt: Prompt, example: Pictured, rule: ImageRule) -> torch.Tensor:
    """The posterior of the right class under the model restricted to the names, token by token, by a pass over the
    whole name; the differentiable twin of `brute_force.scores`."""
    choice, asked = prompt.choices[example.label], prompt.question(example.image)
    whole = model_input(*asked.chunks, choice)
    logits = plain(**stock_inputs(whole, rule)).logits[0, asked.length - 1 :]
    chance = torch.ones((), dtype=torch.float64)
    for place, token in enumerate(choice):
        allowed = sorted({each[place] for each in prompt.choices if each[:place] == choice[:place]})
        chance = chance * logits[place, allowed].softmax(-1)[allowed.index(token)]
    return chance


def test_a_small_power_is_nearly_the_logarithm(client: LocalTrainingClient, data: list[tinker.Datum]) -> None:
    plain, small, reward = (
        client.forward(data, "closed_set", config).result().metrics["loss:sum"]
        for config in (None, {"power": 1e-4}, {"power": 1.0})
    )
    assert small == pytest.approx(plain, rel=1e-3)
    assert 0 < reward < len(data)  # each is 1 - p


def test_dense_and_sparse_candidates_are_the_same(client: LocalTrainingClient, data: list[tinker.Datum]) -> None:
    disturb(client)
    sparse = client.forward(data, "closed_set").result().metrics["loss:sum"]
    dense = []
    for datum in data:
        table = tinker.TensorData.from_numpy(datum.loss_fn_inputs["candidates"].to_numpy(pad_value=-1))
        dense.append(tinker.Datum(datum.model_input, {**datum.loss_fn_inputs, "candidates": table}))
    assert client.forward(dense, "closed_set").result().metrics["loss:sum"] == sparse


def test_training_on_it_separates_the_classes(
    client: LocalTrainingClient, prompt: Prompt, examples: list[Pictured]
) -> None:
    views = [[(e.image, e.label) for e in examples[:6]]] * 25
    losses = [out.metrics["loss:sum"] for out, _ in fit(client, views, prompt, ADAM, "closed-set")]
    assert losses[-1] < 0.05 * losses[0]
    sampler = client.save_weights_and_get_sampling_client().result()
    assert predict(sampler, [e.image for e in examples[:6]], prompt).argmax(1).tolist() == list(range(len(CLASSES)))


def test_powers_over_http_are_those_in_process(both: Service, prompt: Prompt, examples: list[Pictured]) -> None:
    """Both services train the same run: its loss before and after a step is pinned to the engine's own posterior."""
    data, run = [prompt.closed_datum(each.image, each.label) for each in examples[:6]], both.start()
    chances = [np.exp(row[e.label]) for row, e in zip(scored(both, run, prompt, examples[:6]), examples, strict=False)]
    loss = run.forward_backward(data, "closed_set", {"power": 0.5})
    run.optim_step(ADAM).result(PATIENCE)
    expected = sum((1 - chance**0.5) / 0.5 for chance in chances)
    assert loss.result(PATIENCE).metrics["loss:sum"] == pytest.approx(expected, rel=1e-4)
    after = [np.exp(row[e.label]) for row, e in zip(scored(both, run, prompt, examples[:6]), examples, strict=False)]
    assert sum(after) > sum(chances)


def scored(service: Service, run: Any, prompt: Prompt, examples: list[Pictured]) -> np.ndarray:
    sampler = run.save_weights_and_get_sampling_client().result(PATIENCE)
    return predict(sampler, [each.image for each in examples], prompt)


def test_fit_takes_a_power_of_the_closed_set_alone(
    client: LocalTrainingClient, prompt: Prompt, examples: list[Pictured]
) -> None:
    views = [[(e.image, e.label) for e in examples[:6]]] * 2
    first, second = (out.metrics["loss:sum"] for out, _ in fit(client, views, prompt, ADAM, "closed-set", 1.0))
    assert second < first < len(views[0])
    with pytest.raises(RequestError, match=r"power 0\.5 is of the loss closed-set"):
        next(fit(client, views, prompt, ADAM, "text", 0.5))


def candidates(rows: int, tokens: list[int]) -> tinker.TensorData:
    return tinker.TensorData.from_numpy(np.array([tokens] * rows, np.int64))


BAD: dict[str, tuple[Any, str]] = {
    "none": (None, "lacks candidates"),
    "a vector": (tinker.TensorData.from_numpy(np.ones(5, np.int64)), "a row a position"),
    "too few rows": (candidates(2, [1, 2]), "a row a position"),
    "floats": (tinker.TensorData.from_numpy(np.ones((5, 2), np.float32)), "must be int64"),
    "without the target": ("other", "do not hold its target"),
    "off the vocabulary": ("off", "candidate 4096"),
    "broken rows": ("broken", "row pointers"),
}


@pytest.mark.parametrize("kind", BAD)
def test_candidates_that_do_not_fit_are_named(kind: str, client: LocalTrainingClient, data: list[tinker.Datum]) -> None:
    given, says = BAD[kind]
    datum, fields = data[0], dict(data[0].loss_fn_inputs)
    target = int(fields["target_tokens"].to_numpy()[-1])
    made = {
        "other": lambda: candidates(datum.model_input.length, [target + 1, target + 2]),
        "off": lambda: candidates(datum.model_input.length, [target, 4096]),
        "broken": lambda: tinker.TensorData([1, 2], "int64", [datum.model_input.length, 2], [0, 2], [0, 1]),
    }
    del fields["candidates"]
    if given is not None:
        fields["candidates"] = made[given]() if isinstance(given, str) else given
    before = {name: tensor.clone() for name, tensor in adapter_of(client).items()}
    with pytest.raises(RequestError, match=says):
        client.forward_backward([tinker.Datum(datum.model_input, fields)], "closed_set").result()
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_of(client).items())
