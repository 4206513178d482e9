"""A trained head with fixed weights behind the SDK's `SamplingClient` methods. Knows no training.

A class index is a token: a sample is one of them, and the sequence then ends.
"""

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tinker
import torch
from scipy.special import softmax
from tinker import types
from tinker.lib.public_interfaces.api_future import AwaitableConcurrentFuture

from baselines import head_checkpoints
from baselines.examples import image_of
from baselines.lora import CHUNK, LoraHead
from baselines.pixels import resized
from baselines.worker import Worker
from kshot_errors import RequestError

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
    saved = head_checkpoints.load(state, path)
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
