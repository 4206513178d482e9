"""Fixed weights behind the SDK's `SamplingClient` methods, and what this service adds to them. Knows no mathematics."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import tinker
from tinker import types
from tinker.lib.public_interfaces.api_future import AwaitableConcurrentFuture

from kshot_errors import RequestError
from vlm.inputs import ImageRule
from vlm.labels import Trie
from vlm.local import embedding, sampling, scoring
from vlm.local.engine import Engine, Snapshot
from vlm.local.worker import Sampling, Worker
from vlm.local.writing import Writer


def refuse(**given: object) -> None:
    """Raise RequestError for an option of the SDK that this service does not have, if it is given."""
    for name, value in given.items():
        if value:
            raise RequestError(f"{name}={value!r} is not supported by the local service; leave it out")


class LocalSamplingClient:
    """Fixed weights to sample from and to score with; meets `vlm.service.SamplingClient`."""

    def __init__(self, engine: Engine, snapshot: Snapshot, worker: Worker) -> None:
        self._engine, self._snapshot, self._worker = engine, snapshot, worker

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
    ) -> AwaitableConcurrentFuture[types.SampleResponse]:
        """Samples after a prompt, and log-probabilities of the prompt where asked (see the SDK)."""
        ask = sampling.Ask(
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
        return self._submit([prompt], lambda: sampling.sample(self._engine, self._snapshot, [ask])[0])

    def start(self, ask: sampling.Ask, on_token: Callable[[Writer], None] | None = None) -> Sampling:
        """The same, written together with whatever else is sampled at the time: sooner where much is, and equal to
        what it would be alone but for rounding. on_token: see `vlm.local.worker.Worker.sample`."""
        self._engine.prefetch([ask.prompt])
        return self._worker.sample(self._engine, self._snapshot, ask, on_token)

    def compute_logprobs(
        self, prompt: tinker.ModelInput, prompt_logprobs_last_n: int | None = None
    ) -> AwaitableConcurrentFuture[list[float | None]]:
        """Each position's log-probability given those before it; None at position 0 and at image positions."""
        params = types.SamplingParams(max_tokens=1)
        ask = sampling.Ask(prompt, params, prompt_logprobs=True, prompt_logprobs_last_n=prompt_logprobs_last_n)
        return self._submit([prompt], lambda: sampling.sample(self._engine, self._snapshot, [ask])[0].prompt_logprobs)

    def sample_batch(
        self, prompts: Sequence[tinker.ModelInput], params: types.SamplingParams
    ) -> list[types.SampleResponse]:
        """One sample after each prompt, in shared passes: the same answers as one by one, sooner."""
        asks = [sampling.Ask(prompt, params) for prompt in prompts]
        return self._submit(prompts, sampling.sample, self._engine, self._snapshot, asks).result()

    def score_tree(self, prompts: Sequence[tinker.ModelInput], trie: Trie) -> np.ndarray:
        """(prompts, edges) log-probabilities in one pass a prompt; see `vlm.scoring.TreeScorer`."""
        return self._submit(prompts, scoring.score_tree, self._engine, self._snapshot, prompts, trie).result()

    def embed_prompts(self, prompts: Sequence[tinker.ModelInput], *, tower: bool, hidden: bool) -> np.ndarray:
        """(prompts, D) features of the model's own; see `vlm.embedding.Embedder`."""
        call = partial(embedding.embed, tower=tower, hidden=hidden)
        return self._submit(prompts, call, self._engine, self._snapshot, prompts).result()

    def encode_images(self, images: Sequence[types.ImageChunk]) -> None:
        """See `vlm.embedding.Encoding`."""
        new = self._engine.vision.unseen(images)
        self._engine.vision.prefetch(new)
        self._worker.submit(self._engine.vision.features, new).result()

    @property
    def tower_forwards(self) -> int:
        """Images that went through the vision tower of the base model in this process."""
        return self._engine.vision.forwards

    def get_tokenizer(self) -> Any:
        """The stock tokenizer of the base model."""
        return self._engine.model.tokenizer

    def get_base_model(self) -> str:
        """The name of the base model."""
        return self._engine.model.name

    @property
    def rule(self) -> ImageRule:
        """How the base model counts an image's tokens."""
        return self._engine.model.rule

    @property
    def context(self) -> int:
        """How many positions the base model takes."""
        return self._engine.model.context

    def _submit(
        self, prompts: Sequence[tinker.ModelInput], call: Callable[..., Any], *args: Any
    ) -> AwaitableConcurrentFuture[Any]:
        self._engine.prefetch(prompts)
        return AwaitableConcurrentFuture(self._worker.submit(call, *args))
