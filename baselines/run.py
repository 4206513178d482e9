"""What one training run changes: a head, the gradients gathered for it, and its optimizer. Knows no futures, no files.

The semantics are those of the Tinker API, as of the language model's runs: a loss is a sum over the data, gradients
accumulate until the optimizer's step, the step is AdamW.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import tinker
import torch
from tinker import types
from torch import Tensor
from torch.nn.functional import cross_entropy

from baselines.examples import items_of, named
from baselines.lora import LoraHead, check_tensors
from baselines.pixels import PixelCache
from kshot_errors import RequestError
from kshot_training import check_adam

LOSS = "cross_entropy"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam, as torch names them


class Run:
    """A training run of `head`. Not thread-safe: one worker calls it, in order."""

    def __init__(self, head: LoraHead) -> None:
        self.head, self._gathered, self._begun = head, False, False
        self._trained = head.trained()
        for parameter in self._trained.values():
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer = torch.optim.AdamW(self._trained.values(), fused=True)
        self._pixels = PixelCache(head.backbone.patch, head.shape.size)

    def forward_backward(
        self,
        data: Sequence[tinker.Datum],
        loss_fn: str,
        config: Mapping[str, Any] | None,
        *,
        forward_only: bool = False,
    ) -> types.ForwardBackwardOutput:
        """Σ −log p(target) · weight over the data, in nats, and unless `forward_only` its gradient, added to the run's.

        A request that does not fit changes nothing; where a pass fails after another one (out of memory), what the run
        has gathered is dropped, so that no step is made with a part.

        Raises:
            RequestError: another loss, a configuration, data that do not fit. ImageError: an image that is none.
        """
        _check_loss(loss_fn, config)
        items = items_of(data, self.head.shape.n_classes)
        pixels = [self._decoded(number, item.image) for number, item in enumerate(items)]
        total, log_probs = 0.0, np.empty((len(items), 1), np.float32)
        with torch.set_grad_enabled(not forward_only), self._request():
            for members, logits in self.head.logits(pixels):
                targets = torch.tensor([items[n].label for n in members], device=logits.device)
                weights = torch.tensor([items[n].weight for n in members], device=logits.device)
                losses = cross_entropy(logits, targets, reduction="none")
                value = (losses * weights).sum()
                if not forward_only:
                    self._add(value)
                total += value.item()
                log_probs[members, 0] = -losses.detach().cpu().numpy()
        answers = [{"logprobs": tinker.TensorData.from_numpy(row)} for row in log_probs]
        return types.ForwardBackwardOutput("ArrayRecord", answers, {"loss:sum": total})

    def optim_step(self, params: types.AdamParams) -> types.OptimStepResponse:
        """AdamW (Loshchilov & Hutter 2019) on the gathered gradients, which are then cleared. Answers their norm.

        Raises:
            RequestError: no gradients, parameters out of range, or gradients that are not finite, which are cleared.
        """
        if not self._gathered:
            raise RequestError("optim_step without gradients; call forward_backward first")
        check_adam(params)
        limit = params.grad_clip_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self._trained.values(), limit)
        if not norm.isfinite():
            self._forget()
            raise RequestError("the gradients are not finite; they are cleared and the weights stay as they were")
        self._optimizer.param_groups[0].update(
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
        )
        self._optimizer.step()
        self._forget()
        return types.OptimStepResponse(metrics={"grad_norm:mean": float(norm)})

    def gradients(self) -> dict[str, Tensor]:
        """The name of each trained parameter → its gathered gradient."""
        return {name: p.grad for name, p in self._trained.items() if p.grad is not None}

    def weights(self) -> dict[str, Tensor]:
        """A copy of the trained parameters' numbers, by name."""
        return {name: parameter.detach().clone() for name, parameter in self._trained.items()}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """A copy of Adam's state, `<tensor>.<moment>` and `step`; empty before its first step."""
        states = {name: self._optimizer.state[parameter] for name, parameter in self._trained.items()}
        if not all(states.values()):
            return {}
        moments = {f"{name}.{m}": state[m].clone() for name, state in states.items() for m in MOMENTS}
        return {"step": next(iter(states.values()))["step"].detach().cpu().clone(), **moments}

    def restore(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Take numbers of this shape, and Adam's state as `optimizer_tensors` gives it.

        Raises:
            ModelError: other tensors; nothing is changed then.
        """
        if optimizer:
            wanted = {f"{name}.{m}": parameter for name, parameter in self._trained.items() for m in MOMENTS}
            check_tensors("the optimizer", {"step": torch.zeros(()), **wanted}, optimizer)
        self.head.take(weights)
        self._optimizer.state.clear()
        for name, parameter in self._trained.items() if optimizer else ():
            tensors = {"step": optimizer["step"], **{m: optimizer[f"{name}.{m}"] for m in MOMENTS}}
            self._optimizer.state[parameter] = {k: t.to(parameter.device, copy=True) for k, t in tensors.items()}
        self._forget()

    @contextmanager
    def _request(self) -> Iterator[None]:
        """Around the passes of one request, whose gradients are gathered whole or not at all."""
        self._begun = False
        try:
            yield
        except BaseException:
            if self._begun:
                self._forget()
            raise

    def _add(self, value: Tensor) -> None:
        self._begun = True
        value.backward()
        self._gathered = True

    def _forget(self) -> None:
        self._gathered = False
        for gradient in self.gradients().values():
            gradient.zero_()

    def _decoded(self, number: int, image: bytes) -> np.ndarray:
        with named(f"datum {number}"):
            return self._pixels(image)


def _check_loss(loss_fn: str, config: Mapping[str, Any] | None) -> None:
    if loss_fn != LOSS:
        raise RequestError(f"loss {loss_fn!r} is not one of a classifier's; use {LOSS!r}")
    if config:
        raise RequestError(f"loss {LOSS!r} takes no configuration, got {sorted(config)}")
