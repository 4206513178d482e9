"""What the OpenAI-compatible endpoints see of a server: names of models, and weights to sample from. Knows no HTTP."""

from collections.abc import Sequence
from dataclasses import dataclass

from vlm.local.sampling_client import LocalSamplingClient
from vlm.server.core import Core

PATH = "tinker://"


@dataclass(frozen=True)
class OpenAIModels:
    """Meets `vlm.server.openai_routes.Models`."""

    core: Core

    def names(self) -> Sequence[str]:
        """The base models."""
        return list(self.core.host.places or {})

    def created(self) -> float:
        """When the server was started, in seconds since 1970."""
        return self.core.started

    async def sampler(self, model: str) -> LocalSamplingClient:
        """A client on a base model or on the checkpoint of a tinker:// path; raises as `Samplers.client`."""
        saved = model.startswith(PATH)
        return await self.core.samplers.client(model if saved else None, None if saved else model)
