"""What a service holds in this process: engines by the names of their models, checkpoints, and one scheduler.

`LocalServiceClient` has the SDK's `ServiceClient` methods over it; the server uses it too. Requests of a service run in
the order they were made, so a client may submit forward_backward and optim_step before it waits for either. Methods
that say so must be called on the scheduler's thread.
"""

import os
import secrets
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future as ConcurrentFuture
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Self

import tinker
import torch
from tinker import types
from tinker.lib.public_interfaces.api_future import AwaitableConcurrentFuture as Future

from kshot.errors import InputError, ModelError, RequestError, UnknownNameError
from vlm.local import checkpoint
from vlm.local.checkpoint import OPTIMIZER as OPTIMIZER
from vlm.local.checkpoint import RECORD as RECORD
from vlm.local.checkpoint import Checkpoint, state_folder
from vlm.local.checkpoint import expires_at as expires_at
from vlm.local.checkpoint import is_expired as is_expired
from vlm.local.checkpoint import set_ttl as set_ttl
from vlm.local.clients import LocalSamplingClient, LocalTrainingClient, refuse, sampler_of
from vlm.local.engine import Engine
from vlm.local.exchange.age import ENCRYPTED as ENCRYPTED
from vlm.local.model import placement
from vlm.local.model.load import Model
from vlm.local.model.lora import LoraSpec
from vlm.local.model.placement import group_free_bytes as group_free_bytes
from vlm.local.rest import LocalRestClient, capabilities
from vlm.local.scheduler import Scheduler
from vlm.local.threads import FreeCores, choose, is_fixed
from vlm.local.twins import with_async_twins, with_refusals
from vlm.local.vision import PIXEL_BYTES, Vision, memory_limit

SEEDS = 2**63
SHARDS = ("auto", "whole", "divided")
DTYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}  # None: the checkpoint's own


@dataclass
class EngineRegistry:
    """Models in memory and what is done with them; `run_bytes` to `sampler_of_folder` run on the scheduler's thread.

    state: where checkpoints are. device, dtype: where and in what models compute ("auto": spread over all GPUs; None:
    the checkpoint's). train_vision: whether LoRA covers the vision tower too, beside what each run says. features: a
    folder that keeps image features between processes. cache_bytes: how much memory they may take in each process of a
    model (None: in all of them together a quarter, at most 16 GiB). pixel_bytes, decoders: of decoded images that wait,
    and threads that decode ahead (see `vlm.local.vision.Vision`). model_paths: name of a model → its folder or hub id;
    None: a name says itself where its model is. threads: that a model computes with on a CPU; None: chosen when it is
    loaded, at most torch's own number, less `spare` ones unless the environment says how many.
    chosen: the numbers, by model; the largest of them is set, for this thread and those that begin later.

    places: name of a model → its own device. Where that means several processes, or several models have one, the model
    runs in processes of its own, with a scheduler of its own (see `vlm.local.ranks`). shard: whether each of them holds
    the `whole` weights or they are `divided`; `auto`: by what fits.
    """

    state: Path = field(default_factory=state_folder)
    device: str = "cpu"
    dtype: torch.dtype | None = None
    train_vision: bool = False
    features: Path | None = None
    cache_bytes: int | None = None
    pixel_bytes: int = PIXEL_BYTES
    decoders: int | None = None
    model_paths: Mapping[str, str] | None = None
    threads: int | None = None
    spare: int = 0
    chosen: dict[str, int] = field(default_factory=dict)
    scheduler: Scheduler = field(default_factory=Scheduler)
    engines: dict[str, Engine] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    shard: str = SHARDS[0]
    own_schedulers: dict[str, Scheduler] = field(default_factory=dict)
    _most: int | None = None  # threads of torch before the first was chosen

    def submit(self, call: Callable[..., Any], *args: Any, of: str | None = None, **kwargs: Any) -> Future[Any]:
        """A future of a call on the scheduler's thread that depends on no run: see `Scheduler.submit_first`. of: the
        model that it is about, if it is about one."""
        return Future(self.scheduler_of(of).submit_first(call, *args, **kwargs))

    def scheduler_of(self, base_model: str | None) -> Scheduler:
        """The scheduler of a model's engine; of one that is not loaded, or in this process, everybody's."""
        return self.own_schedulers.get(base_model or "", self.scheduler)

    @property
    def schedulers(self) -> dict[str, Scheduler]:
        """All of them, by the model that has one of its own, else ""."""
        return {"": self.scheduler, **self.own_schedulers}

    def close(self, wait: bool = True) -> None:
        """Finish what was submitted, stop the schedulers, and end all processes. wait: until that is done."""
        for scheduler in self.schedulers.values():
            scheduler.close(wait)
        for engine in self.engines.values():
            engine.end()

    def spec(self, rank: int, *, train_mlp: bool, train_attn: bool, train_unembed: bool) -> LoraSpec:
        """What a run covers here. Raises RequestError where that is nothing."""
        return LoraSpec(rank, train_mlp, train_attn, train_unembed, self.train_vision)

    def engine(self, base_model: str) -> Engine:
        """The engine of a model, loaded at its first use. Raises UnknownNameError, ModelError."""
        if base_model not in self.engines:
            if self.model_paths is not None and base_model not in self.model_paths:
                raise UnknownNameError("model", base_model, self.model_paths)
            path, devices = (self.model_paths or {}).get(base_model, base_model), self._devices(base_model)
            self._check_shard(base_model, devices)
            if len(devices) > 1 or len(self.places) > 1:
                self.engines[base_model] = self._over_ranks(base_model, path, devices)
                return self.engines[base_model]
            model = Model(base_model, devices[0], self.dtype, path)
            self._set_threads(model)
            options: dict[str, Any] = {"threads": self.decoders, "pixel_bytes": self.pixel_bytes}
            vision = Vision(model, self.cache_bytes, self.features, **options) if model.takes_images else None
            self.engines[base_model] = Engine(model, vision)
        return self.engines[base_model]

    def _devices(self, base_model: str) -> list[str]:
        """The device of each process of a model; with torchrun all models have its processes."""
        if count := int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 0:
            kind = "cpu" if self.device == "cpu" or not torch.cuda.is_available() else "cuda"
            return [kind] * count
        return placement.ranks(self.places.get(base_model, self.device))

    def _over_ranks(self, name: str, path: str, devices: Sequence[str]) -> Engine:
        from vlm.local.ranks import torchrun
        from vlm.local.ranks.inference import ModelOptions, RanksEngine

        options = ModelOptions(
            name,
            path,
            self.dtype,
            self.shard,
            whole_tower=self.train_vision,
            cache_bytes=memory_limit() // len(devices) if self.cache_bytes is None else self.cache_bytes,
            features=self.features,
            decoders=self.decoders,
            pixel_bytes=self.pixel_bytes // len(devices),
        )
        on_cpu = sum(device == "cpu" for each in {*(self.model_paths or ()), name} for device in self._devices(each))
        threads = self.threads or max(1, self._at_most() // max(1, on_cpu))
        join = partial(torchrun.joined, device=self.device, threads=threads) if torchrun.world() else None
        engine = RanksEngine(options, devices, threads, ranks=join)
        scheduler = self.own_schedulers[name] = Scheduler()
        again = partial(scheduler.submit_first, engine.start_ranks)
        engine.on_loss = (lambda: torchrun.end_on_loss(engine.lost)) if torchrun.world() else again
        self.chosen |= {name: threads} if "cpu" in devices else {}
        return engine

    def _set_threads(self, model: Model) -> None:
        if model.device.type == "cpu":
            self._most = self._most or self._at_most()
            self.chosen[model.name] = self.threads or choose(Engine(model), self._most)
            torch.set_num_threads(most := max(self.chosen.values()))
            if most > 1 and not (self.threads or is_fixed()):
                self.scheduler.before_step = FreeCores(most)

    def _at_most(self) -> int:
        """Threads of torch that models on a CPU may have together."""
        return max(1, torch.get_num_threads() - (0 if is_fixed() else self.spare))

    def check_places(self) -> None:
        """Raise InputError and ModelError for a place that is none, or is not here, and for a shard that it has not."""
        self._devices("")
        for name in self.model_paths or ():
            self._check_shard(name, self._devices(name))

    def _check_shard(self, name: str, devices: Sequence[str]) -> None:
        if self.shard not in SHARDS:
            raise UnknownNameError("shard", self.shard, SHARDS)
        if self.shard == "divided" and len(devices) == 1:
            what = f"shard 'divided', but model {name!r} has one process alone, on {devices[0]}"
            raise InputError(f"{what}; give it several, as in {name}@cpu:2 or {name}@cuda:0,1, or leave --shard out")

    def load(self) -> None:
        """Load the models of `model_paths` now; to be called before any other thread uses them. Raises as `engine`."""
        for name in self.model_paths or ():
            self.engine(name)

    def run_bytes(self, base_model: str, lora: Mapping[str, Any]) -> int:
        """Bytes of memory that a run needs, from the shapes of its adapter, which each process has. lora: the fields of
        its LoraSpec. Raises as `engine` and LoraSpec do."""
        model, on_cpu = self.engine(base_model).model, self._devices(base_model).count("cpu")
        return model.layout(LoraSpec(**lora)).run_bytes(model.dtype) * max(1, on_cpu)

    def start(
        self, model_id: str, base_model: str, spec: LoraSpec, seed: int | None, user_metadata: dict[str, str] | None
    ) -> LocalTrainingClient:
        """A new run called `model_id`; seed None: any."""
        engine = self.engine(base_model)
        run = engine.start(spec, secrets.randbits(31) if seed is None else seed)
        return LocalTrainingClient(engine, run, model_id, self.state, self.scheduler_of(base_model), user_metadata)

    def resume(
        self,
        model_id: str,
        path: str,
        base_model: str | None,
        user_metadata: dict[str, str] | None,
        *,
        optimizer: bool,
    ) -> LocalTrainingClient:
        """A new run with what a checkpoint holds. Raises RequestError where that is of another model."""
        saved = checkpoint.load(self.state, path)
        if base_model not in (None, saved.base_model):
            raise RequestError(f"checkpoint {path} is of {saved.base_model!r}, not of {base_model!r}")
        client = self.start(model_id, saved.base_model, saved.spec, 0, user_metadata)
        client.restore(saved, path, optimizer=optimizer)
        return client

    def sampler(self, model_path: str | None, base_model: str | None) -> LocalSamplingClient:
        """A client on saved weights or on a base model."""
        if base_model is not None:
            return LocalSamplingClient(self.engine(base_model), None, self.scheduler_of(base_model))
        return self._adapted(checkpoint.load(self.state, model_path or ""), f"checkpoint {model_path}")

    def sampler_of_folder(self, folder: Path, base_model: str | None) -> LocalSamplingClient:
        """A client on the adapter in a folder of the checkpoint layout, wherever it lies; of its model see
        `checkpoint.base_of`."""
        saved = checkpoint.load_folder(folder)
        name = checkpoint.base_of(folder, saved, base_model, {*self.engines, *(self.model_paths or ())})
        try:
            self.engine(name)
        except ModelError as error:
            if base_model is not None or saved.origin is None:
                raise
            raise ModelError(
                f"{error}. adapter {folder} is of it: say with base_model (--model) where it is"
            ) from error
        try:
            return self._adapted(replace(saved, base_model=name), f"adapter {folder}")
        except ModelError as error:
            raise ModelError(f"adapter {folder} does not belong to the model {name}: {error}") from error

    def _adapted(self, saved: Checkpoint, name: str) -> LocalSamplingClient:
        return sampler_of(self.engine(saved.base_model), saved, name, self.scheduler_of(saved.base_model))


def follow(registry: EngineRegistry) -> bool:
    """In a process that torchrun started, and that is not its first: be a rank of the first one's engine until that
    ends. False elsewhere. Raises InputError for what torchrun's processes do not share."""
    if "LOCAL_RANK" not in os.environ:
        return False
    from vlm.local.ranks import torchrun

    if torchrun.world() and (registry.places or len(registry.model_paths or ()) > 1):
        raise InputError("torchrun's processes serve one model together; give one --model, without a place")
    if not torchrun.world() or torchrun.first():
        return False
    torchrun.follow(registry.device, registry.threads or 1)
    return True


def dtype_of(name: str | None) -> torch.dtype | None:
    """The type of a name. Raises UnknownNameError."""
    if name not in DTYPES:
        raise UnknownNameError("dtype", str(name), [each for each in DTYPES if each])
    return DTYPES[name]


def check_seed(seed: Any) -> None:
    """Raise RequestError for what is no seed."""
    if not (seed is None or (isinstance(seed, int) and 0 <= seed < SEEDS)):
        raise RequestError(f"seed {seed!r} must be a whole number from 0 to 2^63 - 1, or None for a random one")


def check_optimizer(optimizer: Any) -> None:
    """Raise RequestError for another optimizer than Adam."""
    refuse(optimizer=None if isinstance(optimizer, types.AdamOptimizerConfig) else optimizer)


@with_refusals(tinker.ServiceClient)
@with_async_twins(
    awaited=(
        *("create_lora_training_client", "create_training_client_from_state", "create_sampling_client"),
        *("create_training_client_from_state_with_optimizer", "get_server_capabilities"),
    )
)
class LocalServiceClient:
    """Training and sampling on models of this process; meets `vlm.service.ServiceClient`.

    state_dir: where checkpoints are written and found. options: of EngineRegistry.
    """

    def __init__(self, state_dir: Path | None = None, **options: Any) -> None:
        self._registry = EngineRegistry(state_dir or state_folder(), **options)
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
    ) -> Future[LocalTrainingClient]:
        """A future of a new training run on `base_model`; the LoRA weights are initialised from `seed`."""
        check_optimizer(optimizer)
        check_seed(seed)
        spec = self._registry.spec(rank, train_mlp=train_mlp, train_attn=train_attn, train_unembed=train_unembed)
        start = self._registry.start
        return self._registry.submit(start, self._next_id(), base_model, spec, seed, user_metadata, of=base_model)

    def create_training_client_from_state(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
        optimizer: types.AdamOptimizerConfig | None = None,
    ) -> Future[LocalTrainingClient]:
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
    ) -> Future[LocalTrainingClient]:
        """A future of a new run with the weights and the optimizer of a checkpoint."""
        refuse(weights_access_token=weights_access_token)
        return self._resume(path, base_model, user_metadata, optimizer=True)

    def create_sampling_client(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: Any = None,
        record_stability_info: bool = False,
    ) -> Future[LocalSamplingClient]:
        """A future of a client on saved sampler weights, or on a base model as it is."""
        refuse(retry_config=retry_config, record_stability_info=record_stability_info)
        if (model_path is None) == (base_model is None):
            raise RequestError("create_sampling_client takes either model_path or base_model")
        return self._registry.submit(self._registry.sampler, model_path, base_model, of=base_model)

    def create_sampling_client_from_folder(
        self, folder: Path, base_model: str | None = None
    ) -> Future[LocalSamplingClient]:
        """A future of a client on the adapter in a folder of the checkpoint layout, wherever it lies.

        base_model: the model under another name than the recorded one, as where its folder was moved. Not of the SDK,
        and for callers in this process alone: it reads any folder, so no request from outside may reach it.
        """
        return self._registry.submit(self._registry.sampler_of_folder, Path(folder), base_model)

    def get_server_capabilities(self) -> types.GetServerCapabilitiesResponse:
        """The models with names of their own; any folder or hub id of a known family works besides."""
        return capabilities()

    def create_rest_client(self) -> LocalRestClient:
        """A client of what is saved in the state folder."""
        return LocalRestClient(self._registry.state, self._registry.submit)

    def get_telemetry(self) -> None:
        """Nothing is reported to anybody."""

    def close(self, status: str = "success", detail: str | None = None) -> Future[None]:
        """Finish what was requested and stop the scheduler. status, detail: of the SDK; here nobody reads them."""
        self._registry.close()
        done: ConcurrentFuture[None] = ConcurrentFuture()
        done.set_result(None)
        return Future(done)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _resume(self, *args: Any, optimizer: bool) -> Future[LocalTrainingClient]:
        return self._registry.submit(self._registry.resume, self._next_id(), *args, optimizer=optimizer)

    def _next_id(self) -> str:
        return f"{self._session}:train:{next(self._runs)}"
