"""The SDK's `SamplingClient` and `TrainingClient` over an engine of this process."""

import concurrent.futures
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tinker
from tinker import types
from tinker.lib.public_interfaces.api_future import AwaitableConcurrentFuture as Future

from kshot.checks import check_ttl, path_of
from kshot.errors import RequestError
from vlm.inputs import ImageRule
from vlm.label_trie import Trie
from vlm.local import checkpoint, scoring
from vlm.local.checkpoint import Checkpoint
from vlm.local.engine import CustomLoss, Engine, Snapshot
from vlm.local.exchange.age import recipients as recipients
from vlm.local.losses import SAMPLED_INSTEAD
from vlm.local.model.lora import Adapter, LoraSpec
from vlm.local.sampling.decoder import ThoughtLimit as ThoughtLimit
from vlm.local.sampling.decoder import TokenSequence as TokenSequence
from vlm.local.sampling.grammar import Grammar as Grammar
from vlm.local.sampling.sampler import SamplingRequest as SamplingRequest
from vlm.local.sampling.sampler import sample
from vlm.local.sampling.stops import StopSearch as StopSearch
from vlm.local.sampling.stops import check_stops as check_stops
from vlm.local.scheduler import Scheduler
from vlm.local.training_run import TrainingRun
from vlm.local.twins import with_async_twins

WAYS_OUT = {
    "record_stability_info": f"the loss stable_reinforce, which reads it, is not built here: {SAMPLED_INSTEAD}",
}
ELSEWHERE = (
    "its weights are in this process; write them with save_weights_for_sampler, and call create_sampling_client there, "
    "or let kshot serve have them"
)
NAME = (
    "the name of save_weights_and_get_sampling_client has no effect: nothing is written; for a checkpoint with a name, "
    "call save_weights_for_sampler"
)


def refuse(**options: object) -> None:
    """Raise RequestError for an option of the SDK that this service does not have, if it is given."""
    for name, value in options.items():
        if value:
            way_out = WAYS_OUT.get(name, "leave it out")
            raise RequestError(f"{name}={value!r} is not supported by the local service; {way_out}")


class _Client(ABC):
    """What both kinds have of the engine."""

    def __init__(self, engine: Engine, scheduler: Scheduler) -> None:
        self._engine, self._scheduler = engine, scheduler

    @property
    def lost(self) -> str:
        """Why what this client stands for is gone; "" as long as it is there."""
        return getattr(self._held, "lost", "")

    @property
    @abstractmethod
    def _held(self) -> Any:
        """What is in the engine's memory for this client."""

    @property
    def tower_forwards(self) -> int:
        """Images that went through the vision tower of the base model in this process."""
        return self._engine.vision.forwards

    def profile(self) -> AbstractContextManager[dict[str, float]]:
        """Measure the time spent in the model itself by the requests that run while the context is open: see
        `vlm.local.model.load.Model.profile`."""
        return self._engine.model.profile()

    def get_tokenizer(self) -> Any:
        """The stock tokenizer of the base model."""
        return self._engine.model.tokenizer

    def get_telemetry(self) -> None:
        """Nothing is reported to anybody."""
        return

    def _submit(
        self, inputs: Sequence[tinker.ModelInput], call: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Future[Any]:
        """A call on the scheduler's thread; the images of its inputs are decoded ahead."""
        self._engine.prefetch(inputs)
        return Future(self._scheduler.submit(call, *args, of=self, **kwargs))


@with_async_twins(awaited=("sample", "compute_logprobs", "get_base_model"))
class LocalSamplingClient(_Client):
    """Fixed weights to sample from and to score with; meets `vlm.service.SamplingClient`."""

    def __init__(self, engine: Engine, snapshot: Snapshot, scheduler: Scheduler) -> None:
        super().__init__(engine, scheduler)
        self._snapshot = snapshot

    @property
    def _held(self) -> Any:
        return self._snapshot

    def sample(
        self,
        prompt: tinker.ModelInput,
        num_samples: int,
        sampling_params: types.SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: types.TensorData | None = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
    ) -> Future[types.SampleResponse]:
        """Samples after a prompt, and log-probabilities of the prompt where requested (see the SDK)."""
        request = SamplingRequest(
            prompt,
            sampling_params,
            num_samples,
            include_prompt_logprobs,
            topk_prompt_logprobs,
            target_prompt_logprobs,
            topk_sample_logprobs=topk_sample_logprobs,
            prompt_alt_tokens_k=prompt_alt_tokens_k,
            prompt_logprobs_last_n=prompt_logprobs_last_n,
        )
        return self._submit([prompt], lambda: self._sample([request])[0])

    def start(
        self, request: SamplingRequest, on_token: Callable[[TokenSequence], None] | None = None
    ) -> concurrent.futures.Future[types.SampleResponse]:
        """The same, in a batch with whatever else is sampled at the time: sooner where much is, and equal to what it
        would be alone but for rounding. on_token: see `vlm.local.scheduler.Scheduler.sample`."""
        self._engine.prefetch([request.prompt])
        return self._scheduler.sample(self._engine, self._snapshot, request, on_token)

    def grammar(self, text: str, ends: Sequence[int]) -> Grammar:
        """A grammar for `SamplingRequest.grammar`; see `vlm.local.sampling.grammar.Grammar`."""
        return Grammar(self.get_tokenizer(), self._engine.model.vocabulary, ends, text)

    def compute_logprobs(
        self, prompt: tinker.ModelInput, prompt_logprobs_last_n: int | None = None
    ) -> Future[list[float | None]]:
        """Each position's log-probability given those before it; None at position 0 and at image positions."""
        params, last = types.SamplingParams(max_tokens=1), prompt_logprobs_last_n
        request = SamplingRequest(prompt, params, prompt_logprobs=True, prompt_logprobs_last_n=last)
        return self._submit([prompt], lambda: self._sample([request])[0].prompt_logprobs)

    def sample_batch(
        self,
        prompts: Sequence[tinker.ModelInput],
        params: types.SamplingParams | Sequence[types.SamplingParams],
        num_samples: int = 1,
    ) -> list[types.SampleResponse]:
        """Samples after each prompt, in shared passes: the same results as one by one, sooner. params: of all prompts,
        or of each."""
        each = [params] * len(prompts) if isinstance(params, types.SamplingParams) else params
        requests = [SamplingRequest(prompt, own, num_samples) for prompt, own in zip(prompts, each, strict=True)]
        return self._submit(prompts, self._sample, requests).result()

    def score_tree(self, prompts: Sequence[tinker.ModelInput], trie: Trie) -> np.ndarray:
        """(prompts, edges) log-probabilities in one pass a prompt; see `vlm.scoring.TreeScorer`."""
        self._engine.prefetch(prompts)
        call = self._scheduler.submit_passes(scoring.score_tree, self._engine, self._snapshot, prompts, trie, of=self)
        return call.result()

    def embed_prompts(self, prompts: Sequence[tinker.ModelInput], *, tower: bool, hidden: bool) -> np.ndarray:
        """(prompts, D) features of the model's own; see `vlm.embedding.Embedder`."""
        wanted = {"tower": tower, "hidden": hidden}
        return self._submit(prompts, scoring.embed, self._engine, self._snapshot, prompts, **wanted).result()

    def encode_images(self, images: Sequence[types.ImageChunk]) -> None:
        """See `vlm.embedding.ImageEncoder`."""
        new = self._engine.vision.uncached(images)
        self._engine.vision.prefetch(new)
        self._scheduler.submit(self._engine.vision.features, new, of=self).result()

    def get_base_model(self) -> str:
        """The name of the base model."""
        return self._engine.model.name

    def get_sampler_handle(self) -> str:
        """The SDK's word for this sampler in other processes, which have nothing of this one. Raises RequestError."""
        raise RequestError(f"a sampler of the local service has no handle: {ELSEWHERE}")

    @staticmethod
    def from_sampler_handle(handle: str, *, api_key: str | None = None) -> "LocalSamplingClient":
        """The sampler of a handle. Raises RequestError, as there is none here."""
        raise RequestError(f"the local service makes no sampler of a handle: {ELSEWHERE}")

    @property
    def rule(self) -> ImageRule:
        """How the base model counts an image's tokens. Raises RequestError for a text model."""
        return self._engine.model.rule

    @property
    def takes_images(self) -> bool:
        """Whether the base model takes images."""
        return self._engine.model.takes_images

    @property
    def context(self) -> int:
        """How many positions the base model takes."""
        return self._engine.model.context

    def _sample(self, requests: Sequence[SamplingRequest]) -> list[types.SampleResponse]:
        return sample(self._engine, self._snapshot, requests)


def sampler_of(engine: Engine, saved: Checkpoint, name: str, scheduler: Scheduler) -> LocalSamplingClient:
    """A client on a loaded checkpoint, called `name` in errors; to be called on the scheduler's thread. Raises
    ModelError where it does not fit the engine's model."""
    adapter = saved.adapter(engine.model)
    adapter.name = name
    return LocalSamplingClient(engine, engine.snapshot(adapter), scheduler)


@with_async_twins(
    *("forward", "forward_backward", "forward_backward_custom", "optim_step", "save_state", "load_state"),
    *("load_state_with_optimizer", "save_weights_for_sampler", "save_weights_external"),
    awaited=("create_sampling_client", "save_weights_and_get_sampling_client", "get_info"),
)
class LocalTrainingClient(_Client):
    """One training run; meets `vlm.service.TrainingClient`. Requests run in the order they are made."""

    def __init__(
        self,
        engine: Engine,
        run: TrainingRun,
        model_id: str,
        state: Path,
        scheduler: Scheduler,
        user_metadata: Mapping[str, str] | None,
    ) -> None:
        super().__init__(engine, scheduler)
        self.model_id, self._run, self._state, self._user_metadata = model_id, run, state, user_metadata
        run.call(f"run {model_id}")

    @property
    def _held(self) -> Any:
        return self._run

    def forward(
        self, data: list[tinker.Datum], loss_fn: str, loss_fn_config: Mapping[str, Any] | None = None
    ) -> Future[types.ForwardBackwardOutput]:
        """The loss and every position's log-probability, without a gradient."""
        call = partial(self._engine.forward_backward, forward_only=True)
        return self._submit_data(call, data, loss_fn, loss_fn_config)

    def forward_backward(
        self, data: list[tinker.Datum], loss_fn: str, loss_fn_config: Mapping[str, Any] | None = None
    ) -> Future[types.ForwardBackwardOutput]:
        """The loss and its gradient, which is added to the run's gradients since its last step."""
        return self._submit_data(self._engine.forward_backward, data, loss_fn, loss_fn_config)

    def forward_backward_custom(
        self,
        data: list[tinker.Datum],
        loss_fn: CustomLoss,
        *,
        loss_type_input: Literal["logprobs"] | None = None,
    ) -> Future[types.ForwardBackwardOutput]:
        """The gradient of any function of the log-probabilities, added to what the run has gathered (see the SDK).

        loss_fn(data, log_probs) runs on the service's scheduler; log_probs are float32 vectors that require gradients,
        one a datum and as long as it, and it returns a 0-d loss and a dict of metrics.
        """
        refuse(loss_type_input=None if loss_type_input == "logprobs" else loss_type_input)
        if not callable(loss_fn):
            raise RequestError(f"a custom loss must be callable, got {loss_fn!r}; loss handles need the hosted service")
        return self._submit_data(self._engine.forward_backward_custom, data, loss_fn)

    def optim_step(
        self, optim_params: types.OptimParams | None = None, *, adam_params: types.AdamParams | None = None
    ) -> Future[types.OptimStepResponse]:
        """One AdamW step with the gathered gradients, which are then cleared. Takes one of its two arguments."""
        params = [each for each in (optim_params, adam_params) if each is not None]
        if len(params) != 1 or not isinstance(params[0], types.AdamParams):
            raise RequestError(f"optim_step takes one AdamParams, got {params or 'none'}")
        return self._submit((), self._engine.optim_step, self._run, params[0])

    def save_state(
        self,
        name: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
    ) -> Future[types.SaveWeightsResponse]:
        """Write weights and optimizer; the response holds the checkpoint's tinker:// path. ttl_seconds: after which it
        is no longer there; None: never."""
        check_ttl(ttl_seconds)
        path, options = path_of(self.model_id, "weights", name), {"optimizer": True, "overwrite": overwrite}
        return self._submit((), self._save, types.SaveWeightsResponse, path, user_metadata, ttl_seconds, **options)

    def load_state(self, path: str, weights_access_token: str | None = None) -> Future[types.LoadWeightsResponse]:
        """Take the weights of a checkpoint; the optimizer starts anew."""
        refuse(weights_access_token=weights_access_token)
        return self._submit((), self._load, path, optimizer=False)

    def load_state_with_optimizer(
        self, path: str, weights_access_token: str | None = None
    ) -> Future[types.LoadWeightsResponse]:
        """Take the weights and the optimizer of a checkpoint."""
        refuse(weights_access_token=weights_access_token)
        return self._submit((), self._load, path, optimizer=True)

    def save_weights_for_sampler(
        self, name: str, ttl_seconds: int | None = None, user_metadata: dict[str, str] | None = None
    ) -> Future[types.SaveWeightsForSamplerResponse]:
        """Write the weights alone, for `ServiceClient.create_sampling_client(model_path=...)`."""
        check_ttl(ttl_seconds)
        path = path_of(self.model_id, "sampler_weights", name)
        return self._submit((), self._save, types.SaveWeightsForSamplerResponse, path, user_metadata, ttl_seconds)

    def save_weights_external(
        self, name: str, ttl_seconds: int | None = None, age_encryption_recipients: Sequence[str] | None = None
    ) -> Future[types.SaveWeightsExternalResponse]:
        """Write the weights alone, for use elsewhere: the folder of the path is PEFT's, each of its files encrypted to
        these recipients, if any are given (see `vlm.local.exchange.age`)."""
        check_ttl(ttl_seconds)
        path = path_of(self.model_id, "external_weights", name)
        to = recipients(age_encryption_recipients or ())
        return self._submit((), self._save, types.SaveWeightsExternalResponse, path, None, ttl_seconds, encrypt_to=to)

    def create_sampling_client(
        self, model_path: str, retry_config: Any = None, record_stability_info: bool = False
    ) -> Future[LocalSamplingClient]:
        """A future of a client on saved weights of the run's base model."""
        refuse(retry_config=retry_config, record_stability_info=record_stability_info)
        return self._submit((), self._sampler, model_path)

    def save_weights_and_get_sampling_client(
        self,
        name: str | None = None,
        retry_config: Any = None,
        record_stability_info: bool = False,
        kind: str = "snapshot",
    ) -> Future[LocalSamplingClient]:
        """A future of a client on a snapshot of the weights as they are when the request's turn comes. name: has no
        effect, as in the SDK, which warns of it too."""
        if name is not None:
            warnings.warn(NAME, DeprecationWarning, stacklevel=2)
        refuse(retry_config=retry_config, record_stability_info=record_stability_info)
        refuse(kind=None if kind == "snapshot" else kind)
        engine, run = self._engine, self._run
        return self._submit((), lambda: LocalSamplingClient(engine, engine.snapshot_of(run), self._scheduler))

    def get_info(self) -> types.GetInfoResponse:
        """Base model, run id and LoRA rank."""
        model = self._engine.model
        data = types.ModelData(arch=model.kind, model_name=model.name, tokenizer_id=model.tokenizer_id)
        return types.GetInfoResponse(
            model_data=data,
            model_id=self.model_id,
            is_lora=True,
            lora_rank=self.spec.rank,
            model_name=model.name,
        )

    @property
    def snapshot_bytes(self) -> int:
        """Bytes of memory for a snapshot of the weights, as `save_weights_and_get_sampling_client` makes one."""
        return self._run.layout.snapshot_bytes(self._engine.model.dtype)

    @property
    def spec(self) -> LoraSpec:
        """What the run's adapter covers."""
        return self._run.layout.spec

    def restore(self, saved: Checkpoint, path: str, *, optimizer: bool) -> None:
        """Take a loaded checkpoint; to be called on the scheduler's thread. Raises RequestError where it does not fit
        the run, ModelError where its tensors do not; the run is then as it was."""
        model, layout = self._engine.model, self._run.layout
        if (saved.base_model, saved.spec) != (model.name, layout.spec):
            raise RequestError(
                f"checkpoint {path} is {saved.spec} of {saved.base_model!r}, this run is {layout.spec} of "
                f"{model.name!r}; use create_training_client_from_state"
            )
        if optimizer and saved.optimizer is None:
            raise RequestError(f"checkpoint {path} was saved without optimizer state; use load_state")
        self._run.restore(Adapter.of(layout, saved.weights), (saved.optimizer or {}) if optimizer else {})

    def _submit_data(self, call: Callable[..., Any], data: Sequence[tinker.Datum], *args: Any) -> Future[Any]:
        data = list(data)  # the caller's may change before it is read
        self._engine.prefetch([datum.model_input for datum in data])
        scheduler = self._scheduler
        return Future(
            scheduler.submit_passes(call, self._run, data, *args, of=self, between_layers=scheduler.between_layers)
        )

    def _sampler(self, path: str) -> LocalSamplingClient:
        saved, name = checkpoint.load(self._state, path), self._engine.model.name
        if saved.base_model != name:
            raise RequestError(
                f"checkpoint {path} is of {saved.base_model!r}, this run of {name!r}; use the service's "
                "create_sampling_client"
            )
        return sampler_of(self._engine, saved, f"checkpoint {path}", self._scheduler)

    def _load(self, path: str, *, optimizer: bool) -> types.LoadWeightsResponse:
        self.restore(checkpoint.load(self._state, path), path, optimizer=optimizer)
        return types.LoadWeightsResponse(path=path)

    def _save(
        self,
        response: Callable[..., Any],
        path: str,
        metadata: Mapping[str, str] | None,
        ttl: int | None,
        *,
        optimizer: bool = False,
        overwrite: bool = False,
        encrypt_to: Sequence[Any] = (),
    ) -> Any:
        layout = self._run.layout
        saved = Checkpoint(
            base_model=self._engine.model.name,
            spec=self.spec,
            weights=self._run.weights(),
            experts=layout.experts,
            layout=layout,
            place=self._engine.model.tokenizer_id,
            optimizer=self._run.optimizer_tensors() if optimizer else None,
            user_metadata=metadata or self._user_metadata,
            run_metadata=self._user_metadata,
            expires=None if ttl is None else time.time() + ttl,
        )
        checkpoint.save(self._state, path, saved, overwrite=overwrite, encrypt_to=encrypt_to)
        return response(path=path)
