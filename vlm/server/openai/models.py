"""What the OpenAI-compatible endpoints need of a server: names of models, and weights to sample from and score with."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import tinker
from tinker import types

from kshot.errors import BusyError
from vlm.inputs import ImageRule
from vlm.label_trie import Trie
from vlm.local.clients import LocalSamplingClient, SamplingRequest, TokenSequence
from vlm.server.state import ServerState
from vlm.server.tinker.sampling import WAITING
from vlm.service import SamplingClient

PATH = "tinker://"


@dataclass(frozen=True)
class OpenAIModels:
    """Meets `vlm.server.openai.routes.Models`."""

    state: ServerState

    def names(self) -> Sequence[str]:
        """The base models."""
        return list(self.state.models)

    def created(self) -> float:
        """When the server was started, in seconds since 1970."""
        return self.state.started

    async def sampler(self, model: str) -> LocalSamplingClient:
        """A client on a base model or on the checkpoint of a tinker:// path; raises as `Samplers.client`, and BusyError
        where too many requests wait."""
        if max(len(self.state.samplings), self.state.registry.scheduler.waiting_samples) >= WAITING:
            raise BusyError(f"{WAITING} sampling requests are waiting; send this one again later")
        saved = model.startswith(PATH)
        return await self.state.samplers.client(model if saved else None, None if saved else model)


class Sampling(Protocol):
    """A sampling request in progress."""

    @property
    def future(self) -> "Future[types.SampleResponse]": ...
    def cancel(self) -> Any:
        """Stop it, as nobody waits for it."""


class Sampler(SamplingClient, Protocol):
    """Fixed weights; `vlm.local.clients.LocalSamplingClient` is one."""

    @property
    def rule(self) -> ImageRule: ...
    @property
    def context(self) -> int:
        """Positions the model takes."""

    def start(self, ask: SamplingRequest, on_token: Callable[[TokenSequence], None] | None = None) -> Sampling:
        """Start to sample; on_token is called on the engine's thread after each token of each sample, in order."""

    def score_tree(self, prompts: Sequence[tinker.ModelInput], trie: Trie) -> np.ndarray:
        """See `vlm.scoring.TreeScorer`; blocks."""
