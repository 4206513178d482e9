"""What the OpenAI-compatible endpoints see of a server: names of models, and weights to sample from. Knows no HTTP."""

from collections.abc import Sequence
from dataclasses import dataclass

from kshot_errors import BusyError
from vlm.local.sampling_client import LocalSamplingClient
from vlm.server.core import Core
from vlm.server.sampling import WAITING

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
        """A client on a base model or on the checkpoint of a tinker:// path; raises as `Samplers.client`, and BusyError
        where too many requests wait."""
        if max(len(self.core.samplings), self.core.host.worker.waiting_samples) >= WAITING:
            raise BusyError(f"{WAITING} sampling requests are waiting; send this one again later")
        saved = model.startswith(PATH)
        return await self.core.samplers.client(model if saved else None, None if saved else model)
