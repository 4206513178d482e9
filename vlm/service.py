"""What is asked of the training API; `connect`, which gives a client of it; and what the engine says of this machine.

Names, arguments and futures are those of the official SDK (`tinker`, Apache-2.0). "tinker" and http addresses are the
official client itself; "local" runs the engine in this process. The engine is imported only when it is used.
"""

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import tinker
from tinker import APIFuture as Future
from tinker import types

from kshot.errors import RequestError, UnknownNameError

if TYPE_CHECKING:
    import torch

    from vlm.local.exchange.export import Proof

NAMES = ("local", "tinker", "http://HOST:PORT")
SCHEMES = {"http": 80, "https": 443}
LOOPBACK_KEY = "tml-local"  # the SDK insists on a key of this shape; a local server without keys takes any


class SamplingClient(Protocol):
    """Fixed weights to sample from: a base model or a snapshot, never live weights."""

    def sample(
        self,
        prompt: tinker.ModelInput,
        num_samples: int,
        sampling_params: types.SamplingParams,
        *,
        target_prompt_logprobs: types.TensorData | None = None,
    ) -> Future[types.SampleResponse]: ...
    def get_base_model(self) -> str: ...


class TrainingClient(Protocol):
    """One training run: LoRA weights, their gradients and their optimizer. Requests run in the order they are made."""

    def forward_backward(
        self, data: list[tinker.Datum], loss_fn: Any, loss_fn_config: dict[str, float] | None = None
    ) -> Future[types.ForwardBackwardOutput]: ...
    def optim_step(self, optim_params: Any) -> Future[types.OptimStepResponse]: ...
    def save_weights_and_get_sampling_client(self) -> Any: ...


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


def connect(
    service: str = "local",
    *,
    state_dir: Path | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    train_vision: bool = False,
    features: Path | None = None,
    cache_bytes: int | None = None,
    api_key: str | None = None,
) -> ServiceClient:
    """The service client of "local" (this process), "tinker" (the hosted service) or an http address.

    Of "local" alone: state_dir, where it keeps checkpoints (default: kshot's folder below the user's state home);
    device, what it computes on ("auto" spreads a model over all GPUs); dtype, "float32" or "bfloat16" (default: the
    checkpoint's); train_vision, whether LoRA covers the vision tower too, beside what each run says; features, a folder
    that keeps image features for later processes; cache_bytes, of image features in memory (default: see
    `feature_memory`). api_key: of the others; on loopback it defaults to the key any local server takes.
    Raises UnknownNameError for another name, RequestError for an option of the other kind.
    """
    local: dict[str, Any] = {"state_dir": state_dir, "dtype": dtype, "train_vision": train_vision}
    local |= {"features": features, "cache_bytes": cache_bytes, "device": device}
    if service == "local":
        if api_key is not None:
            raise RequestError("api_key is for remote services; the local one has none")
        from vlm.local.registry import LocalServiceClient, dtype_of

        return LocalServiceClient(**local | {"dtype": dtype_of(dtype)})
    if local_only := [name for name, value in local.items() if value not in (None, False, "cpu")]:
        raise RequestError(f"{', '.join(local_only)}: for the local service, not for {service!r}")
    if service == "tinker":
        return _official(None, api_key)
    host, _ = _host_and_port(service)
    on_loopback = host in ("localhost", "::1") or host.startswith("127.")
    return _official(service, api_key or (LOOPBACK_KEY if on_loopback else None))


def check(service: str, timeout: float = 3.0) -> None:
    """Raise what `connect` would, and RequestError for an address where nobody listens: the SDK would go on asking."""
    connect(service)
    if service in NAMES:
        return
    try:
        socket.create_connection(_host_and_port(service), timeout).close()
    except (OSError, UnicodeError) as error:  # the second for a host that can be none
        problem = getattr(error, "strerror", None) or error
        raise RequestError(f"no server answers at {service} ({problem}); start it first") from error


def tokenizer(model: str) -> Any:
    """The stock tokenizer of a model, by name, folder or hub id. Raises UnknownNameError and ModelError."""
    from vlm.local.model.load import load_tokenizer

    return load_tokenizer(model)


def check_model(model: str) -> None:
    """Raise UnknownNameError or ModelError for a model that could not classify images in the local service, before its
    weights are read. Those of a hub's model are not fetched."""
    from vlm.local.model.load import check

    check(model, images=True)


def devices(name: str) -> "list[torch.device]":
    """The devices that a name such as "cuda:1" means; several only for "auto". Raises ModelError for one that is not
    here."""
    from vlm.local.model import placement

    return placement.devices(name)


def free_bytes(device: "torch.device") -> int:
    """What new processes can take: of the machine's memory as far as its control group allows, or of a GPU's."""
    from vlm.local.model import placement

    return placement.free_bytes(device)


def feature_memory(device: "torch.device") -> int:
    """Bytes of image features that a process keeps in the memory of this device, unless told otherwise."""
    from vlm.local.vision import device_limit, memory_limit

    return memory_limit() if device.type == "cpu" else device_limit(device)


def feature_disk_bytes(*, kept: bool = False) -> int:
    """Bytes of image features that a folder of them (`features` of `connect`) has at most. kept: those that stay: at
    its limit the folder makes room for what comes next."""
    from vlm.local.features import DISK_BYTES, SHARE

    return DISK_BYTES - DISK_BYTES // SHARE if kept else DISK_BYTES


def adapter_parameters(model: Any, rank: int) -> int:
    """Numbers of a LoRA adapter on attention, MLP and head of a stock model of transformers; it may be on the meta
    device. Raises ModelError for a model without such layers."""
    from vlm.local.model.lora import Layout, LoraSpec

    return sum(Layout(model, LoraSpec(rank)).sizes.values())


def export(adapter: Path, target: Path, form: str, base_model: str | None = None, device: str = "cpu") -> "Proof":
    """Write an adapter for other programs, as "merged", "peft" or "vllm"; see `vlm.local.exchange.export`."""
    from vlm.local.exchange import export

    return export.export(adapter, target, form, base_model, device)


def pass_limits() -> tuple[int, int, int]:
    """What the local engine puts into one pass, at most: positions of training and of scoring, prompts of scoring.
    A longer sequence has a pass of its own."""
    from vlm.local.engine import POSITIONS, ROWS
    from vlm.local.model.placement import PACK

    return PACK, POSITIONS, ROWS


def _official(base_url: str | None, api_key: str | None) -> ServiceClient:
    options: dict[str, Any] = {"base_url": base_url, "api_key": api_key}
    client: Any = tinker.ServiceClient(**{name: value for name, value in options.items() if value is not None})
    return client


def _host_and_port(address: str) -> tuple[str, int]:
    """Raises UnknownNameError for what is no http address."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port or SCHEMES[parts.scheme]
    except (ValueError, KeyError) as error:
        raise UnknownNameError("service", address, NAMES) from error
    if not host:
        raise UnknownNameError("service", address, NAMES)
    return host, port
