"""The SDK's `ServiceClient` methods over engines of this process. Knows no mathematics.

One worker thread runs the requests of a service in the order they were made, so a client may submit
forward_backward and optim_step before it waits for either.
"""

import uuid
from itertools import count
from pathlib import Path
from typing import Any

import torch
from tinker import types
from tinker.lib.public_interfaces.api_future import AwaitableConcurrentFuture

from kshot_errors import RequestError
from vlm.local import checkpoint
from vlm.local.host import Host, check_optimizer, check_seed
from vlm.local.sampling_client import LocalSamplingClient, refuse
from vlm.local.training_client import LocalTrainingClient
from vlm.models import MODELS


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
        state = state_dir or checkpoint.state_folder()
        self._host = Host(state, device, dtype, train_vision, features, cache_bytes)
        self._session, self._runs = str(uuid.uuid4()), count()

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
        check_optimizer(optimizer)
        check_seed(seed)
        spec = self._host.spec(rank, train_mlp=train_mlp, train_attn=train_attn, train_unembed=train_unembed)
        return self._host.submit(self._host.start, self._next_id(), base_model, spec, seed, user_metadata)

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
        check_optimizer(optimizer)
        return self._resume(path, base_model, user_metadata, optimizer=False)

    def create_training_client_from_state_with_optimizer(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
    ) -> AwaitableConcurrentFuture[LocalTrainingClient]:
        """A future of a new run with the weights and the optimizer of a checkpoint."""
        refuse(weights_access_token=weights_access_token)
        return self._resume(path, base_model, user_metadata, optimizer=True)

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
        return self._host.submit(self._host.sampler, model_path, base_model)

    def create_sampling_client_from_folder(
        self, folder: Path, base_model: str | None = None
    ) -> AwaitableConcurrentFuture[LocalSamplingClient]:
        """A future of a client on the adapter in a folder of the checkpoint layout, wherever it lies.

        base_model: the model under another name than the recorded one, as where its folder was moved. Not of the SDK,
        and for callers in this process alone: it reads what folder it is told, so no request from outside may reach it.
        """
        return self._host.submit(self._host.sampler_of_folder, Path(folder), base_model)

    def get_server_capabilities(self) -> types.GetServerCapabilitiesResponse:
        """The models with names of their own; any Qwen3-VL folder or hub id works besides."""
        models = [types.SupportedModel(model_name=name) for name in MODELS]
        return types.GetServerCapabilitiesResponse(supported_models=models)

    def close(self) -> None:
        """Finish what was requested and stop the worker."""
        self._host.close()

    def _resume(
        self, path: str, base_model: str | None, user_metadata: dict[str, str] | None, *, optimizer: bool
    ) -> AwaitableConcurrentFuture[LocalTrainingClient]:
        given = self._next_id(), path, base_model, user_metadata
        return self._host.submit(self._host.resume, *given, optimizer=optimizer)

    def _next_id(self) -> str:
        return f"{self._session}:train:{next(self._runs)}"
