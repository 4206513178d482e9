"""Training by the SDK's methods, on the local engine and on a server: the same tests, expectations from elsewhere.

What is expected comes from stock transformers and PEFT, from torch's AdamW, and from numpy.
"""

import re
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from safetensors.torch import load_file
from tinker import types
from transformers import AutoTokenizer

from tests.vlm.helpers import plain_loss
from tests.vlm.services import PATIENCE, Service, close, log_probs, peft, step, target_log_probs
from tests.vlm.test_losses import published
from vlm import nano
from vlm.inputs import ImageRule

SMOOTH = types.AdamParams(learning_rate=1e-2, eps=1e-2)  # rounding in a small gradient stays a small step
RUN = r"[0-9a-f-]{36}:train:\d+"


@pytest.fixture
def run(both: Service) -> Any:
    return both.start()


def test_a_run_says_what_it_is(both: Service) -> None:
    runs = [both.start(rank=rank) for rank in (2, 5)]
    assert [re.fullmatch(RUN, each.model_id) is not None for each in runs] == [True, True]
    sessions, numbers = zip(*(each.model_id.split(":train:") for each in runs), strict=True)
    assert sessions[0] == sessions[1]
    assert int(numbers[1]) == int(numbers[0]) + 1
    for each, rank in zip(runs, (2, 5), strict=True):
        info = each.get_info()
        assert (info.model_id, info.is_lora, info.lora_rank) == (each.model_id, True, rank)
        assert info.model_data.model_name == nano.NAME
    text = "Naïve café, 日本! <|im_start|>"
    assert runs[0].get_tokenizer().encode(text) == AutoTokenizer.from_pretrained(nano.folder()).encode(text)


def test_a_new_run_is_the_base_model_at_every_position(
    run: Any, stock: Any, mixed: list[tinker.Datum], rule: ImageRule
) -> None:
    output = run.forward(mixed, "cross_entropy").result(PATIENCE)
    expected = [target_log_probs(stock, datum, rule) for datum in mixed]
    assert [o["logprobs"].shape for o in output.loss_fn_outputs] == [[d.model_input.length] for d in mixed]
    assert close([o["logprobs"].to_numpy() for o in output.loss_fn_outputs], expected, 1e-4)
    weights = [datum.loss_fn_inputs["weights"].to_numpy() for datum in mixed]
    total = -sum(float((p * w).sum()) for p, w in zip(expected, weights, strict=True))
    assert output.metrics["loss:sum"] == pytest.approx(total, rel=1e-5)


def test_a_trained_run_is_stock_peft_with_what_it_saved(
    both: Service, run: Any, stock: Any, mixed: list[tinker.Datum], rule: ImageRule
) -> None:
    for _ in range(2):
        step(run, mixed, SMOOTH)
    plain = peft(stock, both.folder(run.save_state("trained").result(PATIENCE).path))
    expected = [target_log_probs(plain, datum, rule) for datum in mixed]
    assert not close(expected, [target_log_probs(stock, datum, rule) for datum in mixed], 0.05)
    assert close(log_probs(run, mixed), expected, 1e-4)


def test_cross_entropy_is_a_sum_and_linear_in_the_weights(run: Any, mixed: list[tinker.Datum]) -> None:
    def loss(data: list[tinker.Datum]) -> float:
        value: float = run.forward(data, "cross_entropy").result(PATIENCE).metrics["loss:sum"]
        return value

    assert loss(mixed) == pytest.approx(sum(loss([datum]) for datum in mixed), rel=1e-5)
    fields = dict(mixed[1].loss_fn_inputs)
    fields["weights"] = tinker.TensorData.from_numpy(-2.5 * fields["weights"].to_numpy())
    assert loss([tinker.Datum(mixed[1].model_input, fields)]) == pytest.approx(-2.5 * loss(mixed[1:2]), rel=1e-5)


def test_gradients_add_up_until_the_step_and_forward_adds_none(both: Service, mixed: list[tinker.Datum]) -> None:
    whole, halves, looked = (both.start() for _ in range(3))
    for _ in range(2):
        whole.forward_backward(mixed, "cross_entropy")
        halves.forward_backward(mixed[:1], "cross_entropy")
        halves.forward_backward(mixed[1:], "cross_entropy")
        looked.forward_backward(mixed, "cross_entropy")
        looked.forward(mixed[:2], "cross_entropy")
        norms = [each.optim_step(SMOOTH).result(PATIENCE).metrics["grad_norm:mean"] for each in (whole, halves, looked)]
        assert norms[1] == pytest.approx(norms[0], rel=1e-4)
        assert norms[2] == norms[0]
    assert close(log_probs(whole, mixed), log_probs(halves, mixed), 1e-4)
    assert close(log_probs(whole, mixed), log_probs(looked, mixed), 0)
    with both.refuses("forward_backward first"):
        whole.optim_step(SMOOTH).result(PATIENCE)


def test_steps_submitted_ahead_are_as_if_each_was_awaited(both: Service, mixed: list[tinker.Datum]) -> None:
    ahead, awaited = both.start(), both.start()
    futures = [(ahead.forward_backward(mixed, "cross_entropy"), ahead.optim_step(SMOOTH)) for _ in range(5)]
    one_by_one = []
    for _ in range(5):
        one_by_one.append(awaited.forward_backward(mixed, "cross_entropy").result(PATIENCE).metrics["loss:sum"])
        awaited.optim_step(SMOOTH).result(PATIENCE)
    assert [loss.result(PATIENCE).metrics["loss:sum"] for loss, _ in futures] == one_by_one
    assert one_by_one[-1] < one_by_one[0]
    assert close(log_probs(ahead, mixed), log_probs(awaited, mixed), 0)


@pytest.mark.parametrize(
    "adam",
    [
        types.AdamParams(learning_rate=1e-2),
        types.AdamParams(learning_rate=5e-3, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.1, grad_clip_norm=0.5),
    ],
    ids=["defaults", "given"],
)
def test_steps_are_those_of_torchs_adamw(
    both: Service, run: Any, stock: Any, mixed: list[tinker.Datum], rule: ImageRule, adam: types.AdamParams
) -> None:
    """Where the gradient is small in every step, a default step is its sign alone and rounding decides that: such
    numbers are left out."""
    plain = peft(stock, both.folder(run.save_state("before").result(PATIENCE).path))
    trained = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    options = {"lr": adam.learning_rate, "eps": adam.eps, "weight_decay": adam.weight_decay}
    reference = torch.optim.AdamW(trained.values(), betas=(adam.beta1, adam.beta2), **options)
    clear = {name: torch.ones_like(p, dtype=torch.bool) for name, p in trained.items()}
    for _ in range(3):
        reference.zero_grad()
        plain_loss(plain, mixed, rule).backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), adam.grad_clip_norm or float("inf"))
        for name, p in trained.items():
            clear[name] &= p.grad.abs() > 0.02 * p.grad.abs().max()
        reference.step()
        run.forward_backward(mixed, "cross_entropy")
        stepped = run.optim_step(adam).result(PATIENCE)
        assert stepped.metrics["grad_norm:mean"] == pytest.approx(float(norm), rel=2e-3)
    path = run.save_state("after").result(PATIENCE).path
    saved = load_file(both.folder(path) / "adapter_model.safetensors")
    assert len(saved) == len(trained) == 2 * (4 * 7 + 1)
    assert sum(int(each.sum()) for each in clear.values()) > 500
    for name, p in trained.items():
        ours = saved[name.replace(".default.", ".")]
        difference = (ours - p.detach()).abs()[clear[name]]
        assert difference.numel() == 0 or difference.max() < 0.05 * adam.learning_rate, name


def test_a_run_goes_on_from_what_it_saved(both: Service, run: Any, mixed: list[tinker.Datum]) -> None:
    adam = types.AdamParams(learning_rate=1e-2, eps=1e-8)
    for _ in range(2):
        step(run, mixed, adam)
    saved, path = log_probs(run, mixed), run.save_state("step-2").result(PATIENCE).path
    assert path == f"tinker://{run.model_id}/weights/step-2"
    losses = [step(run, mixed, adam) for _ in range(2)]
    after = log_probs(run, mixed)

    resumed = both.client.create_training_client_from_state_with_optimizer(path).result(PATIENCE)
    assert re.fullmatch(RUN, resumed.model_id)
    assert resumed.model_id != run.model_id
    assert close(log_probs(resumed, mixed), saved, 0)
    assert [step(resumed, mixed, adam) for _ in range(2)] == pytest.approx(losses, abs=1e-6)
    assert close(log_probs(resumed, mixed), after)

    anew = both.client.create_training_client_from_state(path).result(PATIENCE)
    assert close(log_probs(anew, mixed), saved, 0)
    for _ in range(2):
        step(anew, mixed, adam)
    assert not close(log_probs(anew, mixed), after, 1e-3)


@pytest.mark.filterwarnings("ignore:DEPRECATED. TrainingClient.load_state:FutureWarning")
def test_a_run_takes_back_what_it_saved(both: Service, run: Any, mixed: list[tinker.Datum]) -> None:
    adam = types.AdamParams(learning_rate=1e-2, eps=1e-8)
    step(run, mixed, adam)
    saved, path = log_probs(run, mixed), run.save_state("step-1").result(PATIENCE).path
    step(run, mixed, adam)
    after = log_probs(run, mixed)
    run.forward_backward(mixed, "cross_entropy")  # dropped when the weights change
    assert run.load_state_with_optimizer(path).result(PATIENCE).path == path
    assert close(log_probs(run, mixed), saved, 0)
    with both.refuses("forward_backward first"):
        run.optim_step(adam).result(PATIENCE)
    step(run, mixed, adam)
    assert close(log_probs(run, mixed), after)
    run.load_state(path).result(PATIENCE)
    assert close(log_probs(run, mixed), saved, 0)
    step(run, mixed, adam)
    assert not close(log_probs(run, mixed), after, 1e-3)
    other = both.start(rank=2)
    with both.refuses("use create_training_client_from_state"):
        other.load_state(path).result(PATIENCE)


def test_a_name_is_written_once_unless_told(both: Service, run: Any, mixed: list[tinker.Datum]) -> None:
    path, before = run.save_state("once").result(PATIENCE).path, log_probs(run, mixed)
    step(run, mixed, SMOOTH)
    with both.refuses("exists; give another name or overwrite=True"):
        run.save_state("once").result(PATIENCE)
    kept = both.client.create_training_client_from_state(path).result(PATIENCE)
    assert close(log_probs(kept, mixed), before, 0)
    assert run.save_state("once", overwrite=True).result(PATIENCE).path == path
    replaced = both.client.create_training_client_from_state(path).result(PATIENCE)
    assert close(log_probs(replaced, mixed), log_probs(run, mixed), 0)
    run.save_weights_for_sampler("once").result(PATIENCE)  # of another kind
    with both.refuses("sampler_weights/once exists; give another name"):
        run.save_weights_for_sampler("once").result(PATIENCE)


def test_a_custom_loss_is_differentiated(
    both: Service, run: Any, stock: Any, mixed: list[tinker.Datum], rule: ImageRule
) -> None:
    """Not linear in the log-probabilities; value and gradient against PEFT's."""
    step(run, mixed, SMOOTH)
    plain = peft(stock, both.folder(run.save_state("custom").result(PATIENCE).path))

    def squared(data: list[tinker.Datum], given: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        weights = [datum.loss_fn_inputs["weights"].to_torch() for datum in data]
        values = torch.stack([(p * w).sum() for p, w in zip(given, weights, strict=True)])
        return values.square().sum() / 100, {"least:min": float(values.detach().min())}

    sums = torch.stack([-plain_loss(plain, [datum], rule) for datum in mixed])
    (sums.square().sum() / 100).backward()
    sums = sums.detach()
    trained = [p.grad for p in plain.parameters() if p.grad is not None]
    output = run.forward_backward_custom(mixed, squared).result(PATIENCE)
    norm = run.optim_step(SMOOTH).result(PATIENCE).metrics["grad_norm:mean"]
    assert output.metrics["loss:sum"] == pytest.approx(float(sums.square().sum()) / 100, rel=1e-4)
    assert output.metrics["least:min"] == pytest.approx(float(sums.min()), rel=1e-4)
    assert norm == pytest.approx(float(torch.cat([g.flatten() for g in trained]).norm()), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("importance_sampling", {}),
        ("ppo", {}),
        ("ppo", {"clip_low_threshold": 0.5, "clip_high_threshold": 1.5}),
        ("cispo", {"clip_high_threshold": 3.0}),
        ("dro", {"beta": 0.05}),
    ],
)
def test_losses_on_samples_are_the_published_ones(
    run: Any, mixed: list[tinker.Datum], name: str, config: dict[str, float]
) -> None:
    rng, data, expected = np.random.default_rng(0), list[tinker.Datum](), 0.0
    for datum, now in zip(mixed, log_probs(run, mixed), strict=True):
        sampled = (now + rng.normal(0, 0.5, len(now))).astype(np.float32)
        advantages = (rng.normal(0, 1, len(now)) * datum.loss_fn_inputs["weights"].to_numpy()).astype(np.float32)
        fields = {"logprobs": sampled, "advantages": advantages}
        expected += published(name, now.astype(np.float64), fields, config, now)
        inputs = {key: tinker.TensorData.from_numpy(values) for key, values in fields.items()}
        inputs["target_tokens"] = datum.loss_fn_inputs["target_tokens"]
        data.append(tinker.Datum(datum.model_input, inputs))
    output = run.forward_backward(data, name, config).result(PATIENCE)
    assert output.metrics["loss:sum"] == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert run.forward(data, name, config).result(PATIENCE).metrics["loss:sum"] == pytest.approx(expected, rel=1e-3)
    assert run.optim_step(SMOOTH).result(PATIENCE).metrics["grad_norm:mean"] > 0
