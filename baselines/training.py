"""LoRA and a linear head, trained behind the methods of the SDK's `TrainingClient`, as the language model is.

A classifier is here a language model with sequences of one position, whose vocabulary is the classes: see
`baselines.lora.datum`. Knows no mathematics, neither data sets nor budgets: the caller makes the batches.

TODO What one training run changes: a head, the gradients gathered for it, and its optimizer. Knows no futures, no files.

The semantics are those of the Tinker API, as of the language model's runs: a loss is a sum over the data, gradients
accumulate until the optimizer's step, the step is AdamW.
TODO A trained head with fixed weights behind the SDK's `SamplingClient` methods. Knows no training.

A class index is a token: a sample is one of them, and the sequence then ends.
TODO Calls one after the other on a thread of its own, in the order they were made. Knows nothing of what is called.
TODO Checkpoints of trained heads on disk: weights, optimizer and a record of what they are of. Knows no run in memory.

`tinker://<run>/weights/<name>` and `/sampler_weights/<name>` are folders below one state folder; nothing a name says
leads out of it. Written to a temporary folder, then renamed. The rules of names are those of the language model's
checkpoints. Frozen weights are not stored: the record names the backbone.
"""

import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import numpy as np
import tinker
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy.special import softmax
from tinker import types
from tinker.lib.public_interfaces.api_future import AwaitableConcurrentFuture
from torch import Tensor
from torch.nn.functional import cross_entropy

from baselines.features import PixelCache, resized
from baselines.lora import CHUNK, LoraHead, Shape, check_tensors, image_of, items_of, named
from kshot.checks import check_adam, folder_of, path_of
from kshot.errors import InputError, KshotError, ModelError, RequestError
from kshot.files import write_folder

# ---- What one training run changes: a head, the gradients gathered for it, and its optimizer. Knows no futures,

LOSS = "cross_entropy"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam, as torch names them


class Run:
    """A training run of `head`. Not thread-safe: one worker calls it, in order."""

    def __init__(self, head: LoraHead) -> None:
        self.head, self._gathered, self._begun = head, False, False
        self._trained = head.trained()
        for parameter in self._trained.values():
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer = torch.optim.AdamW(self._trained.values(), fused=True)
        self._pixels = PixelCache(head.backbone.patch, head.shape.size)

    def forward_backward(
        self,
        data: Sequence[tinker.Datum],
        loss_fn: str,
        config: Mapping[str, Any] | None,
        *,
        forward_only: bool = False,
    ) -> types.ForwardBackwardOutput:
        """Σ −log p(target) · weight over the data, in nats, and unless `forward_only` its gradient, added to the run's.

        A request that does not fit changes nothing; where a pass fails after another one (out of memory), what the run
        has gathered is dropped, so that no step is made with a part.

        Raises:
            RequestError: another loss, a configuration, data that do not fit. ImageError: an image that is none.
        """
        _check_loss(loss_fn, config)
        items = items_of(data, self.head.shape.n_classes)
        pixels = [self._decoded(number, item.image) for number, item in enumerate(items)]
        total, log_probs = 0.0, np.empty((len(items), 1), np.float32)
        with torch.set_grad_enabled(not forward_only), self._request():
            for members, logits in self.head.logits(pixels):
                targets = torch.tensor([items[n].label for n in members], device=logits.device)
                weights = torch.tensor([items[n].weight for n in members], device=logits.device)
                losses = cross_entropy(logits, targets, reduction="none")
                value = (losses * weights).sum()
                if not forward_only:
                    self._add(value)
                total += value.item()
                log_probs[members, 0] = -losses.detach().cpu().numpy()
        answers = [{"logprobs": tinker.TensorData.from_numpy(row)} for row in log_probs]
        return types.ForwardBackwardOutput("ArrayRecord", answers, {"loss:sum": total})

    def optim_step(self, params: types.AdamParams) -> types.OptimStepResponse:
        """AdamW (Loshchilov & Hutter 2019) on the gathered gradients, which are then cleared. Answers their norm.

        Raises:
            RequestError: no gradients, parameters out of range, or gradients that are not finite, which are cleared.
        """
        if not self._gathered:
            raise RequestError("optim_step without gradients; call forward_backward first")
        check_adam(params)
        limit = params.grad_clip_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self._trained.values(), limit)
        if not norm.isfinite():
            self._forget()
            raise RequestError("the gradients are not finite; they are cleared and the weights stay as they were")
        self._optimizer.param_groups[0].update(
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
        )
        self._optimizer.step()
        self._forget()
        return types.OptimStepResponse(metrics={"grad_norm:mean": float(norm)})

    def gradients(self) -> dict[str, Tensor]:
        """The name of each trained parameter → its gathered gradient."""
        return {name: p.grad for name, p in self._trained.items() if p.grad is not None}

    def weights(self) -> dict[str, Tensor]:
        """A copy of the trained parameters' numbers, by name."""
        return {name: parameter.detach().clone() for name, parameter in self._trained.items()}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """A copy of Adam's state, `<tensor>.<moment>` and `step`; empty before its first step."""
        states = {name: self._optimizer.state[parameter] for name, parameter in self._trained.items()}
        if not all(states.values()):
            return {}
        moments = {f"{name}.{m}": state[m].clone() for name, state in states.items() for m in MOMENTS}
        return {"step": next(iter(states.values()))["step"].detach().cpu().clone(), **moments}

    def restore(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Take numbers of this shape, and Adam's state as `optimizer_tensors` gives it.

        Raises:
            ModelError: other tensors; nothing is changed then.
        """
        if optimizer:
            wanted = {f"{name}.{m}": parameter for name, parameter in self._trained.items() for m in MOMENTS}
            check_tensors("the optimizer", {"step": torch.zeros(()), **wanted}, optimizer)
        self.head.take(weights)
        self._optimizer.state.clear()
        for name, parameter in self._trained.items() if optimizer else ():
            tensors = {"step": optimizer["step"], **{m: optimizer[f"{name}.{m}"] for m in MOMENTS}}
            self._optimizer.state[parameter] = {k: t.to(parameter.device, copy=True) for k, t in tensors.items()}
        self._forget()

    @contextmanager
    def _request(self) -> Iterator[None]:
        """Around the passes of one request, whose gradients are gathered whole or not at all."""
        self._begun = False
        try:
            yield
        except BaseException:
            if self._begun:
                self._forget()
            raise

    def _add(self, value: Tensor) -> None:
        self._begun = True
        value.backward()
        self._gathered = True

    def _forget(self) -> None:
        self._gathered = False
        for gradient in self.gradients().values():
            gradient.zero_()

    def _decoded(self, number: int, image: bytes) -> np.ndarray:
        with named(f"datum {number}"):
            return self._pixels(image)


def _check_loss(loss_fn: str, config: Mapping[str, Any] | None) -> None:
    if loss_fn != LOSS:
        raise RequestError(f"loss {loss_fn!r} is not one of a classifier's; use {LOSS!r}")
    if config:
        raise RequestError(f"loss {LOSS!r} takes no configuration, got {sorted(config)}")


# ---- Calls one after the other on a thread of its own, in the order they were made. Knows nothing of what is called.

T = TypeVar("T")


class Worker:
    """One thread; it ends with the last reference to the worker, or at `close`."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kshot-head")

    def submit(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> AwaitableConcurrentFuture[T]:
        """The SDK's future of `call(*args, **kwargs)`. Raises RequestError after `close`."""
        try:
            return AwaitableConcurrentFuture(self._thread.submit(call, *args, **kwargs))
        except RuntimeError as error:
            raise RequestError("the client is closed; make another one") from error

    def close(self) -> None:
        """Finish what was requested and end the thread."""
        self._thread.shutdown()


# ---- Checkpoints of trained heads on disk: weights, optimizer and a record of what they are of. Knows no run in

WEIGHTS, OPTIMIZER, RECORD = "head.safetensors", "optimizer.safetensors", "kshot.json"
_RECORDED = {"model": str, "n_classes": int, "rank": int, "readout": str, "size": int | None}


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds. optimizer: the optimizer's tensors, or None where only weights were saved."""

    shape: Shape
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor] | None = None


def save(state: Path, path: str, checkpoint: Checkpoint) -> None:
    """Write a checkpoint. Raises RequestError where one of this name exists, KshotError where it cannot be written."""
    target = folder_of(state, path)
    if target.exists():
        raise RequestError(f"checkpoint {path} exists; give another name")
    try:
        write_folder(target, lambda folder: _write(folder, checkpoint))
    except OSError as error:
        reason = error.strerror or error
        raise KshotError(f"checkpoint {path} cannot be written to {state} ({reason}); make room there") from error


def load(state: Path, path: str) -> Checkpoint:
    """Read a checkpoint. Raises ModelError where there is none or it is damaged."""
    source = folder_of(state, path)
    if not source.is_dir():
        raise ModelError(f"checkpoint {path} does not exist in the state folder {str(state)!r}")
    try:
        record = json.loads((source / RECORD).read_text(encoding="utf-8"))
        optimizer = load_file(source / OPTIMIZER) if (source / OPTIMIZER).exists() else None
        return Checkpoint(_shape(record), load_file(source / WEIGHTS), optimizer)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError, InputError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ModelError(f"checkpoint {path} is damaged ({reason}); restore it, or train and save it again") from error


def _shape(record: Any) -> Shape:
    """The recorded shape, each value of its kind. Raises KeyError, TypeError or InputError for another record."""
    shape = Shape(**{name: record[name] for name in _RECORDED})
    for name, kind in _RECORDED.items():
        if not isinstance(getattr(shape, name), kind):
            raise TypeError(f"{name} is {getattr(shape, name)!r}")
    return shape


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    save_file(dict(checkpoint.weights), folder / WEIGHTS)
    if checkpoint.optimizer is not None:
        save_file(dict(checkpoint.optimizer), folder / OPTIMIZER)
    (folder / RECORD).write_text(json.dumps(asdict(checkpoint.shape), indent=2), encoding="utf-8")


# ---- A trained head with fixed weights behind the SDK's `SamplingClient` methods. Knows no training.

ROUNDING = 1e-9  # of a sum of probabilities: a set that reaches top_p but for it has reached it


class LoraHeadSampler:
    """Fixed weights to sample class indices from; meets the training API's Protocol of a sampling client.

    `class_log_probs`, which prediction uses, is no method of that API.
    """

    def __init__(self, head: LoraHead, worker: Worker) -> None:
        self._head, self._worker = head, worker

    def class_log_probs(self, images: Sequence[bytes]) -> np.ndarray:
        """(N, n_classes) float64 log-probabilities of N encoded images, in nats; blocks until they are there.

        The same bit for bit for the same images in the same order.

        Raises:
            ImageError: bytes that are no image.
        """
        return self._worker.submit(_log_probs, self._head, images).result()

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
        """Class indices after a prompt of one image, with their log-probabilities before temperature and filters.

        Temperature 0 gives the likeliest class, of equal ones the lowest. A future that raises RequestError for options
        out of range, another prompt, or text to stop at; at once for log-probabilities that a classifier has not.
        """
        for name, value in {
            "topk_prompt_logprobs": topk_prompt_logprobs,
            "topk_sample_logprobs": topk_sample_logprobs,
            "target_prompt_logprobs": target_prompt_logprobs,
        }.items():
            if value:
                raise RequestError(f"{name}={value!r} is not supported by a classifier; leave it out")
        return self._worker.submit(
            _sample, self._head, prompt, num_samples, sampling_params, prompt_logprobs=include_prompt_logprobs
        )

    def compute_logprobs(self, prompt: tinker.ModelInput) -> AwaitableConcurrentFuture[list[float | None]]:
        """[None]: of a prompt's one position, the first, there is no log-probability."""
        return self._worker.submit(_prompt_logprobs, prompt)

    def get_tokenizer(self) -> Any:
        """Raises RequestError: there is none."""
        raise RequestError("a classifier has no tokenizer: its tokens are class indices")


def load_sampler(path: str, state: Path, device: str = "cpu") -> LoraHeadSampler:
    """A sampling client on the weights of a checkpoint in the folder `state`, of either kind.

    Raises:
        RequestError: no checkpoint path. ModelError: there is none, or it is damaged. What `LoraHead` raises.
    """
    saved = load(state, path)
    head = LoraHead(saved.shape, seed=0, device=device)  # the seed is of weights that are replaced
    head.take(saved.weights)
    return LoraHeadSampler(head, Worker())


@torch.no_grad()
def _log_probs(head: LoraHead, images: Sequence[bytes]) -> np.ndarray:
    result = np.empty((len(images), head.shape.n_classes))
    for start in range(0, len(images), CHUNK):  # pixels of a large set are never in memory together
        rows, chunk = result[start : start + CHUNK], images[start : start + CHUNK]
        pixels = [resized(image, head.backbone.patch, head.shape.size) for image in chunk]
        for members, logits in head.logits(pixels):
            rows[members] = logits.double().log_softmax(dim=1).cpu().numpy()
    return result


def _sample(
    head: LoraHead, prompt: tinker.ModelInput, count: int, params: types.SamplingParams, *, prompt_logprobs: bool
) -> types.SampleResponse:
    _check(count, params)
    log_probs = _log_probs(head, [image_of(prompt)])[0]
    stops = set(params.stop or ())
    sequences = [
        types.SampledSequence(
            stop_reason="stop" if token in stops else "length",  # there is no second position
            sequence_id=str(uuid.uuid4()),
            tokens_np=np.array([token], np.int32),
            logprobs_np=log_probs[[token]].astype(np.float32),
        )
        for token in _draw(log_probs, count, params)
    ]
    return types.SampleResponse(
        sequences=sequences, prompt_logprobs_np=np.array([np.nan], np.float32) if prompt_logprobs else None
    )


def _prompt_logprobs(prompt: tinker.ModelInput) -> list[float | None]:
    image_of(prompt)
    return [None]


def _check(count: int, p: types.SamplingParams) -> None:
    """Raise RequestError for what cannot be sampled."""
    ranges = {
        "num_samples": (count, 1, float("inf")),
        "max_tokens": (1 if p.max_tokens is None else p.max_tokens, 1, float("inf")),
        "temperature": (p.temperature, 0, np.finfo(float).max),
        "top_p": (p.top_p, 1e-9, 1),
        "top_k": (p.top_k, -1, float("inf")),
        "seed": (p.seed or 0, 0, 2**63 - 1),
    }
    for name, (value, low, high) in ranges.items():
        if not low <= value <= high:
            raise RequestError(f"{name} = {value} is out of range: it must be from {low} to {high}")
    if any(isinstance(stop, str) for stop in ([p.stop] if isinstance(p.stop, str) else p.stop or ())):
        raise RequestError(
            f"stop = {p.stop!r}: a classifier writes class indices, no text; stop at indices or leave it"
        )


def _draw(log_probs: np.ndarray, count: int, params: types.SamplingParams) -> list[int]:
    """`count` classes of (n_classes,) log-probabilities by temperature, top-k and top-p, from the seed's generator."""
    if params.temperature == 0:
        return [int(log_probs.argmax())] * count
    with np.errstate(over="ignore"):  # a small temperature makes all but the likeliest -inf
        scaled = (log_probs - log_probs.max()) / params.temperature
    order = np.argsort(-scaled, kind="stable")  # likeliest first, of equal ones the lower class
    kept = order[: params.top_k] if params.top_k > 0 else order
    probs = softmax(scaled[kept])
    # The smallest set whose mass reaches top_p (Holtzman et al. 2020): always the first.
    size = max(1, int((probs.cumsum() - probs < params.top_p - ROUNDING).sum())) if params.top_p < 1 else len(kept)
    generator = np.random.default_rng(params.seed)
    return generator.choice(kept[:size], count, p=probs[:size] / probs[:size].sum()).tolist()


# ---- LoRA and a linear head, trained behind the methods of the SDK's `TrainingClient`, as the language model is.


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

        data: as `baselines.lora.datum` makes them, with a weight each where wanted. What cannot be used raises from
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
        """Write the weights alone, for `baselines.training.load_sampler`."""
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
        save(state, path, Checkpoint(run.head.shape, run.weights(), run.optimizer_tensors()))
        return types.SaveWeightsResponse(path=path)

    def _save_for_sampler(self, state: Path, path: str) -> types.SaveWeightsForSamplerResponse:
        save(state, path, Checkpoint(self._run.head.shape, self._run.weights()))
        return types.SaveWeightsForSamplerResponse(path=path)

    def _load(self, state: Path, path: str, *, optimizer: bool) -> types.LoadWeightsResponse:
        saved, own = load(state, path), self._run.head.shape
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
