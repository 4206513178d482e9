"""What the OpenAI interface needs of fixed weights: to sample, to score, and how texts and images become tokens."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np
import tinker
from tinker import types

from vlm.inputs import ImageRule
from vlm.labels import Trie
from vlm.local.sampling import Ask
from vlm.local.writing import Writer
from vlm.service import SamplingClient


class Sampling(Protocol):
    """A request that is being answered."""

    @property
    def future(self) -> "Future[types.SampleResponse]": ...
    def cancel(self) -> Any:
        """Let it be, as nobody waits for it."""


class Sampler(SamplingClient, Protocol):
    """Fixed weights; `vlm.local.sampling_client.LocalSamplingClient` is one."""

    @property
    def rule(self) -> ImageRule: ...
    @property
    def context(self) -> int:
        """Positions the model takes."""

    def start(self, ask: Ask, on_token: Callable[[Writer], None] | None = None) -> Sampling:
        """Begin to answer; on_token is called on the engine's thread after each token of each sample, in order."""

    def score_tree(self, prompts: Sequence[tinker.ModelInput], trie: Trie) -> np.ndarray:
        """See `vlm.scoring.TreeScorer`; blocks."""
