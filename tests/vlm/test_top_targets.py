"""Several targets a position (top-K distillation) and thresholds of positions, on the local engine and on a server.

Values and gradients are those of stock transformers with PEFT, the documentation's formula written in torch.
"""

import re
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from safetensors.torch import load_file
from tinker import types

from kshot.errors import RequestError
from tests.vlm.helpers import stock_inputs
from tests.vlm.services import PATIENCE, Service, peft, stock_log_probs
from vlm import nano
from vlm.inputs import ImageRule
from vlm.local import losses
from vlm.local.losses import fields_of, loss

K = 5
SGD = types.AdamParams(learning_rate=1e-2, eps=1e6)  # so large that a step is the gradient, scaled


@pytest.fixture(scope="module")
def top(both: Service) -> Any:
    """A run for what changes nothing."""
    return both.start()


@pytest.fixture
def soft(mixed: list[tinker.Datum]) -> list[tinker.Datum]:
    """The data with K targets at each position; weights are a distribution where the datum had one, and 0 elsewhere."""
    return [_soft(datum, seed, torch.tensor) for seed, datum in enumerate(mixed)]


def _soft(datum: tinker.Datum, seed: int, kind: Any, k: int = K) -> tinker.Datum:
    rng, weights = np.random.default_rng(seed), datum.loss_fn_inputs["weights"].to_numpy()
    shares = rng.dirichlet(np.ones(k), len(weights)).astype(np.float32) * (weights != 0)[:, None]
    fields = {"target_tokens": rng.integers(1, 4000, (len(weights), k)), "weights": shares}
    return tinker.Datum(datum.model_input, {name: kind(values) for name, values in fields.items()})


def of_stock(model: Any, datum: tinker.Datum, rule: ImageRule) -> np.ndarray:
    """(positions, K) log-probabilities of the targets."""
    targets = datum.loss_fn_inputs["target_tokens"].to_torch()
    return stock_log_probs(model, datum.model_input, rule).gather(1, targets).numpy()


def test_each_target_has_its_log_probability(
    top: Any, stock: Any, soft: list[tinker.Datum], mixed: list[tinker.Datum], rule: ImageRule
) -> None:
    """Sparse or dense, and beside data of another K and with one target."""
    data = [*soft, _soft(mixed[0], 9, tinker.TensorData.from_numpy, 2), mixed[1]]
    assert any(each.loss_fn_inputs["weights"].sparse_crow_indices is not None for each in soft)
    output = top.forward(data, "cross_entropy").result(PATIENCE)
    total = 0.0
    for datum, given in zip(data[:-1], output.loss_fn_outputs[:-1], strict=True):
        expected, weights = of_stock(stock, datum, rule), datum.loss_fn_inputs["weights"].to_torch().numpy()
        assert given["logprobs"].shape == list(expected.shape)
        assert given["logprobs"].to_numpy() == pytest.approx(expected, abs=1e-4)
        total -= float((expected * weights).sum())
    one = top.forward(data[-1:], "cross_entropy").result(PATIENCE)
    assert output.metrics["loss:sum"] == pytest.approx(total + one.metrics["loss:sum"], rel=1e-4)
    assert output.loss_fn_outputs[-1]["logprobs"].shape == [mixed[1].model_input.length]


def test_the_gradient_is_that_of_the_weighted_sum(
    both: Service, stock: Any, soft: list[tinker.Datum], rule: ImageRule
) -> None:
    run = both.start()
    run.forward_backward(soft[2:3], "cross_entropy").result(PATIENCE)  # text: its adapter alone learns from it
    run.optim_step(types.AdamParams(learning_rate=1e-1)).result(PATIENCE)
    plain = peft(stock, both.folder(run.save_state("top").result(PATIENCE).path))
    value = torch.zeros(())
    for datum in soft:
        for part in plain.modules():
            if hasattr(part, "rope_deltas"):
                part.rope_deltas = None
        log_probs = plain(**stock_inputs(datum.model_input, rule)).logits[0].log_softmax(-1)
        fields = {name: each.to_torch() for name, each in datum.loss_fn_inputs.items()}
        value = value - (log_probs.gather(1, fields["target_tokens"]) * fields["weights"]).sum()
    value.backward()
    norm = sum(float(p.grad.square().sum()) for p in plain.parameters() if p.grad is not None) ** 0.5
    output = run.forward_backward(soft, "cross_entropy").result(PATIENCE)
    assert output.metrics["loss:sum"] == pytest.approx(value.item(), rel=1e-4)
    assert run.optim_step(SGD).result(PATIENCE).metrics["grad_norm:mean"] == pytest.approx(norm, rel=1e-3)


def test_the_gradient_is_everywhere_the_same(both: Service, soft: list[tinker.Datum]) -> None:
    """K targets of weight w are K data of one target each."""
    one, other = both.start(), both.start()
    apart = [
        tinker.Datum(
            each.model_input, {name: value.to_torch()[:, k].clone() for name, value in each.loss_fn_inputs.items()}
        )
        for each in soft
        for k in range(K)
    ]
    saved = []
    for run, data in ((one, soft), (other, apart)):
        run.forward_backward(data, "cross_entropy").result(PATIENCE)
        run.optim_step(types.AdamParams(learning_rate=1e-2, eps=1e-2)).result(PATIENCE)
        folder = both.folder(run.save_weights_for_sampler("step").result(PATIENCE).path)
        saved.append(load_file(folder / "adapter_model.safetensors"))
    assert all(torch.allclose(saved[0][name], saved[1][name], atol=1e-5) for name in saved[0])


def test_a_loss_of_ones_own_reads_all_targets(both: Service, soft: list[tinker.Datum]) -> None:
    """The SDK asks for (N, K) log-probabilities and sends (N, K) weights back."""

    def reverse(data: list[tinker.Datum], log_probs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        weights = [each.loss_fn_inputs["weights"].to_torch() for each in data]
        assert [each.shape for each in log_probs] == [each.shape for each in weights]
        return sum((-(p * w).sum() for p, w in zip(log_probs, weights, strict=True)), torch.zeros(())), {}

    plain, own = both.start(), both.start()
    expected = plain.forward_backward(soft, "cross_entropy").result(PATIENCE).metrics["loss:sum"]
    norm = plain.optim_step(SGD).result(PATIENCE).metrics["grad_norm:mean"]
    dense = [
        tinker.Datum(each.model_input, {n: v.to_torch().numpy() for n, v in each.loss_fn_inputs.items()})
        for each in soft
    ]
    assert own.forward_backward_custom(dense, reverse).result(PATIENCE).metrics["loss:sum"] == pytest.approx(expected)
    assert own.optim_step(SGD).result(PATIENCE).metrics["grad_norm:mean"] == pytest.approx(norm, rel=1e-4)


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "other weights": (
        "cross_entropy",
        {"target_tokens": np.ones((3, 4), int), "weights": np.ones((3, 5))},
        r"weights has shape \[3, 5\] and target_tokens shape \[3, 4\]",
    ),
    "weights of positions": (
        "cross_entropy",
        {"target_tokens": np.ones((3, 4), int), "weights": np.ones(3)},
        r"weights has 3 entries and target_tokens shape \[3, 4\]",
    ),
    "no target": ("cross_entropy", {"target_tokens": np.ones((3, 0), int)}, "K targets each, got shape"),
    "three dimensions": ("cross_entropy", {"target_tokens": np.ones((3, 2, 2), int)}, "got shape"),
    "another loss": (
        "ppo",
        {"target_tokens": np.ones((3, 2), int), "logprobs": np.ones((3, 2)), "advantages": np.ones((3, 2))},
        "target_tokens must be a vector.*cross_entropy alone",
    ),
    "not finite": (
        "cross_entropy",
        {"target_tokens": np.ones((3, 2), int), "weights": np.array([[1, 1], [1, np.nan], [1, 1]])},
        "weights at position 1 is nan",
    ),
    "nearly a name": ("cross_entropy", {"target_tokens": [1, 2, 3], "weight": np.ones(3)}, "did you mean 'weights'"),
    "crossed thresholds": (
        "ppo",
        {
            "target_tokens": [1, 2, 3],
            "logprobs": np.zeros(3),
            "advantages": np.ones(3),
            "clip_low_threshold": np.array([0.5, 1.3, 0.5]),
        },
        "the low one above the high one",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_fields_that_do_not_fit_are_named(kind: str) -> None:
    name, fields, named = BAD[kind]
    datum = tinker.Datum(tinker.ModelInput.from_ints([5, 6, 7]), fields)
    with pytest.raises(RequestError, match=named):
        fields_of(datum, losses.LOSSES[name])


def test_too_many_targets_are_refused_before_they_are_unpacked(
    both: Service, top: Any, soft: list[tinker.Datum]
) -> None:
    shape = [soft[0].model_input.length, losses.MOST_TARGETS]
    rows = [0] * shape[0] + [1]
    wide = tinker.TensorData(np.array([7]), "int64", shape, rows, [0])
    data = [tinker.Datum(soft[0].model_input, {"target_tokens": wide})]
    with both.refuses(re.escape("numbers may be") if both.kind == "http" else "send fewer data"):
        top.forward_backward(data, "cross_entropy").result(PATIENCE)


def test_a_target_off_the_vocabulary_is_named(both: Service, top: Any, soft: list[tinker.Datum]) -> None:
    targets = soft[0].loss_fn_inputs["target_tokens"].to_numpy().copy()
    targets[1, 2] = 4096
    data = [tinker.Datum(soft[0].model_input, {**soft[0].loss_fn_inputs, "target_tokens": targets})]
    with both.refuses("target 4096 is outside the vocabulary of 4096"):
        top.forward(data, "cross_entropy").result(PATIENCE)


@pytest.mark.parametrize("name", ["ppo", "cispo"])
def test_thresholds_of_positions_are_those_of_the_whole_one_by_one(name: str) -> None:
    """Each position by itself under its own thresholds, as one number for the whole datum."""
    rng = np.random.default_rng(0)
    fields = {"logprobs": rng.normal(-1, 0.5, 6), "advantages": rng.normal(0, 1, 6)}
    fields |= {"clip_low_threshold": rng.uniform(0.5, 0.9, 6), "clip_high_threshold": rng.uniform(1.1, 1.5, 6)}
    tensors = {key: torch.tensor(values) for key, values in fields.items()}
    leaf = torch.tensor(rng.normal(-1, 0.5, 6), requires_grad=True)
    value = loss(name, None)(leaf, tensors)
    (gradient,) = torch.autograd.grad(value, leaf)
    expected, slope = 0.0, torch.zeros(6, dtype=torch.float64)
    for n in range(6):
        bounds = {key: float(fields[key][n]) for key in ("clip_low_threshold", "clip_high_threshold")}
        part = loss(name, bounds)(leaf[n : n + 1], {key: tensors[key][n : n + 1] for key in ("logprobs", "advantages")})
        expected += part.item()
        slope += torch.autograd.grad(part, leaf)[0]
    assert value.item() == pytest.approx(expected)
    assert torch.allclose(gradient, slope)


def test_thresholds_go_over_the_wire(both: Service, top: Any, mixed: list[tinker.Datum]) -> None:
    """Thresholds so wide that nothing is clipped: importance sampling; on a server the same."""
    length = mixed[2].model_input.length
    fields = {"target_tokens": mixed[2].loss_fn_inputs["target_tokens"]}
    fields |= {"logprobs": np.full(length, -15.0, np.float32), "advantages": np.ones(length, np.float32)}
    wide = {"clip_low_threshold": np.zeros(length, np.float32), "clip_high_threshold": np.full(length, 1e9, np.float32)}
    one, other = (tinker.Datum(mixed[2].model_input, each) for each in (fields, {**fields, **wide}))
    expected = top.forward([one], "importance_sampling").result(PATIENCE).metrics["loss:sum"]
    assert top.forward([other], "ppo").result(PATIENCE).metrics["loss:sum"] == pytest.approx(expected, rel=1e-5)
    clipped = top.forward([one], "ppo").result(PATIENCE).metrics["loss:sum"]
    assert clipped != pytest.approx(expected, rel=1e-3)
    both_kinds = top.forward([one, other], "ppo").result(PATIENCE).metrics["loss:sum"]
    assert both_kinds == pytest.approx(clipped + expected, rel=1e-5)


def test_fields_that_a_loss_does_not_read_are_left_out_and_said_once(
    both: Service, top: Any, mixed: list[tinker.Datum], caplog: pytest.LogCaptureFixture
) -> None:
    """As rollouts carry them: a mask, another loss's fields."""
    losses._log_unread.cache_clear()
    plain = top.forward(mixed[2:3], "cross_entropy").result(PATIENCE).metrics
    length = mixed[2].model_input.length
    more = {"mask": np.ones(length, np.float32), "advantages": np.ones(length, np.float32)}
    data = [tinker.Datum(mixed[2].model_input, {**mixed[2].loss_fn_inputs, **more})]
    for _ in range(2):
        assert top.forward(data, "cross_entropy").result(PATIENCE).metrics == plain
    said = [record.getMessage() for record in caplog.records if record.name == "kshot"]
    assert said == [
        f"cross_entropy does not read the field {name!r} of a datum, and leaves it out" for name in sorted(more)
    ]


@pytest.mark.parametrize("name", ["stable_reinforce", "custom"])
def test_losses_that_are_not_built_say_what_to_use(
    both: Service, top: Any, mixed: list[tinker.Datum], name: str
) -> None:
    named = "forward_backward_custom" if name == "custom" else "loss_fn=importance_sampling, ppo, cispo or gspo"
    with both.refuses(rf"unknown loss function '{name}' \(.*{named}"):
        top.forward_backward(mixed[2:3], name).result(PATIENCE)


def test_what_stable_reinforce_records_names_the_loss_to_use(both: Service, mixed: list[tinker.Datum]) -> None:
    """At the latest at the first sample: the SDK says nothing of it before."""
    with both.refuses("record_stability_info=True.*loss_fn=importance_sampling, ppo, cispo or gspo"):
        made = both.client.create_sampling_client(base_model=nano.NAME, record_stability_info=True)
        sampler = made.result(PATIENCE) if hasattr(made, "result") else made
        sampler.sample(mixed[2].model_input, 1, types.SamplingParams(max_tokens=1)).result(PATIENCE)
