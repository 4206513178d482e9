"""The SDK's `ServiceClient` methods over engines of this process. Knows no mathematics.

One worker thread runs the requests of a service in the order they were made, so a client may submit
forward_backward and optim_step before it waits for either.
"""

import logging
import secrets
import uuid
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tinker import types
from tinker.lib.public_interfaces.api_future import AwaitableConcurrentFuture

from kshot_errors import RequestError
from vlm.local import checkpoint
from vlm.local.engine import BASE, Engine, Snapshot
from vlm.local.model import LoraSpec, Model
from vlm.local.sampling_client import LocalSamplingClient, refuse
from vlm.local.training_client import LocalTrainingClient
from vlm.models import MODELS

T = TypeVar("T")
log = logging.getLogger(__name__)


class LocalServiceClient:
    """Training and sampling on models of this process; meets `vlm.service.ServiceClient`.

    state_dir: where checkpoints are written and found. device: where models are put.
    """

    def __init__(self, state_dir: Path | None = None, device: str = "cpu") -> None:
        self._state, self._device = state_dir or checkpoint.state_folder(), device
        self._engines: dict[str, Engine] = {}
        self._session, self._runs = str(uuid.uuid4()), 0
        self._abandoned: deque[tuple[Engine, str]] = deque()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kshot-engine")

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: dict[str, str] | None = None,
        optimizer: types.AdamOptimizerConfig | None = None,
    ) -> AwaitableConcurrentFuture[LocalTrainingClient]:
        """A future of a new training run on `base_model`; the LoRA weights are initialised from `seed`."""
        refuse(optimizer=None if isinstance(optimizer, types.AdamOptimizerConfig) else optimizer)
        spec = LoraSpec(rank, train_mlp, train_attn, train_unembed)
        return self._submit(self._start, base_model, spec, seed, user_metadata)

    def create_training_client_from_state(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
        optimizer: types.AdamOptimizerConfig | None = None,
    ) -> AwaitableConcurrentFuture[LocalTrainingClient]:
        """A future of a new run with the weights of a checkpoint and a fresh optimizer."""
        refuse(weights_access_token=weights_access_token)
        refuse(optimizer=None if isinstance(optimizer, types.AdamOptimizerConfig) else optimizer)
        return self._submit(self._resume, path, base_model, user_metadata, optimizer=False)

    def create_training_client_from_state_with_optimizer(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
    ) -> AwaitableConcurrentFuture[LocalTrainingClient]:
        """A future of a new run with the weights and the optimizer of a checkpoint."""
        refuse(weights_access_token=weights_access_token)
        return self._submit(self._resume, path, base_model, user_metadata, optimizer=True)

    def create_sampling_client(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: Any = None,
        record_stability_info: bool = False,
    ) -> AwaitableConcurrentFuture[LocalSamplingClient]:
        """A future of a client on saved sampler weights, or on a base model as it is."""
        refuse(retry_config=retry_config, record_stability_info=record_stability_info)
        if (model_path is None) == (base_model is None):
            raise RequestError("create_sampling_client takes either model_path or base_model")
        return self._submit(self._sampler, model_path, base_model)

    def get_server_capabilities(self) -> types.GetServerCapabilitiesResponse:
        """The models with names of their own; any Qwen3-VL folder or hub id works besides."""
        models = [types.SupportedModel(model_name=name) for name in MODELS]
        return types.GetServerCapabilitiesResponse(supported_models=models)

    def close(self) -> None:
        """Finish what was requested and stop the worker."""
        self._worker.shutdown()

    def _submit(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> AwaitableConcurrentFuture[T]:
        try:
            return AwaitableConcurrentFuture(self._worker.submit(self._run, partial(call, *args, **kwargs)))
        except RuntimeError as error:
            raise RequestError("the service is closed; connect again") from error

    def _run(self, call: Callable[[], T]) -> T:
        """On the worker: first give back the memory of what nobody can reach any more, then do what was asked."""
        while self._abandoned:
            engine, adapter = self._abandoned.popleft()
            try:
                engine.end(adapter)
            except Exception:  # it is nobody's request: say so and go on
                log.exception("adapter %s could not be released", adapter)
        return call()

    def _engine(self, base_model: str) -> Engine:
        if base_model not in self._engines:
            self._engines[base_model] = Engine(Model(base_model, self._device))
        return self._engines[base_model]

    def _start(
        self, base_model: str, spec: LoraSpec, seed: int | None, user_metadata: dict[str, str] | None
    ) -> LocalTrainingClient:
        engine = self._engine(base_model)
        model_id = f"{self._session}:train:{self._runs}"
        run = engine.start(f"run_{self._runs}", spec, secrets.randbits(31) if seed is None else seed)
        self._runs += 1
        # A finalizer may run in the middle of anything, even of a submit: it takes no lock and leaves the rest to the
        # worker. Requests that are still to run hold the run, so it outlives them.
        weakref.finalize(run, self._abandoned.append, (engine, run.adapter))
        return LocalTrainingClient(engine, run, model_id, self._state, self._submit, user_metadata)

    def _resume(
        self, path: str, base_model: str | None, user_metadata: dict[str, str] | None, *, optimizer: bool
    ) -> LocalTrainingClient:
        saved = checkpoint.load(self._state, path)
        if base_model not in (None, saved.base_model):
            raise RequestError(f"checkpoint {path} is of {saved.base_model!r}, not of {base_model!r}")
        client = self._start(saved.base_model, saved.spec, 0, user_metadata)
        client.restore(saved, path, optimizer=optimizer)
        return client

    def _sampler(self, model_path: str | None, base_model: str | None) -> LocalSamplingClient:
        if base_model is not None:
            return LocalSamplingClient(self._engine(base_model), BASE, self._submit)
        saved = checkpoint.load(self._state, model_path or "")
        return LocalSamplingClient(self._engine(saved.base_model), Snapshot(saved.spec, saved.weights), self._submit)
