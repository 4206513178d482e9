"""The SDK's clients over the local engine: same methods, arguments and futures. Knows no mathematics.

One worker thread runs the requests of a service in the order they were made, so a client may submit
forward_backward and optim_step before it waits for either.
"""

import secrets
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tinker
from tinker import types
from tinker.lib.public_interfaces.api_future import AwaitableConcurrentFuture

from kshot_errors import RequestError
from vlm.labels import Trie
from vlm.local import checkpoint, sampling, scoring
from vlm.local.checkpoint import Checkpoint
from vlm.local.engine import BASE, Engine, Run, Snapshot
from vlm.local.model import LoraSpec, Model
from vlm.models import MODELS

T = TypeVar("T")
Submit = Callable[..., "AwaitableConcurrentFuture[Any]"]


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
    ) -> AwaitableConcurrentFuture["LocalTrainingClient"]:
        """A future of a new training run on `base_model`; the LoRA weights are initialised from `seed`."""
        spec = LoraSpec(rank, train_mlp, train_attn, train_unembed)
        return self._submit(self._start, base_model, spec, seed, user_metadata)

    def create_training_client_from_state(
        self, path: str, user_metadata: dict[str, str] | None = None
    ) -> AwaitableConcurrentFuture["LocalTrainingClient"]:
        """A future of a new run with the weights of a checkpoint and a fresh optimizer."""
        return self._submit(self._resume, path, user_metadata, optimizer=False)

    def create_training_client_from_state_with_optimizer(
        self, path: str, user_metadata: dict[str, str] | None = None
    ) -> AwaitableConcurrentFuture["LocalTrainingClient"]:
        """A future of a new run with the weights and the optimizer of a checkpoint."""
        return self._submit(self._resume, path, user_metadata, optimizer=True)

    def create_sampling_client(
        self, model_path: str | None = None, base_model: str | None = None
    ) -> AwaitableConcurrentFuture["LocalSamplingClient"]:
        """A future of a client on saved sampler weights, or on a base model as it is."""
        if (model_path is None) == (base_model is None):
            raise RequestError("create_sampling_client takes either model_path or base_model")
        return self._submit(self._sampler, model_path, base_model)

    def get_server_capabilities(self) -> types.GetServerCapabilitiesResponse:
        """The models with names of their own; any Qwen3-VL folder or hub id works besides."""
        return types.GetServerCapabilitiesResponse(
            supported_models=[types.SupportedModel(model_name=n) for n in MODELS]
        )

    def engine(self, base_model: str) -> Engine:
        """The engine of a model, loaded on first use; to be called on the worker."""
        if base_model not in self._engines:
            self._engines[base_model] = Engine(Model(base_model, self._device))
        return self._engines[base_model]

    def close(self) -> None:
        """Finish what was requested and stop the worker."""
        self._worker.shutdown()

    def _submit(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> AwaitableConcurrentFuture[T]:
        return AwaitableConcurrentFuture(self._worker.submit(self._run, partial(call, *args, **kwargs)))

    def _run(self, call: Callable[[], T]) -> T:
        """On the worker: first give back the memory of runs that nobody can reach any more, then do what was asked."""
        while self._abandoned:
            engine, adapter = self._abandoned.popleft()
            engine.end(adapter)
        return call()

    def _start(
        self, base_model: str, spec: LoraSpec, seed: int | None, user_metadata: dict[str, str] | None
    ) -> "LocalTrainingClient":
        engine = self.engine(base_model)
        model_id = f"{self._session}:train:{self._runs}"
        run = engine.start(f"run_{self._runs}", spec, secrets.randbits(31) if seed is None else seed)
        self._runs += 1
        # A finalizer may run in the middle of anything, even of a submit: it takes no lock and leaves the rest to the
        # worker. Requests that are still to run hold the run, so it outlives them.
        weakref.finalize(run, self._abandoned.append, (engine, run.adapter))
        return LocalTrainingClient(engine, run, model_id, self._state, self._submit, user_metadata)

    def _resume(self, path: str, user_metadata: dict[str, str] | None, *, optimizer: bool) -> "LocalTrainingClient":
        saved = checkpoint.load(self._state, path)
        client = self._start(saved.base_model, saved.spec, 0, user_metadata)
        client.restore(saved, path, optimizer=optimizer)
        return client

    def _sampler(self, model_path: str | None, base_model: str | None) -> "LocalSamplingClient":
        if model_path is None:
            assert base_model is not None  # noqa: S101 - create_sampling_client checked it
            return LocalSamplingClient(self.engine(base_model), BASE, self._submit)
        saved = checkpoint.load(self._state, model_path)
        return LocalSamplingClient(self.engine(saved.base_model), Snapshot(saved.spec, saved.weights), self._submit)


class LocalTrainingClient:
    """One training run; meets `vlm.service.TrainingClient`."""

    def __init__(
        self,
        engine: Engine,
        run: Run,
        model_id: str,
        state: Path,
        submit: Submit,
        user_metadata: Mapping[str, str] | None,
    ) -> None:
        self.model_id = model_id
        self._engine, self._run, self._state, self._submit = engine, run, state, submit
        self._user_metadata = user_metadata

    def forward(
        self, data: list[tinker.Datum], loss_fn: str, loss_fn_config: Mapping[str, Any] | None = None
    ) -> AwaitableConcurrentFuture[types.ForwardBackwardOutput]:
        """The loss and every position's log-probability, without a gradient."""
        call = partial(self._engine.forward_backward, forward_only=True)
        return self._submit(call, self._run, data, loss_fn, loss_fn_config)

    def forward_backward(
        self, data: list[tinker.Datum], loss_fn: str, loss_fn_config: Mapping[str, Any] | None = None
    ) -> AwaitableConcurrentFuture[types.ForwardBackwardOutput]:
        """The loss and its gradient, which is added to what the run has gathered since its last step."""
        return self._submit(self._engine.forward_backward, self._run, data, loss_fn, loss_fn_config)

    def optim_step(
        self, optim_params: types.AdamParams | None = None, *, adam_params: types.AdamParams | None = None
    ) -> AwaitableConcurrentFuture[types.OptimStepResponse]:
        """One AdamW step with the gathered gradients, which are then cleared."""
        given = [p for p in (optim_params, adam_params) if p is not None]
        if len(given) > 1:
            raise RequestError("optim_step takes either optim_params or adam_params")
        params = given[0] if given else types.AdamParams()
        if not isinstance(params, types.AdamParams):
            raise RequestError(f"optimizer {type(params).__name__} is not supported; use AdamParams")
        return self._submit(self._engine.optim_step, self._run, params)

    def save_state(
        self, name: str, overwrite: bool = False, user_metadata: dict[str, str] | None = None
    ) -> AwaitableConcurrentFuture[types.SaveWeightsResponse]:
        """Write weights and optimizer; the response holds the checkpoint's tinker:// path."""
        path = checkpoint.path_of(self.model_id, "weights", name)
        return self._submit(self._save, path, overwrite, user_metadata)

    def load_state(self, path: str) -> AwaitableConcurrentFuture[types.LoadWeightsResponse]:
        """Take the weights of a checkpoint; the optimizer starts anew."""
        return self._submit(self._load, path, optimizer=False)

    def load_state_with_optimizer(self, path: str) -> AwaitableConcurrentFuture[types.LoadWeightsResponse]:
        """Take the weights and the optimizer of a checkpoint."""
        return self._submit(self._load, path, optimizer=True)

    def save_weights_for_sampler(
        self, name: str, user_metadata: dict[str, str] | None = None
    ) -> AwaitableConcurrentFuture[types.SaveWeightsForSamplerResponse]:
        """Write the weights alone, for `ServiceClient.create_sampling_client(model_path=...)`."""
        path = checkpoint.path_of(self.model_id, "sampler_weights", name)
        return self._submit(self._save_for_sampler, path, user_metadata)

    def save_weights_and_get_sampling_client(self) -> AwaitableConcurrentFuture["LocalSamplingClient"]:
        """A future of a client on a snapshot of the weights as they are when the request's turn comes."""
        return self._submit(lambda: LocalSamplingClient(self._engine, self._engine.snapshot(self._run), self._submit))

    def get_tokenizer(self) -> Any:
        """The stock tokenizer of the base model."""
        return self._engine.model.tokenizer

    def get_info(self) -> types.GetInfoResponse:
        """Base model, run id and LoRA rank."""
        model = self._engine.model
        data = types.ModelData(arch=model.stock.config.model_type, model_name=model.name, tokenizer_id=model.name)
        return types.GetInfoResponse(
            model_data=data,
            model_id=self.model_id,
            is_lora=True,
            lora_rank=self._run.spec.rank,
            model_name=model.name,
        )

    def restore(self, saved: Checkpoint, path: str, *, optimizer: bool) -> None:
        """Take a loaded checkpoint; to be called on the worker. Raises RequestError where it does not fit the run."""
        model = self._engine.model
        if (saved.base_model, saved.spec) != (model.name, self._run.spec):
            raise RequestError(
                f"checkpoint {path} is {saved.spec} of {saved.base_model!r}, this run is {self._run.spec} of "
                f"{model.name!r}; use create_training_client_from_state"
            )
        if optimizer and saved.optimizer is None:
            raise RequestError(f"checkpoint {path} was saved without optimizer state; use load_state")
        model.set_weights(self._run.adapter, dict(saved.weights))
        names = list(model.parameters(self._run.adapter))
        checkpoint.restore_optimizer(self._run.optimizer, names, (saved.optimizer or {}) if optimizer else {})
        self._run.optimizer.zero_grad(set_to_none=True)

    def _load(self, path: str, *, optimizer: bool) -> types.LoadWeightsResponse:
        self.restore(checkpoint.load(self._state, path), path, optimizer=optimizer)
        return types.LoadWeightsResponse(path=path)

    def _save(self, path: str, overwrite: bool, metadata: Mapping[str, str] | None) -> types.SaveWeightsResponse:
        names = list(self._engine.model.parameters(self._run.adapter))
        tensors = checkpoint.optimizer_tensors(self._run.optimizer, names)
        checkpoint.save(self._state, path, self._checkpoint(tensors, metadata), overwrite=overwrite)
        return types.SaveWeightsResponse(path=path)

    def _save_for_sampler(self, path: str, metadata: Mapping[str, str] | None) -> types.SaveWeightsForSamplerResponse:
        checkpoint.save(self._state, path, self._checkpoint(None, metadata))
        return types.SaveWeightsForSamplerResponse(path=path)

    def _checkpoint(self, optimizer: Mapping[str, Any] | None, metadata: Mapping[str, str] | None) -> Checkpoint:
        model = self._engine.model
        weights = model.weights(self._run.adapter)
        return Checkpoint(model.name, self._run.spec, weights, optimizer, metadata or self._user_metadata)


class LocalSamplingClient:
    """Fixed weights to sample from and to score with; meets `vlm.service.SamplingClient`."""

    def __init__(self, engine: Engine, snapshot: Snapshot, submit: Submit) -> None:
        self._engine, self._snapshot, self._submit = engine, snapshot, submit

    def sample(
        self,
        prompt: tinker.ModelInput,
        num_samples: int,
        sampling_params: types.SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: types.TensorData | None = None,
    ) -> AwaitableConcurrentFuture[types.SampleResponse]:
        """Samples after a prompt, and log-probabilities of the prompt where asked (see the SDK)."""
        if num_samples < 1:
            raise RequestError(f"num_samples must be at least 1, got {num_samples}")
        if topk_sample_logprobs:
            raise RequestError("topk_sample_logprobs is not supported by the local service")
        ask = sampling.Ask(
            prompt,
            sampling_params,
            num_samples,
            include_prompt_logprobs,
            topk_prompt_logprobs,
            target_prompt_logprobs,
        )
        return self._submit(lambda: sampling.sample(self._engine, self._snapshot, [ask])[0])

    def compute_logprobs(self, prompt: tinker.ModelInput) -> AwaitableConcurrentFuture[list[float | None]]:
        """Each position's log-probability given those before it; None at position 0 and at image positions."""
        ask = sampling.Ask(prompt, types.SamplingParams(max_tokens=1), prompt_logprobs=True)
        return self._submit(lambda: sampling.sample(self._engine, self._snapshot, [ask])[0].prompt_logprobs)

    def sample_batch(
        self, prompts: Sequence[tinker.ModelInput], params: types.SamplingParams
    ) -> list[types.SampleResponse]:
        """One sample after each prompt, in shared passes: the same answers as one by one, sooner."""
        asks = [sampling.Ask(prompt, params) for prompt in prompts]
        return self._submit(sampling.sample, self._engine, self._snapshot, asks).result()

    def score_tree(self, prompts: Sequence[tinker.ModelInput], trie: Trie) -> np.ndarray:
        """(prompts, edges) log-probabilities in one pass a prompt; see `vlm.scoring.TreeScorer`."""
        return self._submit(scoring.score_tree, self._engine, self._snapshot, prompts, trie).result()

    def get_tokenizer(self) -> Any:
        """The stock tokenizer of the base model."""
        return self._engine.model.tokenizer
