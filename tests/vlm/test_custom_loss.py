"""Losses on samples and losses of one's own, through the client: against cross_entropy and the SDK's two-pass way."""

from typing import Any

import numpy as np
import pytest
import tinker
import torch

from kshot.errors import RequestError
from tests.vlm.helpers import disturb, gradients_of, taken
from vlm.local import packs
from vlm.local.clients import LocalTrainingClient


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """To 1e-4 of a tensor's largest number: of positions that cancel, float32 keeps no more."""
    return all((one[n] - other[n]).abs().max() <= 1e-4 * other[n].abs().max() + 1e-6 for n in one)


def squared(data: list[tinker.Datum], log_probs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """Not linear in the log-probabilities, and it reads the data."""
    weights = [datum.loss_fn_inputs["weights"].to_torch() for datum in data]
    values = torch.stack([(p * w).sum() for p, w in zip(log_probs, weights, strict=True)])
    return values.square().sum(), {"largest": float(values.detach().abs().max())}


@pytest.mark.parametrize("pack", [4096, 60])
def test_a_custom_loss_equals_cross_entropy_with_its_slopes(
    client: LocalTrainingClient, mixed: list[tinker.Datum], monkeypatch: pytest.MonkeyPatch, pack: int
) -> None:
    monkeypatch.setattr(packs, "PACK", pack)
    disturb(client)
    out = client.forward_backward_custom(mixed, squared).result()
    gradients = taken(client)
    everywhere = client.forward(mixed, "cross_entropy").result().loss_fn_outputs
    leaves = [each["logprobs"].to_torch().clone().requires_grad_() for each in everywhere]
    loss, metrics = squared(mixed, leaves)
    loss.backward()
    slopes = [leaf.grad for leaf in leaves if leaf.grad is not None]
    linear = [
        tinker.Datum(datum.model_input, {**datum.loss_fn_inputs, "weights": tinker.TensorData.from_torch(-slope)})
        for datum, slope in zip(mixed, slopes, strict=True)
    ]
    surrogate = client.forward_backward(linear, "cross_entropy").result().metrics["loss:sum"]
    assert close(gradients, taken(client))
    assert out.metrics == pytest.approx({**metrics, "loss:sum": loss.item(), "surrogate_loss:sum": surrogate}, rel=1e-4)
    for mine, other in zip(out.loss_fn_outputs, everywhere, strict=True):
        assert mine["logprobs"].to_numpy() == pytest.approx(other["logprobs"].to_numpy(), abs=1e-4)


def test_custom_losses_that_cannot_be(client: LocalTrainingClient, mixed: list[tinker.Datum]) -> None:
    def first_only(_: Any, log_probs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return log_probs[0].sum(), {}

    def infinite(_: Any, log_probs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return sum((p.sum() for p in log_probs), torch.zeros(())) * float("inf"), {}

    def broken(*_: Any) -> tuple[torch.Tensor, dict[str, float]]:
        raise ZeroDivisionError("mine")

    def constant(*_: Any) -> tuple[torch.Tensor, dict[str, float]]:
        return torch.ones(()), {}

    def asks_itself(*_: Any) -> tuple[torch.Tensor, dict[str, float]]:
        return client.forward(mixed, "cross_entropy").result(), {}  # type: ignore[return-value]

    for loss, error, named in (
        (constant, RequestError, "depends on the log-probabilities"),
        (asks_itself, RequestError, "its own service"),
        (first_only, RequestError, "every datum"),
        (infinite, RequestError, "not finite"),
        (broken, ZeroDivisionError, "mine"),
    ):
        with pytest.raises(error, match=named):
            client.forward_backward_custom(mixed, loss).result()
    with pytest.raises(RequestError, match="must be callable"):
        client.forward_backward_custom(mixed, "squared")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="no data"):
        client.forward_backward_custom([], squared).result()
    with pytest.raises(RequestError, match="forward_backward first"):  # none of them left a gradient
        client.optim_step(tinker.AdamParams(learning_rate=1e-3)).result()


def sampled(client: LocalTrainingClient, mixed: list[tinker.Datum], advantage: float) -> list[tinker.Datum]:
    """The data as if it had been sampled from the model as it is: the ratio is 1 everywhere."""
    outputs = client.forward(mixed, "cross_entropy").result().loss_fn_outputs
    made = []
    for datum, output in zip(mixed, outputs, strict=True):
        weights = datum.loss_fn_inputs["weights"].to_numpy()
        fields = {
            "target_tokens": datum.loss_fn_inputs["target_tokens"],
            "logprobs": output["logprobs"],
            "advantages": tinker.TensorData.from_numpy((advantage * weights).astype(np.float32)),
        }
        made.append(tinker.Datum(model_input=datum.model_input, loss_fn_inputs=fields))
    return made


@pytest.mark.parametrize(
    ("name", "config"), [("importance_sampling", None), ("ppo", None), ("cispo", None), ("dro", {"beta": 0.1})]
)
def test_on_policy_every_loss_has_the_gradient_of_weighted_cross_entropy(
    client: LocalTrainingClient, mixed: list[tinker.Datum], name: str, config: dict[str, float] | None
) -> None:
    """At ratio 1 the clips and the penalty are idle: −advantage · ∇ log p (Tinker API)."""
    disturb(client)
    client.forward_backward(mixed, "cross_entropy").result()
    expected = taken(client)
    out = client.forward_backward(sampled(client, mixed, 1.0), name, config).result()
    assert close(taken(client), expected)
    logprobs = [output["logprobs"].to_numpy() for output in out.loss_fn_outputs]
    assert all((each != 0).all() for each in logprobs)  # also where the advantage is 0


def test_no_advantage_is_no_gradient_and_no_error(client: LocalTrainingClient, mixed: list[tinker.Datum]) -> None:
    out = client.forward_backward(sampled(client, mixed, 0.0), "importance_sampling").result()
    assert out.metrics["loss:sum"] == 0
    assert not any(gradient.any() for gradient in gradients_of(client).values())
    client.optim_step(tinker.AdamParams(learning_rate=1e-3)).result()
