"""What a server holds, without HTTP: sessions, the runs in memory, samplers, checkpoints, and answers to fetch.

Everything here runs on the event loop and returns at once; models work on the host's one worker. Knows no requests of
training and sampling (`vlm.server.tinker.training`, `vlm.server.tinker.sampling`) and no mathematics.

TODO Fixed weights that clients sample from, loaded when they are first asked for. Knows no HTTP.

Runs on the event loop.
"""

import asyncio
import logging
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tinker import types

from kshot.errors import BusyError, KshotError, LostError, MissingError, RequestError, UnknownNameError
from vlm.local.clients import LocalSamplingClient, SamplingTask
from vlm.local.registry import EngineRegistry
from vlm.server.checkpoints import Checkpoints
from vlm.server.futures import Answer, Futures
from vlm.server.runs import LiveRun
from vlm.server.store import Store

# ---- Fixed weights that clients sample from, loaded when they are first asked for. Knows no HTTP.

KEPT_LOADED = 32  # adapters in memory that can be loaded again
UNSAVED = 16  # of a run, in memory alone: those last asked for


@dataclass(frozen=True)
class Unsaved:
    """A snapshot of a run, in memory alone."""

    run: str
    client: LocalSamplingClient


@dataclass
class Samplers:
    """Sampling clients by the weights that they stand for. ephemeral: by sampler, those that are in memory alone."""

    registry: EngineRegistry
    store: Store
    checkpoints: Checkpoints
    ephemeral: "OrderedDict[str, Unsaved]" = field(default_factory=OrderedDict)
    _loaded: "OrderedDict[str, asyncio.Task[LocalSamplingClient]]" = field(default_factory=OrderedDict)

    def check(self, model_path: str | None, base_model: str | None) -> None:
        """Raise UnknownNameError or MissingError for weights that are not here."""
        if model_path is not None:
            self.checkpoints.existing(model_path)
        elif base_model not in (self.registry.model_paths or {}):
            raise UnknownNameError("model", str(base_model), self.registry.model_paths or {})

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
        return await self.registry.submit(self.registry.sampler, model_path, None if model_path else base_model)

    def _drop_oldest(self) -> None:
        while len(self._loaded) > KEPT_LOADED:
            self._loaded.popitem(last=False)


# ---- What a server holds, without HTTP: sessions, the runs in memory, samplers, checkpoints, and answers to fetch.

log = logging.getLogger("kshot.server")

LAST = 999_999_999  # number of a run or sampler in its session
GRACE = 5.0  # seconds that a pass which is being made has when the server stops
METADATA = 1 << 16  # characters of it that are kept
STALE = 3600.0  # seconds without a sign of life after which a session's runs leave the memory
KEPT_RETRIEVED, KEPT, KEPT_BYTES = 600.0, 86400.0, 1 << 30  # of answers: seconds after they were fetched, at all; bytes


@dataclass
class ServerState:
    """One server's state. samplings: by request, those under way. sizes: bytes of the
    requests of runs that wait. steps, examples: trained since the start. ended:
    whether the worker was done when the server was closed."""

    registry: EngineRegistry
    store: Store
    started: float = field(default_factory=time.time)
    runs: dict[str, LiveRun] = field(default_factory=dict)
    samplings: dict[str, SamplingTask] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    ended: bool = False
    steps: int = 0
    examples: int = 0

    def __post_init__(self) -> None:
        self.futures = Futures(self.store)
        self.checkpoints = Checkpoints(self.registry.state, self.store)
        self.samplers = Samplers(self.registry, self.store, self.checkpoints)
        self.checkpoints.reconcile()
        self._tasks = set[asyncio.Task[None]]()

    def create_session(self, request: types.CreateSessionRequest) -> str:
        """The id of a new session. Raises RequestError for a project, of which this server has none."""
        if request.project_id is not None:
            raise RequestError(
                f"project_id {request.project_id!r}: this server has no projects; unset TINKER_PROJECT_ID"
            )
        session = str(uuid.uuid4())
        self.store.add_session(
            session,
            user_metadata=kept(request.user_metadata),
            tags=request.tags,
            display_name=request.display_name,
            sdk_version=request.sdk_version,
        )
        return session

    def active(self, session: str) -> None:
        """Raise MissingError for a session that is not, or not any more."""
        row = self.store.session(session)
        if row is None:
            raise MissingError(f"there is no session {session!r}; create one")
        if row.finished is not None:
            raise MissingError(f"session {session} was finished; create a new one")

    def heartbeat(self, session: str) -> None:
        """A sign of life. Raises MissingError as `active` does, and LostError for a finished session, at which the SDK
        gives no more."""
        try:
            self.active(session)
        except MissingError as error:
            raise error if self.store.session(session) is None else LostError(str(error)) from error
        self.store.heartbeat(session)

    def finish_session(self, session: str, reason: dict[str, Any]) -> None:
        """Its runs and unsaved samplers leave the memory; checkpoints stay."""
        self.active(session)
        self.store.finish_session(session, reason)
        self.release(session, f"session {session} was finished")

    def release(self, session: str, why: str) -> None:
        """Take the runs and the unsaved samplers of a session out of the memory."""
        for run in [run for run in self.runs.values() if run.session == session]:
            del self.runs[run.id]
            run.end(self.lost(run.id, why))
        for row in self.store.samplers_of(session):
            self.samplers.release(row.id)

    def settle(self, request_id: str, answer: Answer) -> None:
        """Say what a request of a run came to."""
        self.sizes.pop(request_id, None)
        self.futures.finish(request_id, answer)

    def lost(self, run: str, why: str) -> KshotError:
        """What a client is told of a run that is not in memory any more."""
        last = self.checkpoints.last(run)
        way = f"go on from {last!r} with create_training_client_from_state_with_optimizer"
        return MissingError(
            f"run {run} is not in memory any more ({why}); {way if last else 'nothing of it was saved'}"
        )

    def tidy(self, now: float) -> None:
        """Take stale sessions out of the memory, and expired checkpoints off the disk."""
        for run in [*self.runs.values()]:
            run.skip(now)
            self.store.touch_run(run.id, run.next_seq, run.last_request)
        for session in {run.session for run in self.runs.values()} | self._ephemeral_sessions():
            row = self.store.session(session)
            signs = [run.last_request for run in self.runs.values() if run.session == session]
            if row is not None and now - max([row.heartbeat, *signs]) > STALE:
                self.release(session, f"session {session} gave no sign of life for {STALE / 60:.0f} minutes")
        self.checkpoints.remove_expired(now)

    async def keep_tidy(self, seconds: float = 30.0) -> None:
        """`tidy`, again and again, and take old answers off the disk."""
        while True:
            before = time.time()
            await asyncio.sleep(seconds)
            if time.time() - before > 3 * seconds:  # the machine slept or its clock jumped: clients speak first
                continue
            try:
                self.tidy(time.time())
                await asyncio.to_thread(self.store.prune, time.time(), KEPT_RETRIEVED, KEPT, KEPT_BYTES)
            except Exception:
                log.exception("housekeeping failed; it is tried again")

    async def close(self) -> None:
        """Give the worker GRACE seconds to finish what it has begun, drop what it has not, and close the store."""
        self.futures.stop()
        for run in self.runs.values():
            run.end(BusyError("the server is being stopped"))
        for each in self.samplings.values():
            each.cancel()
        for task in self._tasks:
            task.cancel()
        ending = threading.Thread(
            target=self.registry.close, daemon=True
        )  # of a pool, the interpreter would wait for it
        ending.start()
        deadline = time.monotonic() + GRACE
        while ending.is_alive() and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self.ended = not ending.is_alive()
        await asyncio.sleep(0)  # what the worker has handed over is taken
        await asyncio.to_thread(self.futures.close)
        self.store.close()

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something while requests are answered."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    @contextmanager
    def logged(self, what: str) -> Iterator[None]:
        """Around what may fail without failing the request."""
        try:
            yield
        except KshotError:
            log.exception(what)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a request was not finished", exc_info=task.exception())

    def check_model(self, name: str) -> None:
        """Raise UnknownNameError for a model that is not served."""
        if name not in (self.registry.model_paths or {}):
            raise UnknownNameError("model", name, self.registry.model_paths or {})

    def _ephemeral_sessions(self) -> set[str]:
        rows = (self.store.sampler(sampler_id) for sampler_id in self.samplers.ephemeral)
        return {row.session for row in rows if row is not None}


def check_number(name: str, number: int) -> None:
    """Raise RequestError for what cannot be the number of a run or sampler in its session."""
    if not 0 <= number <= LAST:
        raise RequestError(f"{name} = {number} is out of range: it must be from 0 to {LAST}")


def kept(metadata: Mapping[str, Any] | None) -> dict[str, str] | None:
    """Metadata as text. Raises RequestError for more of it than is kept."""
    if metadata is None:
        return None
    if sum(len(str(key)) + len(str(value)) for key, value in metadata.items()) > METADATA:
        raise RequestError(f"user_metadata has more than {METADATA:,} characters; keep it short")
    return {str(key): str(value) for key, value in metadata.items()}
