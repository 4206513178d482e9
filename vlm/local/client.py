"""The SDK's `ServiceClient` methods over engines of this process. Knows no mathematics.

One worker thread runs the requests of a service in the order they were made, so a client may submit
forward_backward and optim_step before it waits for either.
"""

import secrets
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from tinker import types
from tinker.lib.public_interfaces.api_future import AwaitableConcurrentFuture

from kshot_errors import ModelError, RequestError, UnknownNameError
from vlm.local import checkpoint
from vlm.local.adapter import Adapter, LoraSpec
from vlm.local.checkpoint import Checkpoint
from vlm.local.engine import BASE, Engine
from vlm.local.model import Model
from vlm.local.sampling_client import LocalSamplingClient, refuse
from vlm.local.training_client import LocalTrainingClient
from vlm.local.vision import Vision
from vlm.models import MODELS

T = TypeVar("T")


class LocalServiceClient:
    """Training and sampling on models of this process; meets `vlm.service.ServiceClient`.

    state_dir: where checkpoints are written and found. device: where models are put ("auto": spread over all GPUs).
    dtype: what they compute in; None is the checkpoint's own. train_vision: whether LoRA covers the vision tower too.
    features: a folder that keeps image features between processes, or None. cache_bytes: how much memory they may
    take in this one; None is a quarter of the machine's, at most 16 GiB.
    """

    def __init__(
        self,
        state_dir: Path | None = None,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        *,
        train_vision: bool = False,
        features: Path | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        self._state, self._device, self._dtype = state_dir or checkpoint.state_folder(), device, dtype
        self._train_vision, self._features, self._cache_bytes = train_vision, features, cache_bytes
        self._engines: dict[str, Engine] = {}
        self._session, self._runs = str(uuid.uuid4()), 0
        self._worker_thread: int | None = None
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
        if not (seed is None or (isinstance(seed, int) and 0 <= seed < 2**63)):
            raise RequestError(f"seed {seed!r} must be a whole number from 0 to 2^63 - 1, or None for a random one")
        spec = LoraSpec(rank, train_mlp, train_attn, train_unembed, self._train_vision)
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

    def create_sampling_client_from_folder(
        self, folder: Path, base_model: str | None = None
    ) -> AwaitableConcurrentFuture[LocalSamplingClient]:
        """A future of a client on the adapter in a folder of the checkpoint layout, wherever it lies.

        base_model: the model under another name than the recorded one, as where its folder was moved. Not of the SDK,
        and for callers in this process alone: it reads what folder it is told, so no request from outside may reach it.
        """
        return self._submit(self._from_folder, Path(folder), base_model)

    def get_server_capabilities(self) -> types.GetServerCapabilitiesResponse:
        """The models with names of their own; any Qwen3-VL folder or hub id works besides."""
        models = [types.SupportedModel(model_name=name) for name in MODELS]
        return types.GetServerCapabilitiesResponse(supported_models=models)

    def close(self) -> None:
        """Finish what was requested and stop the worker."""
        self._worker.shutdown()

    def _submit(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> AwaitableConcurrentFuture[T]:
        if self._worker_thread == threading.get_ident():
            raise RequestError("a custom loss cannot ask its own service: the answer would wait for the loss itself")
        try:
            return AwaitableConcurrentFuture(self._worker.submit(partial(self._call, call, *args, **kwargs)))
        except RuntimeError as error:
            raise RequestError("the service is closed; connect again") from error

    def _call(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """On the worker."""
        self._worker_thread = threading.get_ident()
        return call(*args, **kwargs)

    def _engine(self, base_model: str) -> Engine:
        if base_model not in self._engines:
            model = Model(base_model, self._device, self._dtype)
            self._engines[base_model] = Engine(model, Vision(model, self._cache_bytes, self._features))
        return self._engines[base_model]

    def _start(
        self, base_model: str, spec: LoraSpec, seed: int | None, user_metadata: dict[str, str] | None
    ) -> LocalTrainingClient:
        engine = self._engine(base_model)
        model_id = f"{self._session}:train:{self._runs}"
        run = engine.start(spec, secrets.randbits(31) if seed is None else seed)
        self._runs += 1
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
        return self._adapted(checkpoint.load(self._state, model_path or ""))

    def _from_folder(self, folder: Path, base_model: str | None) -> LocalSamplingClient:
        saved = checkpoint.load_folder(folder)
        name = base_model or saved.base_model
        try:
            self._engine(name)
        except UnknownNameError as error:
            if base_model is not None:
                raise
            way_out = "say with base_model (--model) where it is"
            raise ModelError(f"adapter {folder} is of the model {name}, which is not here; {way_out}") from error
        try:
            return self._adapted(replace(saved, base_model=name))
        except ModelError as error:
            raise ModelError(f"adapter {folder} does not belong to the model {name}: {error}") from error

    def _adapted(self, saved: Checkpoint) -> LocalSamplingClient:
        engine = self._engine(saved.base_model)
        adapter = Adapter.of(engine.model.layout(saved.spec), saved.weights)
        return LocalSamplingClient(engine, engine.snapshot(adapter), self._submit)
