"""Loss functions of the Tinker API on log-probabilities of target tokens, and the choice among candidate tokens.

A loss is a sum over positions, or over data (`closed_set` with a power, `gspo`), of a function of log-probabilities and
of the datum's fields there; LOSSES is the table. Definitions, names and defaults are those of the Tinker API's
documentation (https://tinker-docs.thinkingmachines.ai/tinker/losses), but for `closed_set`, which is ours, and `gspo`,
of which it says nothing: that is the paper's. Other names of the SDK are a named error, never another loss.

`log_probs` below are log p of the target tokens under the model that is trained, `logprobs` log q under the model that
sampled them, in nats; log_probs and fields are vectors over the same positions. The field `datum` says of each which
datum of the pass it belongs to, from 0, rising.

`candidates` is a field of a datum for `closed_set`, beside those of the Tinker API: (positions, most) int64, the tokens
that may stand at each position, sparse (CSR) or dense with -1 where there is none.

Of cross_entropy a position may have K targets, each with a weight: target_tokens and weights are then (positions, K),
dense or sparse with 0 where nothing is listed (Tinker API, top-K distillation).
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import lru_cache
from numbers import Real
from typing import Any

import numpy as np
import tinker
import torch
from torch import Tensor

from kshot.errors import RequestError, UnknownNameError
from vlm.local.model.lora import Factors
from vlm.local.model.packed import TextModel

log = logging.getLogger("kshot")
Fields = Mapping[str, Tensor]
Bound = float | Tensor
CANDIDATES, DATUM, RATIO_MASK = "candidates", "datum", "sequence_ratio_mask"
LEAST_POWER = 1e-9  # of closed_set; below it nothing differs from its limit but rounding
MOST_TARGETS = 1 << 24  # positions x K of one request: each has a log-probability in the answer


def cross_entropy(log_probs: Tensor, fields: Fields) -> Tensor:
    """Σ −log p · weight: a sum, not a mean (Tinker API). Weights may be negative."""
    return -(log_probs * fields["weights"]).sum()


def closed_set(log_probs: Tensor, fields: Fields, *, power: float) -> Tensor:
    """Σ (1 − p^power) / power over the data, p the exact posterior of a datum's choice (L_q of Zhang & Sabuncu 2018,
    arXiv:1805.07836).

    log p = Σ log_probs · weight over the datum's positions. Power 0 is the limit −log p, cross-entropy; power 1 is
    1 − p, the expected reward of answering, whose gradient is the policy gradient without sampling.
    """
    if power < LEAST_POWER:
        return cross_entropy(log_probs, fields)
    exponent = power * _sums(log_probs * fields["weights"], fields)
    powered = exponent.exp()  # gives the gradient: that of expm1 is lost to rounding in float32 where p is small
    return (-torch.expm1(exponent.detach()) - (powered - powered.detach())).sum() / power


def importance_sampling(log_probs: Tensor, fields: Fields) -> Tensor:
    """Σ −p/q · advantage: REINFORCE, corrected for samples of another policy (Tinker API)."""
    return -(_log_ratio(log_probs, fields).exp() * fields["advantages"]).sum()


def ppo(log_probs: Tensor, fields: Fields, *, clip_low_threshold: Bound, clip_high_threshold: Bound) -> Tensor:
    """Σ −min(r · advantage, clip(r, low, high) · advantage), r = p/q (Schulman et al. 2017; Tinker API).

    The thresholds bound the ratio itself: 0.8 and 1.2, not 0.2 twice. They are numbers, or (n,) one a position.
    """
    return _clipped(_log_ratio(log_probs, fields), fields["advantages"], clip_low_threshold, clip_high_threshold)


def cispo(log_probs: Tensor, fields: Fields, *, clip_low_threshold: Bound, clip_high_threshold: Bound) -> Tensor:
    """Σ −clip(r, low, high) · log p · advantage, r = p/q without a gradient (MiniMax-M1, Chen et al. 2025; Tinker API).

    A clipped position keeps its gradient, unlike in ppo.
    """
    coefficients = _log_ratio(log_probs, fields).detach().exp().clamp(clip_low_threshold).clamp(max=clip_high_threshold)
    return -(coefficients * log_probs * fields["advantages"]).sum()


def gspo(log_probs: Tensor, fields: Fields, *, clip_low_threshold: float, clip_high_threshold: float) -> Tensor:
    """Σ −min(s · A, clip(s, low, high) · A) over the data, s = (Π p/q)^(1/n) (Zheng et al. 2025, arXiv:2507.18071,
    equations 5 and 7, without their mean over a group).

    The n positions of a datum are those where its field `sequence_ratio_mask` is not 0, or where it gives none those
    with an advantage; A is the mean of their advantages. The paper's thresholds are the defaults.
    """
    mask = (fields[RATIO_MASK] if RATIO_MASK in fields else fields["advantages"]) != 0
    log_ratio = torch.where(mask, log_probs - fields["logprobs"], 0.0)
    lengths = _sums(mask.to(log_probs), fields).clamp(min=1)
    advantages = _sums(torch.where(mask, fields["advantages"], 0.0), fields) / lengths
    return _clipped(_sums(log_ratio, fields) / lengths, advantages, clip_low_threshold, clip_high_threshold)


def dro(log_probs: Tensor, fields: Fields, *, beta: float) -> Tensor:
    """Σ −(log p · advantage − ½ · beta · (log p − log q)²) (Richemond et al. 2024; Tinker API).

    The penalty counts at every position, whatever its advantage, as published: also at those of the prompt and of its
    images. So log q there must be the sampling policy's log-probability of target_tokens too, at image positions of
    target 0; a 0 in its place would pull p towards 1. Samples hold log q of the answer alone:
    `vlm.reward.with_log_probs` fills all of it from `forward`.
    """
    penalty = 0.5 * beta * (log_probs - fields["logprobs"]).square()
    return -(log_probs * fields["advantages"] - penalty).sum()


def _clipped(log_ratio: Tensor, advantages: Tensor, low: Bound, high: Bound) -> Tensor:
    """Σ −min(r · advantage, clip(r, low, high) · advantage)."""
    # The minimum is the ratio cut above where the advantage is positive, below where it is negative. It is cut before
    # exp: cut after it, a ratio that overflows would have the gradient 0 · ∞ in place of 0.
    above, below = log_ratio.clamp(max=_log(high)), log_ratio.clamp(min=_log(low))
    return -(torch.where(advantages > 0, above, below).exp() * advantages).sum()


def _sums(values: Tensor, fields: Fields) -> Tensor:
    """(data,) the sum of the values over the positions of each datum."""
    datum = fields[DATUM].to(values.device)
    return values.new_zeros(int(datum[-1]) + 1 if len(datum) else 1).index_add(0, datum, values)


def _log_ratio(log_probs: Tensor, fields: Fields) -> Tensor:
    """log p/q; 0 where the advantage is 0, lest a ratio that overflows there makes the sum 0 · ∞."""
    return torch.where(fields["advantages"] != 0, log_probs - fields["logprobs"], 0.0)


def _log(threshold: Bound) -> Bound:
    if isinstance(threshold, Tensor):
        return threshold.log()
    return math.log(threshold) if threshold > 0 else -math.inf


@dataclass(frozen=True)
class Loss:
    """A loss of LOSSES; `loss` returns it with its configuration filled in."""

    name: str
    function: Callable[..., Tensor]
    required: tuple[str, ...] = ()
    # a field and its value where the datum lacks it; None: then there is no such field
    optional: Mapping[str, float | None] = field(default_factory=dict)
    config: Mapping[str, float] = field(default_factory=dict)  # a key and its default; NaN: there is none
    closed: bool = False  # whether log-probabilities are among the candidates that a datum names, not all tokens
    top: bool = False  # whether a position may have several targets
    by_datum: bool = False  # whether its terms are those of data, not of positions

    @property
    def uses_sampled(self) -> bool:
        """Whether it reads sampled sequences: then their log-probabilities are returned at every position."""
        return "logprobs" in self.required

    @property
    def thresholds(self) -> Sequence[str]:
        """Those of its configuration that a datum may give for each position."""
        return [name for name in self.config if name in _CLIP and not self.by_datum]

    def __call__(self, log_probs: Tensor, fields: Fields) -> Tensor:
        """The sum (0-d) over the positions given, differentiable in log_probs: (n,) nats, or (n, K), as every field
        is."""
        return self.function(log_probs, fields, **{key: fields.get(key, value) for key, value in self.config.items()})

    def scored(self, fields: Fields) -> Tensor:
        """(n,) bool: the positions whose log-probability the value or the gradient depends on."""
        everywhere = self.config.get("beta", 0.0) != 0  # dro's penalty
        counts = fields["advantages" if self.uses_sampled else "weights"] != 0
        if RATIO_MASK in fields:
            counts = counts | (fields[RATIO_MASK] != 0)
        return (counts if counts.ndim == 1 else counts.any(1)) | everywhere


_SAMPLED = ("logprobs", "advantages")
_CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
_GSPO_CLIP = {"clip_low_threshold": 1 - 3e-4, "clip_high_threshold": 1 + 4e-4}  # section 5.1 of the paper
LOSSES: dict[str, Loss] = {
    each.name: each
    for each in (
        Loss("cross_entropy", cross_entropy, optional={"weights": 1.0}, top=True),
        Loss("closed_set", closed_set, optional={"weights": 1.0}, config={"power": 0.0}, closed=True),
        Loss("importance_sampling", importance_sampling, _SAMPLED),
        Loss("ppo", ppo, _SAMPLED, config=_CLIP),
        Loss("cispo", cispo, _SAMPLED, config=_CLIP),
        Loss("gspo", gspo, _SAMPLED, optional={RATIO_MASK: None}, config=_GSPO_CLIP, by_datum=True),
        # The documentation names no default for beta, and implementations differ by two orders of magnitude.
        Loss("dro", dro, _SAMPLED, config={"beta": math.nan}),
    )
}


SAMPLED_INSTEAD = "loss_fn=importance_sampling, ppo, cispo or gspo train on the same samples"
ELSEWHERE = {  # losses of the SDK that are not built
    "stable_reinforce": f"it is not built here; {SAMPLED_INSTEAD}, without record_stability_info",
    "custom": "losses by handle are not built here; give forward_backward_custom a function",
}


def loss(name: str, config: Mapping[str, Any] | None) -> Loss:
    """The loss of this name, configured as in the SDK's `loss_fn_config`.

    Raises UnknownNameError, and RequestError for a key that the loss does not take, one that is missing, a value that
    is no finite number of at least 0, and a low threshold above the high one.
    """
    if name not in LOSSES:
        raise UnknownNameError("loss function", name, LOSSES, ELSEWHERE.get(name, ""))
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
    a closed loss are not among them); all are (n, K) where there are K targets a position.

    An optional field that is not given holds its default at every position: weights are ones. Thresholds are among the
    fields where a datum gives them for its positions. What the loss does not read is left out, as the SDK's types allow
    any field, and logged once.

    Raises RequestError where a field is missing or has nearly the name of one that is not given, is not of the targets'
    shape, or holds a number that is not finite, and where target_tokens are not integers.
    """
    inputs, optional = datum.loss_fn_inputs, (*chosen.optional, *chosen.thresholds)
    names = ("target_tokens", *chosen.required, *([CANDIDATES] if chosen.closed else []))
    if missing := [name for name in names if name not in inputs]:
        raise RequestError(f"a datum lacks {', '.join(missing)}, which {chosen.name} reads; it has {sorted(inputs)}")
    for name in sorted(set(inputs) - {*names, *optional}):
        _check_unread(chosen.name, name, [each for each in optional if each not in inputs])
    targets = _tensor("target_tokens", inputs["target_tokens"], top=chosen.top)
    if targets.dtype != torch.int64:
        raise RequestError(f"target_tokens must be integers (int64), got {inputs['target_tokens'].dtype}")
    fields = {"target_tokens": targets}
    for name in (*chosen.required, *optional):
        if name in inputs:
            fields[name] = _tensor(name, inputs[name], top=chosen.top, targets=targets).float()
            _check_finite(name, fields[name])
        elif (usual := chosen.optional.get(name)) is not None:
            fields[name] = torch.full(targets.shape, usual)
    if chosen.thresholds:
        low, high = (fields.get(name, torch.tensor(chosen.config[name])) for name in _CLIP)
        if ((low < 0) | (low > high)).any():
            raise RequestError(f"{' or '.join(_CLIP)} of a position is negative, or the low one above the high one")
    return fields


def check_size(data: Sequence[tinker.Datum]) -> None:
    """Raise RequestError for more than MOST_TARGETS targets where positions have several, before any is read."""
    shapes = [each.loss_fn_inputs["target_tokens"].shape for each in data if "target_tokens" in each.loss_fn_inputs]
    if (count := sum(math.prod(shape) for shape in shapes if shape and len(shape) > 1)) > MOST_TARGETS:
        raise RequestError(f"{count:,} targets (positions x K) in a request; at most {MOST_TARGETS:,}: send fewer data")


def _check_unread(loss_name: str, name: str, optional: Sequence[str]) -> None:
    """Raise RequestError for a field that seems to be a misspelt one; else log, once, that it is not read."""
    if near := get_close_matches(name, optional, n=1, cutoff=0.8):
        raise RequestError(f"a datum has {name[:60]!r}, which {loss_name} does not read; did you mean {near[0]!r}?")
    _log_unread(loss_name, name[:60])


@lru_cache(maxsize=256)  # said once
def _log_unread(loss_name: str, name: str) -> None:
    log.warning("%s does not read the field %r of a datum, and leaves it out", loss_name, name)


def _number(name: str, key: str, value: Any) -> float:
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer beyond every float
        number = math.inf
    if not 0 <= number < math.inf:
        raise RequestError(f"{key} of loss {name!r} must be a finite number of at least 0, got {value!r}")
    return number


def _tensor(name: str, data: tinker.TensorData, *, top: bool, targets: Tensor | None = None) -> Tensor:
    """(n,), or (n, K) where a position may have several targets; of the shape of `targets`, if given."""
    sparse = data.sparse_crow_indices is not None
    shape = list(data.shape or ()) if sparse else list(data._numpy.shape)
    if not (top and len(shape) == 2 and shape[1]) and (sparse or len(shape) != 1):
        form = "a vector, a number per position" + (", or (positions, K) of K targets each" if top else "")
        raise RequestError(f"{name} must be {form}, got shape {shape}; cross_entropy alone reads several targets")
    if targets is not None and shape != list(targets.shape):
        both = shape, list(targets.shape)
        here, there = (f"{each[0]} entries" if len(each) == 1 else f"shape {each}" for each in both)
        raise RequestError(f"{name} has {here} and target_tokens {there}; the fields of a datum must be of one length")
    return data.to_torch()


def _check_finite(name: str, values: Tensor) -> None:
    if math.isfinite(float(values.sum())):
        return
    wrong = (~values.isfinite()).nonzero().tolist()  # none, where a sum of large numbers alone overflows
    if wrong:
        value = float(values[tuple(wrong[0])])
        raise RequestError(f"{name} at position {wrong[0][0]} is {value}, not a finite number; check it")


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


def log_probs(
    text: TextModel, hidden: Tensor, targets: Tensor, candidates: Candidates, factors: Factors | None
) -> Tensor:
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
