"""One base model and everything that is trained and sampled on it. Knows no futures, names of paths, or classes.

Runs and snapshots are LoRA adapters over the shared base. Gradients of a run accumulate in its adapter until its
optimizer step. The calls here are not thread-safe: one worker makes them, in order.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tinker
import torch
from tinker import types
from torch import Tensor
from torch.nn.functional import cross_entropy

from kshot_errors import RequestError
from vlm.local.batch import Batch, collate, run
from vlm.local.losses import fields_of, loss
from vlm.local.model import LoraSpec, Model
from vlm.local.vision import Vision


@dataclass
class Run:
    """A training run: its adapter's name and spec, and the optimizer over the adapter's parameters."""

    adapter: str
    spec: LoraSpec
    optimizer: torch.optim.AdamW


@dataclass(frozen=True)
class Snapshot:
    """Fixed weights to sample from: tensors of an adapter, or the bare base model where `weights` is None."""

    spec: LoraSpec | None = None
    weights: Mapping[str, Tensor] | None = None


BASE = Snapshot()


class Engine:
    """Forward passes, gradients and optimizer steps on one model."""

    def __init__(self, model: Model) -> None:
        self.model, self.vision = model, Vision(model)
        self._in_slot: dict[str, weakref.ref[Snapshot]] = {}

    def start(self, adapter: str, spec: LoraSpec, seed: int) -> Run:
        """A new run: a LoRA adapter initialised from `seed`."""
        self.model.add_adapter(adapter, spec, seed)
        return Run(adapter, spec, torch.optim.AdamW(self.model.parameters(adapter).values()))

    def end(self, adapter: str) -> None:
        """Forget the run of this adapter: its weights and gradients."""
        self.model.drop_adapter(adapter)

    def forward_backward(
        self,
        trained: Run,
        data: Sequence[tinker.Datum],
        loss_fn: str,
        config: Mapping[str, Any] | None,
        *,
        forward_only: bool = False,
    ) -> types.ForwardBackwardOutput:
        """The loss of `data` and, unless `forward_only`, its gradient, added to the run's.

        Log-probabilities come back for every position when `forward_only`; else the head runs only where the weight
        is not zero, and the other positions hold 0.
        """
        compute = loss(loss_fn, config)
        if not data:
            raise RequestError("no data given; a forward pass needs at least one datum")
        fields = [fields_of(datum) for datum in data]
        for field in fields:
            self.model.check_tokens(field["target_tokens"].tolist(), "target")
        self.model.use(trained.adapter)
        with torch.set_grad_enabled(not forward_only):
            batch = self.collate([datum.model_input for datum in data])
            scored = _scored(fields, batch.lengths, everything=forward_only)
            rows, columns = _indices(scored)
            hidden = run(self.model, batch.ids, batch.positions, batch.images)[rows, columns]
            picked = {name: torch.cat([f[name][c] for f, c in zip(fields, scored, strict=True)]) for name in fields[0]}
            picked = {name: tensor.to(hidden.device) for name, tensor in picked.items()}
            log_probs = -cross_entropy(self.head(hidden), picked["target_tokens"], reduction="none")
            total = compute(log_probs, picked)
            if not forward_only:
                total.backward()
        outputs = _per_datum(log_probs.detach().float().cpu(), scored, batch.lengths)
        return types.ForwardBackwardOutput("ArrayRecord", outputs, {"loss:sum": float(total.detach())})

    def optim_step(self, trained: Run, params: types.AdamParams) -> types.OptimStepResponse:
        """AdamW with these parameters on the gradients gathered since the last step, which are then cleared.

        Raises RequestError where there are none (forward_backward comes first) and for negative parameters.
        """
        parameters = list(self.model.parameters(trained.adapter).values())
        if all(p.grad is None for p in parameters):
            raise RequestError("optim_step without gradients; call forward_backward first")
        if params.grad_clip_norm < 0 or params.learning_rate < 0:
            raise RequestError(f"grad_clip_norm and learning_rate must not be negative: {params}")
        limit = params.grad_clip_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        if not norm.isfinite():
            trained.optimizer.zero_grad(set_to_none=True)
            raise RequestError("the gradients are not finite; they are cleared and the weights stay as they were")
        trained.optimizer.param_groups[0].update(
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
        )
        trained.optimizer.step()
        trained.optimizer.zero_grad(set_to_none=True)
        return types.OptimStepResponse(metrics={"grad_norm:mean": float(norm)})

    def snapshot(self, trained: Run) -> Snapshot:
        return Snapshot(trained.spec, self.model.weights(trained.adapter))

    def use(self, snapshot: Snapshot) -> None:
        """Make a snapshot the weights that compute. Snapshots of one spec take turns in one adapter slot."""
        if snapshot.spec is None or snapshot.weights is None:
            self.model.use(None)
            return
        slot = f"snapshot_{snapshot.spec.label}"
        if not self.model.has_adapter(slot):
            self.model.add_adapter(slot, snapshot.spec, seed=0)
        held = self._in_slot.get(slot)
        if held is None or held() is not snapshot:
            self._in_slot.pop(slot, None)  # while it is written, the slot is nobody's
            self.model.set_weights(slot, dict(snapshot.weights))
            self._in_slot[slot] = weakref.ref(snapshot)
        self.model.use(slot)

    def collate(self, inputs: Sequence[tinker.ModelInput]) -> Batch:
        return collate(self.model, self.vision, inputs)

    def head(self, hidden: Tensor) -> Tensor:
        """(..., vocabulary) logits in float32 of hidden states (..., hidden)."""
        return self.model.stock.lm_head(hidden).float()


def _scored(fields: Sequence[Mapping[str, Tensor]], lengths: Sequence[int], *, everything: bool) -> list[Tensor]:
    """For each datum the positions whose log-probability is computed."""
    for row, (field, length) in enumerate(zip(fields, lengths, strict=True)):
        if len(field["target_tokens"]) != length:
            raise RequestError(
                f"datum {row}: target_tokens has {len(field['target_tokens'])} entries, its model input {length} "
                "positions (an image counts its tokens)"
            )
    if everything:
        return [torch.arange(length) for length in lengths]
    scored = [field["weights"].nonzero()[:, 0] for field in fields]
    if not sum(len(each) for each in scored):
        raise RequestError("every weight is zero; a gradient needs at least one weighted position")
    return scored


def _indices(scored: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    rows = [torch.full_like(columns, row) for row, columns in enumerate(scored)]
    return torch.cat(rows), torch.cat(list(scored))


def _per_datum(
    log_probs: Tensor, scored: Sequence[Tensor], lengths: Sequence[int]
) -> list[dict[str, tinker.TensorData]]:
    parts = log_probs.split([len(columns) for columns in scored])
    full = [torch.zeros(length) for length in lengths]
    for each, columns, part in zip(full, scored, parts, strict=True):
        each[columns] = part
    return [{"logprobs": tinker.TensorData.from_torch(each)} for each in full]
