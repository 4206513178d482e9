"""Losses and their gradients against the published formulas written out in numpy, their laws, and what a loss takes."""

import math
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
import pytest
import tinker
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tinker import types
from torch import Tensor

from kshot.errors import RequestError, UnknownNameError
from vlm.local.losses import LOSSES, Loss, fields_of, loss

Arrays = Mapping[str, np.ndarray]
Problem = tuple[np.ndarray, dict[str, np.ndarray]]  # log_probs and fields
NARROW = {"clip_low_threshold": 0.9, "clip_high_threshold": 1.05}
WIDE = {"clip_low_threshold": 0.0, "clip_high_threshold": 1e30}
CASES: list[tuple[str, dict[str, float]]] = [
    ("cross_entropy", {}),
    ("importance_sampling", {}),
    ("ppo", {}),
    ("ppo", NARROW),
    ("ppo", {"clip_low_threshold": 0.0, "clip_high_threshold": 0.0}),
    ("ppo", {"clip_high_threshold": 3.0}),
    ("ppo", WIDE),
    ("cispo", {}),
    ("cispo", NARROW),
    ("cispo", {"clip_low_threshold": 0.0}),
    ("closed_set", {}),
    ("closed_set", {"power": 0.01}),
    ("closed_set", {"power": 0.5}),
    ("closed_set", {"power": 1}),
    ("gspo", {}),
    ("gspo", NARROW),
    ("gspo", WIDE),
    ("dro", {"beta": 0.05}),
    ("dro", {"beta": 2}),
    ("dro", {"beta": 0.0}),
]
each_case = pytest.mark.parametrize(("name", "config"), CASES)


def published(
    name: str, log_probs: np.ndarray, fields: Arrays, config: Mapping[str, float], still: np.ndarray
) -> float:
    """The documentation's formulas; `still` are the log-probabilities where a gradient is stopped."""
    if name == "cross_entropy" or (name == "closed_set" and not config.get("power")):
        return float((-log_probs * fields["weights"]).sum())
    if name == "closed_set":
        power = config["power"]
        chances = [np.prod(np.exp(log_probs) ** fields["weights"], where=at) for at in data(fields)]
        return float(sum((1 - chance**power) / power for chance in chances))
    if name == "gspo":
        low, high = config.get("clip_low_threshold", 1 - 3e-4), config.get("clip_high_threshold", 1 + 4e-4)
        pairs = zip(sequence_ratios(log_probs, fields), masks(fields), strict=True)
        terms = [(ratio, fields["advantages"][mask].mean()) for ratio, mask in pairs]
        return float(-sum(min(ratio * a, np.clip(ratio, low, high) * a) for ratio, a in terms))
    sampled, advantages = fields["logprobs"], fields["advantages"]
    low, high = config.get("clip_low_threshold", 0.8), config.get("clip_high_threshold", 1.2)
    ratio = np.exp(log_probs - sampled)
    if name == "importance_sampling":
        objective = ratio * advantages
    elif name == "ppo":
        objective = np.minimum(ratio * advantages, np.clip(ratio, low, high) * advantages)
    elif name == "cispo":
        objective = np.clip(np.exp(still - sampled), low, high) * log_probs * advantages
    else:
        objective = log_probs * advantages - 0.5 * config["beta"] * (log_probs - sampled) ** 2
    return float(-objective.sum())


def data(fields: Arrays) -> list[np.ndarray]:
    """Where the positions of each datum are."""
    return [fields["datum"] == number for number in dict.fromkeys(fields["datum"].tolist())]


def masks(fields: Arrays) -> list[np.ndarray]:
    """The positions of each datum over which gspo takes its ratio; none of a datum without any."""
    mask = fields.get("sequence_ratio_mask", fields["advantages"]) != 0
    return [at & mask for at in data(fields) if (at & mask).any()]


def sequence_ratios(log_probs: np.ndarray, fields: Arrays) -> list[float]:
    """The geometric means of p/q of gspo's sequences."""
    ratios = np.exp(log_probs - fields["logprobs"])
    return [float(np.prod(ratios[mask]) ** (1 / mask.sum())) for mask in masks(fields)]


def slopes(name: str, log_probs: np.ndarray, fields: Arrays, config: Mapping[str, float]) -> np.ndarray:
    """The gradient of the published formula by central differences."""
    step = 1e-5
    moves = step * np.eye(len(log_probs))
    ends = [[published(name, log_probs + s * move, fields, config, log_probs) for s in (1, -1)] for move in moves]
    return np.array([(up - down) / (2 * step) for up, down in ends])


def evaluate(chosen: Loss, log_probs: np.ndarray, fields: Arrays) -> tuple[float, np.ndarray]:
    """Value and gradient in float64."""
    leaf = torch.tensor(log_probs, dtype=torch.float64, requires_grad=True)
    value = chosen(leaf, tensors(fields))
    assert value.shape == ()
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.item(), gradient.numpy()


def tensors(fields: Arrays) -> dict[str, Tensor]:
    return {name: torch.tensor(values) for name, values in fields.items()}


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """log_probs, and the fields of every loss, at 1 to 6 positions; ratios away from the thresholds of CASES."""
    n = draw(st.integers(1, 6))
    nats, signed = st.floats(-3.0, 0.0), st.sampled_from([0.0, -2.0, -0.3, 0.7, 1.0, 3.0])
    log_probs, sampled = (np.array(draw(st.lists(nats, min_size=n, max_size=n))) for _ in range(2))
    weights, advantages = (np.array(draw(st.lists(signed, min_size=n, max_size=n))) for _ in range(2))
    datum = np.sort(np.array(draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))))
    fields = {"weights": weights, "logprobs": sampled, "advantages": advantages, "datum": datum}
    if draw(st.booleans()):
        fields["sequence_ratio_mask"] = np.array(draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=n, max_size=n)))
    thresholds = np.array([value for _, config in CASES for value in config.values()] + [0.8, 1.2, 1 - 3e-4, 1 + 4e-4])
    ratios = np.array([*np.exp(log_probs - sampled), *sequence_ratios(log_probs, fields)])
    assume(np.abs(ratios[:, None] - thresholds).min() > 1e-3)
    return log_probs, fields


@each_case
@given(problem=problems())
@settings(deadline=None, max_examples=40)
def test_value_and_gradient_are_the_published_ones(name: str, config: dict[str, float], problem: Problem) -> None:
    log_probs, fields = problem
    value, gradient = evaluate(loss(name, config), log_probs, fields)
    assert value == pytest.approx(published(name, log_probs, fields, config, log_probs), rel=1e-9, abs=1e-12)
    assert gradient == pytest.approx(slopes(name, log_probs, fields, config), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "config"), [case for case in CASES if case[0] in ("importance_sampling", "ppo", "cispo", "gspo")]
)
@given(problem=problems())
@settings(deadline=None, max_examples=20)
def test_losses_of_answers_are_proportional_to_the_advantage(
    name: str, config: dict[str, float], problem: Problem
) -> None:
    """So that equal answers may be one datum with the sum of their advantages, as `vlm.reward` has it."""
    chosen, (log_probs, fields) = loss(name, config), problem
    value, gradient = evaluate(chosen, log_probs, fields)
    more, steeper = evaluate(chosen, log_probs, {**fields, "advantages": 3 * fields["advantages"]})
    assert more == pytest.approx(3 * value, rel=1e-9, abs=1e-12)
    assert steeper == pytest.approx(3 * gradient, rel=1e-9, abs=1e-12)


@each_case
@given(problem=problems())
@settings(deadline=None, max_examples=20)
def test_only_scored_positions_matter(name: str, config: dict[str, float], problem: Problem) -> None:
    log_probs, fields = problem
    chosen = loss(name, config)
    where = chosen.scored(tensors(fields)).numpy()
    assert where.dtype == np.bool_
    value, gradient = evaluate(chosen, log_probs, fields)
    some, slope = evaluate(chosen, log_probs[where], {key: values[where] for key, values in fields.items()})
    assert some == pytest.approx(value, rel=1e-12, abs=1e-12)
    assert slope == pytest.approx(gradient[where])
    assert not gradient[~where].any()


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo"])
def test_ratios_that_overflow_where_they_do_not_count_leave_the_loss_finite(name: str) -> None:
    """float32, a ratio of e^200: at advantage 0, and at a clipped position of ppo and cispo."""
    log_probs = torch.tensor([-0.5, -1.0, -1.0], requires_grad=True)
    last = 0.0 if name == "importance_sampling" else 1.0
    fields = {"logprobs": torch.tensor([-0.5, -200.0, -201.0]), "advantages": torch.tensor([2.0, 0.0, last])}
    value = loss(name, None)(log_probs, fields)
    value.backward()
    assert value.isfinite()
    assert log_probs.grad is not None
    slope = -1.2 if name == "cispo" else 0.0
    assert log_probs.grad.tolist() == pytest.approx([-2.0, 0.0, slope])


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("log_p", [-1.0, -10.0, -16.0, -25.0])
def test_the_gradient_of_a_small_chance_is_not_lost_in_float32(power: float, log_p: float) -> None:
    """d/d log p of (1 − p^q) / q is −p^q."""
    at = torch.tensor([log_p], requires_grad=True)
    value = loss("closed_set", {"power": power})(at, {"weights": torch.ones(1), "datum": torch.zeros(1, dtype=int)})
    value.backward()
    assert at.grad.item() == pytest.approx(-np.exp(power * log_p), rel=1e-5)
    assert value.item() == pytest.approx((1 - np.exp(power * log_p)) / power, rel=1e-6)


def test_scored_positions() -> None:
    fields = {"weights": torch.tensor([0.0, -1.0, 2.0]), "advantages": torch.tensor([0.5, 0.0, -1.0])}
    assert loss("cross_entropy", None).scored(fields).tolist() == [False, True, True]
    for name in ("importance_sampling", "ppo", "cispo"):
        assert loss(name, None).scored(fields).tolist() == [True, False, True]
    masked = {**fields, "sequence_ratio_mask": torch.tensor([0.0, 1.0, 0.0])}
    assert loss("gspo", None).scored(fields).tolist() == [True, False, True]
    assert loss("gspo", None).scored(masked).tolist() == [True, True, True]
    assert loss("closed_set", {"power": 0.5}).scored(fields).tolist() == [False, True, True]
    assert loss("dro", {"beta": 0.05}).scored(fields).tolist() == [True, True, True]
    assert loss("dro", {"beta": 0.0}).scored(fields).tolist() == [True, False, True]


def test_configurations_and_their_defaults() -> None:
    default = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    for name in ("ppo", "cispo"):
        assert loss(name, None).config == loss(name, {}).config == default
        assert loss(name, {"clip_high_threshold": np.float32(2)}).config == {**default, "clip_high_threshold": 2.0}
        assert loss(name, {"clip_low_threshold": 1.2}).config["clip_low_threshold"] == 1.2
    assert loss("dro", {"beta": 1}).config == {"beta": 1.0}
    assert loss("cross_entropy", {}).config == loss("importance_sampling", None).config == {}
    assert LOSSES["ppo"].config == default  # the table is as it was


BAD_CONFIGS: dict[str, tuple[str, dict[str, Any] | None, str]] = {
    "a key of none": ("cross_entropy", {"clip": 0.1}, "takes no configuration, got \\['clip'\\]"),
    "a key of another": ("ppo", {"beta": 0.1}, "'clip_high_threshold'.*got \\['beta'\\]"),
    "a text": ("ppo", {"clip_low_threshold": "0.8"}, "clip_low_threshold of loss 'ppo' .* got '0.8'"),
    "a truth": ("dro", {"beta": True}, "got True"),
    "nothing": ("dro", {"beta": None}, "got None"),
    "not a number": ("dro", {"beta": math.nan}, "beta of loss 'dro' must be a finite number .* got nan"),
    "infinite": ("cispo", {"clip_high_threshold": math.inf}, "got inf"),
    "huge": ("dro", {"beta": 10**400}, "beta of loss 'dro' must be a finite"),
    "negative": ("dro", {"beta": -0.1}, "at least 0, got -0.1"),
    "negative threshold": ("cispo", {"clip_low_threshold": -0.2}, "at least 0, got -0.2"),
    "low above high": ("ppo", {"clip_low_threshold": 1.3, "clip_high_threshold": 1.2}, "above clip_high_threshold"),
    "low above the default": ("cispo", {"clip_low_threshold": 1.3}, "above clip_high_threshold.*1.2"),
    "an offset for a threshold": ("ppo", {"clip_high_threshold": 0.2}, "above clip_high_threshold"),
    "a negative power": ("closed_set", {"power": -1}, "power of loss 'closed_set' must be .* got -1"),
    "low above gspo's high": ("gspo", {"clip_low_threshold": 1.1}, "above clip_high_threshold"),
    "no beta": ("dro", None, "no default beta.*loss_fn_config"),
}


@pytest.mark.parametrize("kind", BAD_CONFIGS)
def test_bad_configurations_are_named(kind: str) -> None:
    name, config, named = BAD_CONFIGS[kind]
    with pytest.raises(RequestError, match=named):
        loss(name, config)


@pytest.mark.parametrize("name", [*get_args(types.LossFnType), "closed_set", "nll", "PPO", ""])
def test_other_names_are_never_another_loss(name: str) -> None:
    known = ("cross_entropy", "closed_set", "importance_sampling", "ppo", "cispo", "gspo", "dro")
    if name in known:
        assert LOSSES[name].name == name
    else:
        with pytest.raises(UnknownNameError, match=f"choose from: {', '.join(known)}"):
            loss(name, None)


def datum(**fields: Any) -> tinker.Datum:
    return tinker.Datum(model_input=tinker.ModelInput.from_ints([5, 6, 7]), loss_fn_inputs=fields)


def test_fields_have_one_length_and_the_dtypes_of_the_losses() -> None:
    targets = [6, 7, 2]
    for weights in ({}, {"weights": [1, 1, 1]}, {"weights": np.ones(3)}):
        fields = fields_of(datum(target_tokens=targets, **weights))
        assert fields["target_tokens"].tolist() == targets
        assert fields["target_tokens"].dtype == torch.int64
        assert fields["weights"].tolist() == [1.0, 1.0, 1.0]
        assert fields["weights"].dtype == torch.float32
    sampled = {"logprobs": [0.0, -0.5, -2.0], "advantages": np.array([0, 1, -1])}
    for name in ("importance_sampling", "ppo", "cispo", "dro"):
        fields = fields_of(datum(target_tokens=torch.tensor(targets), **sampled), LOSSES[name])
        assert {key: values.dtype for key, values in fields.items()} == {
            "target_tokens": torch.int64,
            "logprobs": torch.float32,
            "advantages": torch.float32,
        }
        assert fields["advantages"].tolist() == [0.0, 1.0, -1.0]


GOOD = {"target_tokens": [6, 7, 2], "logprobs": [0.0, -0.5, -2.0], "advantages": [0.0, 1.0, -1.0]}


def test_gspo_reads_its_mask_where_a_datum_has_one() -> None:
    assert "sequence_ratio_mask" not in fields_of(datum(**GOOD), LOSSES["gspo"])
    fields = fields_of(datum(**GOOD, sequence_ratio_mask=[0.0, 1.0, 1.0]), LOSSES["gspo"])
    assert fields["sequence_ratio_mask"].tolist() == [0.0, 1.0, 1.0]
    assert fields.keys().isdisjoint({"clip_low_threshold", "clip_high_threshold"})


BAD_FIELDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "no targets": ("cross_entropy", {"weights": [1.0]}, "lacks target_tokens, .* it has \\['weights'\\]"),
    "no logprobs, no advantages": ("ppo", {"target_tokens": [1]}, "lacks logprobs, advantages, which ppo reads"),
    "short": ("cispo", {**GOOD, "logprobs": [0.0, -1.0]}, "logprobs has 2 entries and target_tokens 3.*one length"),
    "long": ("cross_entropy", {"target_tokens": [1], "weights": [1.0] * 2}, "weights has 2 entries"),
    "not finite": ("ppo", {**GOOD, "logprobs": [0.0, math.nan, -1.0]}, "logprobs at position 1 is nan"),
    "infinite": ("ppo", {**GOOD, "advantages": [0.0, 1.0, -math.inf]}, "advantages at position 2 is -inf"),
    "a scalar": ("ppo", {**GOOD, "advantages": np.array(1.0)}, "advantages must be a vector"),
    "sparse": ("ppo", {**GOOD, "target_tokens": torch.eye(9, 9).long()}, "target_tokens must be a vector"),
    "fractional targets": ("cross_entropy", {"target_tokens": np.array([1.5])}, "must be integers .*float32"),
}


@pytest.mark.parametrize("kind", BAD_FIELDS)
def test_bad_fields_are_named(kind: str) -> None:
    name, fields, named = BAD_FIELDS[kind]
    with pytest.raises(RequestError, match=named):
        fields_of(datum(**fields), LOSSES[name])
