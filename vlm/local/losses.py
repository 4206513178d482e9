"""Loss functions of the Tinker API on log-probabilities of target tokens, and the choice among candidate tokens.

A loss is a sum over positions of a function of the position's log-probability and of the datum's fields there; LOSSES
is the table. Definitions, names and defaults are those of the Tinker API's documentation
(https://tinker-docs.thinkingmachines.ai/tinker/losses), but for `closed_set`, which is ours. Other names of the SDK are
a named error, never another loss.

`log_probs` below are log p of the target tokens under the model that is trained, `logprobs` log q under the model that
sampled them, in nats; log_probs and fields are vectors over the same positions.

`candidates` is a field of a datum for `closed_set`, beside those of the Tinker API: (positions, most) int64, the tokens
that may stand at each position, sparse (CSR) or dense with -1 where there is none.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import numpy as np
import tinker
import torch
from torch import Tensor

from kshot.errors import RequestError, UnknownNameError
from vlm.local.model.lora import Factors
from vlm.local.model.packed import Text

Fields = Mapping[str, Tensor]
CANDIDATES = "candidates"


def cross_entropy(log_probs: Tensor, fields: Fields) -> Tensor:
    """Σ −log p · weight: a sum, not a mean (Tinker API). Weights may be negative."""
    return -(log_probs * fields["weights"]).sum()


def importance_sampling(log_probs: Tensor, fields: Fields) -> Tensor:
    """Σ −p/q · advantage: REINFORCE, corrected for samples of another policy (Tinker API)."""
    return -(_log_ratio(log_probs, fields).exp() * fields["advantages"]).sum()


def ppo(log_probs: Tensor, fields: Fields, *, clip_low_threshold: float, clip_high_threshold: float) -> Tensor:
    """Σ −min(r · advantage, clip(r, low, high) · advantage), r = p/q (Schulman et al. 2017; Tinker API).

    The thresholds bound the ratio itself: 0.8 and 1.2, not 0.2 twice.
    """
    # The minimum is the ratio cut above where the advantage is positive, below where it is negative. It is cut before
    # exp: cut after it, a ratio that overflows would have the gradient 0 · ∞ in place of 0.
    log_ratio, advantages = _log_ratio(log_probs, fields), fields["advantages"]
    above, below = log_ratio.clamp(max=_log(clip_high_threshold)), log_ratio.clamp(min=_log(clip_low_threshold))
    return -(torch.where(advantages > 0, above, below).exp() * advantages).sum()


def cispo(log_probs: Tensor, fields: Fields, *, clip_low_threshold: float, clip_high_threshold: float) -> Tensor:
    """Σ −clip(r, low, high) · log p · advantage, r = p/q without a gradient (MiniMax-M1, Chen et al. 2025; Tinker API).

    A clipped position keeps its gradient, unlike in ppo.
    """
    coefficients = _log_ratio(log_probs, fields).detach().exp().clamp(clip_low_threshold, clip_high_threshold)
    return -(coefficients * log_probs * fields["advantages"]).sum()


def dro(log_probs: Tensor, fields: Fields, *, beta: float) -> Tensor:
    """Σ −(log p · advantage − ½ · beta · (log p − log q)²) (Richemond et al. 2024; Tinker API).

    The penalty counts at every position, whatever its advantage, as published.
    """
    penalty = 0.5 * beta * (log_probs - fields["logprobs"]).square()
    return -(log_probs * fields["advantages"] - penalty).sum()


def _log_ratio(log_probs: Tensor, fields: Fields) -> Tensor:
    """log p/q; 0 where the advantage is 0, lest a ratio that overflows there makes the sum 0 · ∞."""
    return torch.where(fields["advantages"] != 0, log_probs - fields["logprobs"], 0.0)


def _log(threshold: float) -> float:
    return math.log(threshold) if threshold > 0 else -math.inf


@dataclass(frozen=True)
class Loss:
    """A loss of LOSSES; `loss` returns it with its configuration filled in."""

    name: str
    function: Callable[..., Tensor]
    required: tuple[str, ...] = ()
    optional: Mapping[str, float] = field(default_factory=dict)  # a field and its value where the datum lacks it
    config: Mapping[str, float] = field(default_factory=dict)  # a key and its default; NaN: there is none
    closed: bool = False  # whether log-probabilities are among the candidates that a datum names, not all tokens

    @property
    def uses_sampled(self) -> bool:
        """Whether it reads sampled sequences: then their log-probabilities are returned at every position."""
        return "logprobs" in self.required

    def __call__(self, log_probs: Tensor, fields: Fields) -> Tensor:
        """The sum (0-d) over the positions given, differentiable in log_probs: (n,) nats, as every field is (n,)."""
        return self.function(log_probs, fields, **self.config)

    def scored(self, fields: Fields) -> Tensor:
        """(n,) bool: the positions whose log-probability the value or the gradient depends on."""
        everywhere = self.config.get("beta", 0.0) != 0  # dro's penalty
        return (fields["advantages" if self.uses_sampled else "weights"] != 0) | everywhere


_SAMPLED = ("logprobs", "advantages")
_CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
LOSSES: dict[str, Loss] = {
    each.name: each
    for each in (
        Loss("cross_entropy", cross_entropy, optional={"weights": 1.0}),
        Loss("closed_set", cross_entropy, optional={"weights": 1.0}, closed=True),
        Loss("importance_sampling", importance_sampling, _SAMPLED),
        Loss("ppo", ppo, _SAMPLED, config=_CLIP),
        Loss("cispo", cispo, _SAMPLED, config=_CLIP),
        # The documentation names no default for beta, and implementations differ by two orders of magnitude.
        Loss("dro", dro, _SAMPLED, config={"beta": math.nan}),
    )
}


def loss(name: str, config: Mapping[str, Any] | None) -> Loss:
    """The loss of this name, configured as in the SDK's `loss_fn_config`.

    Raises UnknownNameError, and RequestError for a key that the loss does not take, one that is missing, a value that
    is no finite number of at least 0, and a low threshold above the high one.
    """
    if name not in LOSSES:
        raise UnknownNameError("loss function", name, LOSSES)
    definition, config = LOSSES[name], config or {}
    unknown = sorted(set(config) - set(definition.config))
    if unknown:
        keys = sorted(definition.config)
        takes = f"takes {keys} in its configuration" if keys else "takes no configuration"
        raise RequestError(f"loss {name!r} {takes}, got {unknown}")
    values = {**definition.config, **{key: _number(name, key, value) for key, value in config.items()}}
    for key in (key for key, value in values.items() if math.isnan(value)):
        raise RequestError(f"loss {name!r} has no default {key}; give one: loss_fn_config={{{key!r}: 0.05}}")
    if "clip_low_threshold" in values and values["clip_low_threshold"] > values["clip_high_threshold"]:
        raise RequestError(f"loss {name!r} has clip_low_threshold above clip_high_threshold: {values}")
    return replace(definition, config=values)


def fields_of(datum: tinker.Datum, chosen: Loss = LOSSES["cross_entropy"]) -> dict[str, Tensor]:
    """What a loss reads of a datum: target_tokens (n,) int64, and its other fields (n,) float32 each (the candidates of
    a closed loss are not among them).

    An optional field that is not given holds its default at every position: weights are ones.

    Raises RequestError where a field is missing or unknown, is no vector of the targets' length, or holds a number
    that is not finite, and where target_tokens are not integers.
    """
    inputs = datum.loss_fn_inputs
    vectors = ("target_tokens", *chosen.required, *chosen.optional)
    names = (*vectors, *([CANDIDATES] if chosen.closed else []))
    missing = [name for name in names if name not in inputs and name not in chosen.optional]
    if missing:
        raise RequestError(f"a datum lacks {', '.join(missing)}, which {chosen.name} reads; it has {sorted(inputs)}")
    unknown = sorted(set(inputs) - set(names))
    if unknown:
        raise RequestError(f"{chosen.name} reads {', '.join(names)} of a datum, this one also has {unknown}; drop them")
    targets = _vector("target_tokens", inputs["target_tokens"])
    if targets.dtype != torch.int64:
        raise RequestError(f"target_tokens must be integers (int64), got {inputs['target_tokens'].dtype}")
    fields = {"target_tokens": targets}
    for name in vectors[1:]:
        if name in inputs:
            fields[name] = _vector(name, inputs[name]).float()
            _check(name, fields[name], len(targets))
        else:
            fields[name] = torch.full(targets.shape, chosen.optional[name])
    return fields


def _number(name: str, key: str, value: Any) -> float:
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer beyond every float
        number = math.inf
    if not 0 <= number < math.inf:
        raise RequestError(f"{key} of loss {name!r} must be a finite number of at least 0, got {value!r}")
    return number


def _vector(name: str, data: tinker.TensorData) -> Tensor:
    vector = None if data.sparse_crow_indices is not None else data.to_torch()
    if vector is None or vector.ndim != 1:
        form = f"a vector, a number per position, got shape {data.shape}"
        raise RequestError(f"{name} must be {form}; top-K is not built")
    return vector


def _check(name: str, values: Tensor, length: int) -> None:
    if len(values) != length:
        raise RequestError(
            f"{name} has {len(values)} entries and target_tokens {length}; the fields of a datum must be of one length"
        )
    if math.isfinite(float(values.sum())):
        return
    wrong = (~values.isfinite()).nonzero()[:, 0].tolist()  # none, where a sum of large numbers alone overflows
    if wrong:
        raise RequestError(f"{name} at position {wrong[0]} is {float(values[wrong[0]])}, not a finite number; check it")


@dataclass(frozen=True)
class Candidates:
    """One entry a candidate. rows: (n,) which of the scored positions it may stand at; tokens: (n,) its id."""

    rows: np.ndarray
    tokens: np.ndarray


def candidates_of(data: tinker.TensorData, targets: np.ndarray, scored: np.ndarray) -> Candidates:
    """The candidates at the `scored` positions (numbers, rising), of which each one's target must be one.

    targets: (positions,) token ids. Raises RequestError for another shape or type, and where a target is missing.
    """
    if data.dtype != "int64" or data.shape is None or len(data.shape) != 2 or data.shape[0] != len(targets):
        shape = f"{data.dtype} of shape {data.shape}"
        raise RequestError(f"{CANDIDATES} must be int64, a row a position ({len(targets)}), got {shape}")
    positions, tokens = _entries(data)
    kept = np.isin(positions, scored)
    rows, tokens = np.searchsorted(scored, positions[kept]), tokens[kept]
    has_target = np.zeros(len(scored), bool)
    has_target[rows[tokens == targets[scored[rows]]]] = True
    if not has_target.all():
        position = scored[~has_target][0]
        raise RequestError(
            f"{CANDIDATES} at position {position} do not hold its target {targets[position]}; add it, or "
            "set its weight to 0"
        )
    return Candidates(rows, tokens)


def log_probs(text: Text, hidden: Tensor, targets: Tensor, candidates: Candidates, factors: Factors | None) -> Tensor:
    """(n,) float32 log-probabilities of the targets at n states (n, hidden), each among its candidates alone."""
    tokens, columns = np.unique(candidates.tokens, return_inverse=True)
    logits = text.logits(hidden, factors, torch.from_numpy(tokens))
    mask = torch.full_like(logits, -torch.inf)
    mask[torch.from_numpy(candidates.rows), torch.from_numpy(columns)] = 0.0
    at = torch.searchsorted(torch.from_numpy(tokens).to(targets.device), targets)
    return (logits + mask).log_softmax(-1).gather(1, at.to(logits.device)[:, None])[:, 0]


def _entries(data: tinker.TensorData) -> tuple[np.ndarray, np.ndarray]:
    """(position, token) of each candidate."""
    if data.sparse_crow_indices is None:
        dense = data.to_numpy()
        positions, columns = np.nonzero(dense >= 0)
        return positions, dense[positions, columns]
    counts, tokens = np.diff(data.sparse_crow_indices), data._numpy
    if len(counts) != (data.shape or [0])[0] or (counts < 0).any() or counts.sum() != len(tokens):
        raise RequestError(f"{CANDIDATES} has row pointers that do not fit its {len(tokens)} values")
    return np.repeat(np.arange(len(counts)), counts), tokens
