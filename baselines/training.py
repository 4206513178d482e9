"""LoRA and a linear head, trained behind the methods of the SDK's `TrainingClient`, as the language model is.

A classifier is here a language model with sequences of one position, whose vocabulary is the classes: see
`baselines.examples.datum`. Knows no mathematics, neither data sets nor budgets: the caller makes the batches.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import tinker
from tinker import types
from tinker.lib.public_interfaces.api_future import AwaitableConcurrentFuture

from baselines import head_checkpoints
from baselines.head_checkpoints import Checkpoint
from baselines.lora import LoraHead, Shape
from baselines.run import Run
from baselines.sampling import LoraHeadSampler
from baselines.worker import Worker
from kshot_errors import RequestError
from kshot_training import path_of


class LoraHeadClient:
    """One training run in this process; meets the training API's Protocol of a training client.

    Requests run in the order they are made, on one thread. The same requests after the same seed give the same bits.

    Args:
        model, device, readout: see `baselines.backbone.load`, which also lists what is raised.
        n_classes, rank, size: see `baselines.lora.Shape`. seed: LoRA's A is drawn from it.
        state: the folder where checkpoints are written and found; without one there are none.

    Raises:
        InputError: n_classes, rank, seed or size out of range. ModelError: the model has no blocks to put LoRA on.
    """

    def __init__(
        self,
        model: str,
        n_classes: int,
        *,
        seed: int,
        rank: int = 32,
        readout: str = "cls",
        size: int | None = None,
        device: str = "cpu",
        state: Path | None = None,
    ) -> None:
        self.model_id = f"{uuid4()}:train:0"  # each client is a session of one run
        self._run = Run(LoraHead(Shape(model, n_classes, rank, readout, size), seed=seed, device=device))
        self._state, self._worker = state, Worker()

    def forward(
        self, data: list[tinker.Datum], loss_fn: str, loss_fn_config: Mapping[str, Any] | None = None
    ) -> AwaitableConcurrentFuture[types.ForwardBackwardOutput]:
        """The loss and every target's log-probability, without a gradient."""
        call = partial(self._run.forward_backward, forward_only=True)
        return self._worker.submit(call, list(data), loss_fn, loss_fn_config)

    def forward_backward(
        self, data: list[tinker.Datum], loss_fn: str, loss_fn_config: Mapping[str, Any] | None = None
    ) -> AwaitableConcurrentFuture[types.ForwardBackwardOutput]:
        """The loss, "cross_entropy", and its gradient, which is added to what was gathered since the last step.

        data: as `baselines.examples.datum` makes them, with a weight each where wanted. What cannot be used raises from
        the future (see `Run.forward_backward`).
        """
        return self._worker.submit(self._run.forward_backward, list(data), loss_fn, loss_fn_config)

    def optim_step(
        self, optim_params: types.AdamParams | None = None
    ) -> AwaitableConcurrentFuture[types.OptimStepResponse]:
        """One AdamW step with the gathered gradients, which are then cleared; see `Run.optim_step`."""
        if not isinstance(optim_params, types.AdamParams):
            raise RequestError(f"optim_step takes one AdamParams, got {optim_params!r}")
        return self._worker.submit(self._run.optim_step, optim_params)

    def save_state(self, name: str) -> AwaitableConcurrentFuture[types.SaveWeightsResponse]:
        """Write weights and optimizer; the response holds the checkpoint's tinker:// path."""
        state, path = self._folder(), path_of(self.model_id, "weights", name)
        return self._worker.submit(self._save, state, path)

    def load_state(self, path: str) -> AwaitableConcurrentFuture[types.LoadWeightsResponse]:
        """Take the weights of a checkpoint; the optimizer starts anew."""
        return self._worker.submit(self._load, self._folder(), path, optimizer=False)

    def load_state_with_optimizer(self, path: str) -> AwaitableConcurrentFuture[types.LoadWeightsResponse]:
        """Take the weights and the optimizer of a checkpoint."""
        return self._worker.submit(self._load, self._folder(), path, optimizer=True)

    def save_weights_for_sampler(self, name: str) -> AwaitableConcurrentFuture[types.SaveWeightsForSamplerResponse]:
        """Write the weights alone, for `baselines.sampling.load_sampler`."""
        state, path = self._folder(), path_of(self.model_id, "sampler_weights", name)
        return self._worker.submit(self._save_for_sampler, state, path)

    def save_weights_and_get_sampling_client(self) -> AwaitableConcurrentFuture[LoraHeadSampler]:
        """A future of a client on a snapshot of the weights as they are when the request's turn comes.

        It shares this client's thread: its requests, too, run in the order they are made.
        """
        return self._worker.submit(lambda: LoraHeadSampler(self._run.head.snapshot(), self._worker))

    def get_tokenizer(self) -> Any:
        """Raises RequestError: there is none."""
        raise RequestError("a classifier has no tokenizer: its tokens are class indices")

    def get_info(self) -> types.GetInfoResponse:
        """Backbone, run id and LoRA rank."""
        head = self._run.head
        data = types.ModelData(arch=type(head.backbone.module).__name__, model_name=head.shape.model)
        return types.GetInfoResponse(
            model_data=data,
            model_id=self.model_id,
            is_lora=True,
            lora_rank=head.shape.rank,
            model_name=head.shape.model,
        )

    def close(self) -> None:
        """Finish what was requested and end the thread, also for the sampling clients of this run."""
        self._worker.close()

    def _folder(self) -> Path:
        if self._state is None:
            raise RequestError("this client has no folder for checkpoints; give it one with state=")
        return self._state

    def _save(self, state: Path, path: str) -> types.SaveWeightsResponse:
        run = self._run
        head_checkpoints.save(state, path, Checkpoint(run.head.shape, run.weights(), run.optimizer_tensors()))
        return types.SaveWeightsResponse(path=path)

    def _save_for_sampler(self, state: Path, path: str) -> types.SaveWeightsForSamplerResponse:
        head_checkpoints.save(state, path, Checkpoint(self._run.head.shape, self._run.weights()))
        return types.SaveWeightsForSamplerResponse(path=path)

    def _load(self, state: Path, path: str, *, optimizer: bool) -> types.LoadWeightsResponse:
        saved, own = head_checkpoints.load(state, path), self._run.head.shape
        if saved.shape != own:
            pairs = {name: (value, getattr(own, name)) for name, value in vars(saved.shape).items()}
            told = ", ".join(f"{name} {a!r} and not {b!r}" for name, (a, b) in pairs.items() if a != b)
            raise RequestError(
                f"checkpoint {path} is of another run than this one: it has {told}; make a client like it"
            )
        if optimizer and saved.optimizer is None:
            raise RequestError(f"checkpoint {path} was saved without optimizer state; use load_state")
        self._run.restore(saved.weights, (saved.optimizer or {}) if optimizer else {})
        return types.LoadWeightsResponse(path=path)
