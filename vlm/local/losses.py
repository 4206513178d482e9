"""Loss functions of the Tinker API, on log-probabilities of target tokens. Knows no model.

A loss is a function of (log_probs, fields) → a sum over positions; LOSSES is the table. Other names of the SDK are a
named error, never another loss.
"""

from collections.abc import Callable, Mapping
from typing import Any

import tinker
import torch
from torch import Tensor

from kshot_errors import RequestError, UnknownNameError

Fields = Mapping[str, Tensor]


def cross_entropy(log_probs: Tensor, fields: Fields) -> Tensor:
    """Σ −log_prob · weight over the positions given: a sum, not a mean (Tinker API)."""
    return -(log_probs * fields["weights"]).sum()


LOSSES: dict[str, Callable[[Tensor, Fields], Tensor]] = {"cross_entropy": cross_entropy}


def loss(name: str, config: Mapping[str, Any] | None) -> Callable[[Tensor, Fields], Tensor]:
    """The loss of this name. Raises UnknownNameError, and RequestError for a configuration: none of them takes one."""
    if name not in LOSSES:
        raise UnknownNameError("loss function", name, LOSSES)
    if config:
        raise RequestError(f"loss {name!r} takes no configuration, got {sorted(config)}")
    return LOSSES[name]


def fields_of(datum: tinker.Datum) -> dict[str, Tensor]:
    """target_tokens (n,) int64 and weights (n,) float32 of a datum; weights default to one at every position.

    Raises RequestError where a field is missing or unknown, or the two are not vectors of one length.
    """
    inputs = datum.loss_fn_inputs
    if "target_tokens" not in inputs:
        raise RequestError(f"a datum lacks target_tokens; it has {sorted(inputs)}")
    unknown = sorted(set(inputs) - {"target_tokens", "weights"})
    if unknown:
        raise RequestError(f"a datum takes target_tokens and weights, this one also has {unknown}")
    targets = inputs["target_tokens"].to_torch().long()
    weights = inputs["weights"].to_torch().float() if "weights" in inputs else torch.ones(len(targets))
    if targets.ndim != 1 or targets.shape != weights.shape:
        shapes = f"{tuple(targets.shape)} and {tuple(weights.shape)}"
        raise RequestError(f"target_tokens and weights must be vectors of one length, got shapes {shapes}")
    if not weights.isfinite().all():
        raise RequestError("a weight is not a finite number; check what made the weights")
    return {"target_tokens": targets, "weights": weights}
