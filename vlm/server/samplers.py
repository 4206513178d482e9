"""Fixed weights that clients sample from, loaded when they are first asked for. Knows no HTTP.

Runs on the event loop.
"""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field

from kshot_errors import MissingError, UnknownNameError
from vlm.local.host import Host
from vlm.local.sampling_client import LocalSamplingClient
from vlm.server.checkpoints import Checkpoints
from vlm.server.store import Store

KEPT = 32  # adapters in memory that can be loaded again
UNSAVED = 16  # of a run, in memory alone: those last asked for


@dataclass(frozen=True)
class Unsaved:
    """A snapshot of a run, in memory alone."""

    run: str
    client: LocalSamplingClient


@dataclass
class Samplers:
    """Sampling clients by the weights that they stand for. ephemeral: by sampler, those that are in memory alone."""

    host: Host
    store: Store
    checkpoints: Checkpoints
    ephemeral: "OrderedDict[str, Unsaved]" = field(default_factory=OrderedDict)
    _loaded: "OrderedDict[str, asyncio.Task[LocalSamplingClient]]" = field(default_factory=OrderedDict)

    def check(self, model_path: str | None, base_model: str | None) -> None:
        """Raise UnknownNameError or MissingError for weights that are not here."""
        if model_path is not None:
            self.checkpoints.existing(model_path)
        elif base_model not in (self.host.places or {}):
            raise UnknownNameError("model", str(base_model), self.host.places or {})

    def check_session(self, sampler_id: str) -> None:
        """Raise MissingError for a sampling session that is not here."""
        if sampler_id not in self.ephemeral and self.store.sampler(sampler_id) is None:
            raise MissingError(f"there is no sampling session {sampler_id!r}; create one")

    async def client(self, model_path: str | None, base_model: str | None) -> LocalSamplingClient:
        """A client on saved weights or a base model; raises as `check`, and ModelError where they cannot be loaded."""
        self.check(model_path, base_model)
        saved = None if model_path is None else self.checkpoints.existing(model_path)
        key = (
            f"base {base_model}" if saved is None else f"{saved.path} {saved.created}"
        )  # one that was overwritten: anew
        if key not in self._loaded:
            self._loaded[key] = asyncio.create_task(self._load(model_path, base_model))
            self._drop_oldest()
        self._loaded.move_to_end(key)
        task = self._loaded[key]
        try:
            return await asyncio.shield(task)
        except Exception:
            if self._loaded.get(key) is task:
                del self._loaded[key]
            raise

    async def of(self, sampler_id: str) -> LocalSamplingClient:
        """The client of a sampling session. Raises MissingError for an unknown one, and for weights that were in
        memory alone and are gone."""
        if sampler_id in self.ephemeral:
            self.ephemeral.move_to_end(sampler_id)
            return self.ephemeral[sampler_id].client
        row = self.store.sampler(sampler_id)
        if row is None:
            raise MissingError(f"there is no sampling session {sampler_id!r}; create one")
        if row.ephemeral:
            raise MissingError(
                f"the weights of sampling session {sampler_id} were in memory alone and are gone; save them with "
                "save_weights_for_sampler"
            )
        return await self.client(row.model_path, None if row.model_path else row.base_model)

    def keep(self, sampler_id: str, run: str, client: LocalSamplingClient) -> None:
        """Weights that are in memory alone; of one run the UNSAVED that were last asked for."""
        self.ephemeral[sampler_id] = Unsaved(run, client)
        mine = [name for name, each in self.ephemeral.items() if each.run == run]
        for name in mine[:-UNSAVED]:
            del self.ephemeral[name]

    def release(self, sampler_id: str) -> None:
        """Forget weights that are in memory alone."""
        self.ephemeral.pop(sampler_id, None)

    async def _load(self, model_path: str | None, base_model: str | None) -> LocalSamplingClient:
        return await self.host.submit(self.host.sampler, model_path, None if model_path else base_model)

    def _drop_oldest(self) -> None:
        while len(self._loaded) > KEPT:
            self._loaded.popitem(last=False)
