"""Fixed weights behind the SDK's `SamplingClient` methods, and what this service adds to them. Knows no mathematics."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tinker
from tinker import types
from tinker.lib.public_interfaces.api_future import AwaitableConcurrentFuture

from kshot_errors import RequestError
from vlm.labels import Trie
from vlm.local import embedding, sampling, scoring
from vlm.local.engine import Engine, Snapshot


def refuse(**given: object) -> None:
    """Raise RequestError for an option of the SDK that this service does not have, if it is given."""
    for name, value in given.items():
        if value:
            raise RequestError(f"{name}={value!r} is not supported by the local service; leave it out")


class LocalSamplingClient:
    """Fixed weights to sample from and to score with; meets `vlm.service.SamplingClient`."""

    def __init__(
        self, engine: Engine, snapshot: Snapshot, submit: Callable[..., "AwaitableConcurrentFuture[Any]"]
    ) -> None:
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
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
    ) -> AwaitableConcurrentFuture[types.SampleResponse]:
        """Samples after a prompt, and log-probabilities of the prompt where asked (see the SDK)."""
        refuse(topk_sample_logprobs=topk_sample_logprobs, prompt_alt_tokens_k=prompt_alt_tokens_k)
        refuse(prompt_logprobs_last_n=prompt_logprobs_last_n)
        ask = sampling.Ask(
            prompt,
            sampling_params,
            num_samples,
            include_prompt_logprobs,
            topk_prompt_logprobs,
            target_prompt_logprobs,
        )
        self._engine.prefetch([prompt])
        return self._submit(lambda: sampling.sample(self._engine, self._snapshot, [ask])[0])

    def compute_logprobs(
        self, prompt: tinker.ModelInput, prompt_logprobs_last_n: int | None = None
    ) -> AwaitableConcurrentFuture[list[float | None]]:
        """Each position's log-probability given those before it; None at position 0 and at image positions."""
        refuse(prompt_logprobs_last_n=prompt_logprobs_last_n)
        ask = sampling.Ask(prompt, types.SamplingParams(max_tokens=1), prompt_logprobs=True)
        self._engine.prefetch([prompt])
        return self._submit(lambda: sampling.sample(self._engine, self._snapshot, [ask])[0].prompt_logprobs)

    def sample_batch(
        self, prompts: Sequence[tinker.ModelInput], params: types.SamplingParams
    ) -> list[types.SampleResponse]:
        """One sample after each prompt, in shared passes: the same answers as one by one, sooner."""
        asks = [sampling.Ask(prompt, params) for prompt in prompts]
        self._engine.prefetch(prompts)
        return self._submit(sampling.sample, self._engine, self._snapshot, asks).result()

    def score_tree(self, prompts: Sequence[tinker.ModelInput], trie: Trie) -> np.ndarray:
        """(prompts, edges) log-probabilities in one pass a prompt; see `vlm.scoring.TreeScorer`."""
        self._engine.prefetch(prompts)
        return self._submit(scoring.score_tree, self._engine, self._snapshot, prompts, trie).result()

    def embed_prompts(self, prompts: Sequence[tinker.ModelInput], *, tower: bool, hidden: bool) -> np.ndarray:
        """(prompts, D) features of the model's own; see `vlm.embedding.Embedder`."""
        self._engine.prefetch(prompts)
        given = self._engine, self._snapshot, prompts
        return self._submit(embedding.embed, *given, tower=tower, hidden=hidden).result()

    def get_tokenizer(self) -> Any:
        """The stock tokenizer of the base model."""
        return self._engine.model.tokenizer

    def get_base_model(self) -> str:
        """The name of the base model."""
        return self._engine.model.name
