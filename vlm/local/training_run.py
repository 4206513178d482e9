"""What one training run changes: its adapter, its accumulated gradients, and its optimizer.

Weights, gradients and moments are flat float32 buffers (float64 for a model in that). A model of another dtype computes
with a copy of the weights in its own, whose gradients are added to the float32 ones after each pass.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from tinker import types
from torch import Tensor, nn

from kshot.checks import check_adam
from kshot.errors import ModelError, RequestError
from vlm.local.model.lora import Adapter, Factors, Layout, misfits

MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam, as torch names them


class TrainingRun:
    """A training run over a model that computes in `dtype`."""

    def __init__(self, adapter: Adapter, dtype: torch.dtype) -> None:
        self.adapter, self._has_gradients, self._started = adapter, False, False
        self._masters = {device: nn.Parameter(flat) for device, flat in adapter.flats.items()}
        gathered = {device: torch.zeros_like(flat) for device, flat in adapter.flats.items()}
        for device, master in self._masters.items():
            master.grad = gathered[device]
        self._optimizer = torch.optim.AdamW(self._masters.values(), fused=True)
        copies, gradients = ({d: flat.to(dtype) for d, flat in flats.items()} for flats in (adapter.flats, gathered))
        self.factors = Factors(adapter.layout, copies, gradients)
        self._gradients = [*gathered.values()]
        # where the model has another dtype: weights and their copy, the copy's gradients and what gathers them
        buffers = zip(adapter.flats.values(), copies.values(), gradients.values(), gathered.values(), strict=True)
        self._other_dtype = [*buffers] if dtype != adapter.layout.dtype else []

    @property
    def layout(self) -> Layout:
        return self.adapter.layout

    def call(self, name: str) -> None:
        """Give it a name, for errors."""
        self.adapter.name = self.factors.name = name

    def weights(self) -> dict[str, Tensor]:
        """A copy of the adapter's tensors, by PEFT's names."""
        return {name: tensor.detach().clone() for name, tensor in self.adapter.named().items()}

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around the passes of one request. Where a later one fails, all gradients are dropped, so that no step is made
        with a part; a request that fails before its first changes nothing."""
        self._started = False
        try:
            yield
        except BaseException:
            if self._started:
                self.clear_gradients()
            raise

    def add(self, backward: Callable[[], None]) -> None:
        """Run a backward pass and accumulate its gradients."""
        self._started = True
        backward()
        self._has_gradients = True
        for _, _, part, whole in self._other_dtype:
            whole.add_(part)
            part.zero_()

    def gather(self, add_up: Callable[[Tensor], object]) -> None:
        """Have other processes' gradients of this run added to those gathered here: some of them have any."""
        self._has_gradients = True
        for gradient in self._gradients:
            add_up(gradient)

    def clear_gradients(self) -> None:
        """Set the accumulated gradients to zero."""
        self._has_gradients = False
        for gradient in (*self._gradients, *(part for _, _, part, _ in self._other_dtype)):
            gradient.zero_()

    def step(self, params: types.AdamParams) -> float:
        """AdamW (Loshchilov & Hutter 2019) on the accumulated gradients, which are then cleared. Returns their norm.

        Raises RequestError where there are none, for parameters out of range, and for gradients that are not finite,
        which are cleared.
        """
        if not self._has_gradients:
            raise RequestError("optim_step without gradients; call forward_backward first")
        check_adam(params)
        limit = params.grad_clip_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self._masters.values(), limit)
        if not norm.isfinite():
            self.clear_gradients()
            raise RequestError("the gradients are not finite; they are cleared and the weights stay as they were")
        betas = params.beta1, params.beta2
        options = {"lr": params.learning_rate, "betas": betas, "eps": params.eps, "weight_decay": params.weight_decay}
        self._optimizer.param_groups[0].update(options)
        self._optimizer.step()
        self.clear_gradients()
        self._refresh()
        return float(norm)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """A copy of Adam's state, `<tensor>.<moment>` and `step`; empty before its first step."""
        states = {device: self._optimizer.state[master] for device, master in self._masters.items()}
        if not all(states.values()):
            return {}
        tensors = {"step": next(iter(states.values()))["step"].detach().cpu().clone()}
        for moment in MOMENTS:
            flats = {device: state[moment] for device, state in states.items()}
            for name, piece in self.adapter.layout.pieces.items():
                tensors[f"{name}.{moment}"] = piece.of(flats).clone()
        return tensors

    def optimizer_flats(self) -> dict[str, Tensor]:
        """Adam's moments and steps as they are; empty before its first step. Of a run on one device."""
        (master,) = self._masters.values()
        state = self._optimizer.state[master]
        return {name: state[name] for name in (*MOMENTS, "step")} if state else {}

    def restore(self, adapter: Adapter, optimizer: Mapping[str, Tensor]) -> None:
        """Take the numbers of another adapter of this layout, and Adam's state as `optimizer_tensors` gives it.

        Raises ModelError, before anything is changed, where the state has other tensors.
        """
        self.restore_flats(adapter, moments_of(adapter.layout, optimizer), optimizer.get("step"))

    def restore_flats(
        self, adapter: Adapter, moments: Mapping[str, Mapping[torch.device, Tensor]], step: Tensor | None
    ) -> None:
        """The same with Adam's moments in flat buffers."""
        for device, master in self._masters.items():
            master.detach().copy_(adapter.flats[device])
            self._optimizer.state.pop(master, None)
            if moments and step is not None:
                values = {moment: flats[device] for moment, flats in moments.items()}
                self._optimizer.state[master] = {"step": step.to(device).clone(), **values}
        self.clear_gradients()
        self._refresh()

    def _refresh(self) -> None:
        for weights, copy, _, _ in self._other_dtype:
            copy.copy_(weights)


def moments_of(layout: Layout, tensors: Mapping[str, Tensor]) -> dict[str, dict[torch.device, Tensor]]:
    """Adam's moments as flat buffers; empty for an empty state. Raises ModelError for other tensors."""
    if not tensors:
        return {}
    shapes = {f"{name}.{m}": piece.shape for name, piece in layout.pieces.items() for m in MOMENTS} | {"step": ()}
    if wrong := misfits(tensors, shapes):
        raise ModelError(f"checkpoint does not fit the optimizer in {len(wrong)} tensors: first {wrong[0]!r}")
    return {m: layout.flats({name: tensors[f"{name}.{m}"] for name in layout.pieces}) for m in MOMENTS}
