"""What a loss takes: configurations, names and fields, and the errors that say what is wrong with them."""

import math
from typing import Any, get_args

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from kshot.errors import RequestError, UnknownNameError
from vlm.local.losses import LOSSES, fields_of, loss


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
    "no beta": ("dro", None, "no default beta.*loss_fn_config"),
}


@pytest.mark.parametrize("kind", BAD_CONFIGS)
def test_bad_configurations_are_named(kind: str) -> None:
    name, config, named = BAD_CONFIGS[kind]
    with pytest.raises(RequestError, match=named):
        loss(name, config)


@pytest.mark.parametrize("name", [*get_args(types.LossFnType), "closed_set", "nll", "PPO", ""])
def test_other_names_are_never_another_loss(name: str) -> None:
    known = ("cross_entropy", "closed_set", "importance_sampling", "ppo", "cispo", "dro")
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
