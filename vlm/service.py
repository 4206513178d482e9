"""The training API as Protocols, and `connect`, which picks who answers it. Knows no model, image or class.

Names, arguments and futures are those of the official SDK (`tinker`, Apache-2.0). "tinker" and http addresses are the
official client itself; "local" runs the engine in this process.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import tinker
from tinker import types

from kshot_errors import UnknownNameError

T_co = TypeVar("T_co", covariant=True)
LOOPBACK_KEY = "tml-local"  # the SDK insists on a key of this shape; a local server without keys takes any


class Future(Protocol[T_co]):
    """What every request returns at once: `.result()` blocks, `await` does not."""

    def result(self, timeout: float | None = None) -> T_co: ...
    def __await__(self) -> Any: ...


class SamplingClient(Protocol):
    """Fixed weights to sample from: a base model or a snapshot, never live weights."""

    def sample(
        self,
        prompt: tinker.ModelInput,
        num_samples: int,
        sampling_params: types.SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: types.TensorData | None = None,
    ) -> Future[types.SampleResponse]: ...
    def compute_logprobs(self, prompt: tinker.ModelInput) -> Future[list[float | None]]: ...
    def get_tokenizer(self) -> Any: ...


class TrainingClient(Protocol):
    """One training run: LoRA weights, their gradients and their optimizer. Requests run in the order they are made."""

    def forward(
        self, data: list[tinker.Datum], loss_fn: Any, loss_fn_config: Mapping[str, Any] | None = None
    ) -> Future[types.ForwardBackwardOutput]: ...
    def forward_backward(
        self, data: list[tinker.Datum], loss_fn: Any, loss_fn_config: Mapping[str, Any] | None = None
    ) -> Future[types.ForwardBackwardOutput]: ...
    def optim_step(self, optim_params: Any = None) -> Future[types.OptimStepResponse]: ...
    def save_state(self, name: str) -> Future[types.SaveWeightsResponse]: ...
    def load_state(self, path: str) -> Future[Any]: ...
    def load_state_with_optimizer(self, path: str) -> Future[Any]: ...
    def save_weights_for_sampler(self, name: str) -> Future[types.SaveWeightsForSamplerResponse]: ...
    def save_weights_and_get_sampling_client(self) -> Any: ...
    def get_tokenizer(self) -> Any: ...
    def get_info(self) -> types.GetInfoResponse: ...


class ServiceClient(Protocol):
    """Makes training and sampling clients. Like the SDK's, the makers return a future: call `.result()` on it."""

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
    ) -> Any: ...
    def create_sampling_client(self, model_path: str | None = None, base_model: str | None = None) -> Any: ...
    def get_server_capabilities(self) -> types.GetServerCapabilitiesResponse: ...


def connect(service: str = "local", *, state_dir: Path | None = None, api_key: str | None = None) -> ServiceClient:
    """The service client of "local" (this process), "tinker" (the hosted service) or an http address.

    state_dir: where "local" keeps checkpoints (default: kshot's folder below the user's state home). api_key: for
    remote services; on loopback it defaults to the key any local server takes. Raises UnknownNameError.
    """
    if service == "local":
        from vlm.local.client import LocalServiceClient

        return LocalServiceClient(state_dir)
    if service == "tinker":
        return _official(None, api_key)
    if service.startswith(("http://", "https://")):
        return _official(service, api_key or (LOOPBACK_KEY if _on_loopback(service) else None))
    raise UnknownNameError("service", service, ["local", "tinker", "http://HOST:PORT"])


def _official(base_url: str | None, api_key: str | None) -> ServiceClient:
    given: dict[str, Any] = {"base_url": base_url, "api_key": api_key}
    client: Any = tinker.ServiceClient(**{name: value for name, value in given.items() if value is not None})
    return client


def _on_loopback(address: str) -> bool:
    from urllib.parse import urlsplit

    host = urlsplit(address).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")
