"""What a server holds: sessions, the runs in memory, samplers, checkpoints, and the answers to requests.

Everything here runs on the event loop and returns at once; models run on the thread of the registry's scheduler.
"""

import asyncio
import threading
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from tinker import types

from kshot.errors import BusyError, KshotError, LostError, MissingError, RequestError, UnknownNameError
from vlm.local.clients import LocalSamplingClient
from vlm.local.registry import EngineRegistry
from vlm.server.checkpoints import Checkpoints, logged
from vlm.server.futures import Futures
from vlm.server.limits.memory import SAMPLERS, Memory, Reservation
from vlm.server.owners import Owner
from vlm.server.retention import KEEP, Retention, check_reason, check_texts
from vlm.server.runs import LiveRun
from vlm.server.store import Store
from vlm.server.tables import Checkpoint, Run, Sampler, Session

LAST = 999_999_999  # number of a run or sampler in its session
GRACE = 5.0  # seconds that the engine has to finish its work when the server stops
METADATA = 1 << 16  # characters of user_metadata
STALE = 3600.0  # seconds without a heartbeat after which a session's runs leave the memory
KEPT_RETRIEVED, KEPT, KEPT_BYTES = 600.0, 86400.0, 1 << 30  # of answers: seconds after they were fetched, at all; bytes
KEPT_LOADED = 32  # adapters in memory that can be loaded again
UNSAVED = 16  # snapshots of a run that are in memory alone: the last that were used


@dataclass
class ServerState:
    """One server's state. memory: from which all is taken that clients make it hold. keep: seconds for which what is
    over is kept, see `vlm.server.retention`. samplings: the futures of those in progress, by request id. steps,
    examples: trained since the start, by owner. ended: whether the engine had finished when the server was closed.
    gone: runs whose engine ended, and why."""

    registry: EngineRegistry
    store: Store
    memory: Memory = field(default_factory=Memory)
    keep: float = KEEP
    started: float = field(default_factory=time.time)
    runs: dict[str, LiveRun] = field(default_factory=dict)
    samplings: dict[str, Future[types.SampleResponse]] = field(default_factory=dict)
    ended: bool = False
    steps: Counter[str | None] = field(default_factory=Counter)
    examples: Counter[str | None] = field(default_factory=Counter)
    gone: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.futures = Futures(self.store)
        self.checkpoints = Checkpoints(self.registry.state, self.store)
        self.retention = Retention(self.store, self.keep)
        self.samplers = Samplers(self.registry, self.store, self.checkpoints, self.memory)
        self.checkpoints.reconcile()
        self._tasks = set[asyncio.Task[None]]()

    @property
    def models(self) -> Mapping[str, str]:
        """The models that are served: name → folder or hub id."""
        return self.registry.model_paths or {}

    def create_session(self, request: types.CreateSessionRequest, owner: Owner) -> str:
        """The id of a new session. Raises as `check_project`, `check_texts`, `metadata_text` and `Retention.add`."""
        check_project(request.project_id)
        check_texts(request)
        session = Session(
            str(uuid.uuid4()),
            user_metadata=metadata_text(request.user_metadata),
            tags=request.tags,
            display_name=request.display_name,
            sdk_version=request.sdk_version,
            owner=owner.name,
        )
        self.retention.add(session)
        return session.id

    def check_session(self, session: str, owner: Owner, finished: type[KshotError] = MissingError) -> None:
        """Raise MissingError for a session that this owner has not, `finished` for one that was finished."""
        row = self.store.get(Session, session, owner)
        if row is None:
            raise MissingError(f"there is no session {session!r}; create one")
        if row.finished is not None:
            raise finished(f"session {session} was finished; create a new one")

    def heartbeat(self, session: str, owner: Owner) -> None:
        """Note that a session's client is there; raises as `check_session`."""
        self.check_session(session, owner, LostError)  # at which the SDK stops sending heartbeats
        self.store.update(Session, session, heartbeat=time.time())

    def finish_session(self, session: str, reason: dict[str, Any], owner: Owner) -> None:
        """End a session: its runs and unsaved samplers leave the memory; checkpoints stay. Raises as `check_session`
        and `check_reason`."""
        self.check_session(session, owner)
        check_reason(reason)
        self.store.update(Session, session, finished=reason, heartbeat=time.time())
        self.release(session, f"session {session} was finished")

    def release(self, session: str, why: str) -> None:
        """Take the runs and the unsaved samplers of a session out of the memory."""
        for run in [run for run in self.runs.values() if run.session == session]:
            del self.runs[run.id]
            run.end(self.lost_run(run.id, why))
        for row in self.store.of_session(Sampler, session):
            self.samplers.ephemeral.pop(row.id, None)

    def live_run(self, run: str, owner: Owner) -> LiveRun | None:
        """A run of this owner, if it is in memory."""
        live = self.runs.get(run)
        if live is not None and live.client is not None and (why := live.client.lost):
            self.gone[run] = why
            del self.runs[run]
            live.end(self.lost_run(run, why))
            live = None
        return live if live is not None and owner.reaches(live.owner) else None

    def missing_run(self, run: str, owner: Owner) -> MissingError:
        """What to say of a run that is not in memory: this owner has none of that name, or what was last saved of
        it."""
        if self.store.get(Run, run, owner) is None:
            return MissingError(f"there is no run {run!r}; create one")
        return self.lost_run(run, self.gone.get(run, "this server was started again, or its session is over"))

    def lost_run(self, run: str, why: str) -> MissingError:
        """The error of requests to a run that is not in memory any more."""
        last = self.checkpoints.last(run)
        way = f"go on from {last!r} with create_training_client_from_state_with_optimizer"
        return MissingError(
            f"run {run} is not in memory any more ({why}); {way if last else 'nothing of it was saved'}"
        )

    def tidy(self, now: float) -> None:
        """Take stale sessions out of the memory, and expired checkpoints off the disk."""
        for run in [*self.runs.values()]:
            with logged(f"run {run.id}"):
                run.skip(now)
                self.store.update(Run, run.id, next_seq=run.next_seq, last_request=run.last_request)
        with logged("sessions"):
            self._release_stale(now)
        with logged("checkpoints"):
            self.checkpoints.remove_expired(now)

    def _release_stale(self, now: float) -> None:
        samplers = [self.store.get(Sampler, each) for each in self.samplers.ephemeral]
        sessions = {run.session for run in self.runs.values()} | {each.session for each in samplers if each}
        for session in sessions:
            with logged(f"session {session}"):
                row = self.store.get(Session, session)
                signs = [run.last_request for run in self.runs.values() if run.session == session]
                if row is not None and now - max([row.heartbeat, *signs]) > STALE:
                    self.release(session, f"session {session} gave no sign of life for {STALE / 60:.0f} minutes")

    async def keep_tidy(self, seconds: float = 30.0) -> None:
        """`tidy` every so many seconds, and take old answers off the disk."""
        while True:
            before = time.time()
            await asyncio.sleep(seconds)
            with logged("answers that were not written"):
                self.futures.write_again()
            if time.time() - before > 3 * seconds:  # the machine slept or its clock jumped: clients speak first
                continue
            self.tidy(time.time())
            with logged("answers"):
                await asyncio.to_thread(self.store.prune, time.time(), KEPT_RETRIEVED, min(KEPT, self.keep), KEPT_BYTES)
            with logged("what is over"):
                await asyncio.to_thread(self.retention.prune, time.time(), STALE, [*self.samplers.ephemeral])

    async def close(self) -> None:
        """Give the engine GRACE seconds to finish what it has begun, drop what it has not, and close the store."""
        self.futures.stop()
        for run in self.runs.values():
            run.end(BusyError("the server is being stopped"))
        for each in self.samplings.values():
            each.cancel()
        for task in self._tasks:
            task.cancel()
        # not a thread of a pool, for which the interpreter would wait
        ending = threading.Thread(target=self.registry.close, daemon=True)
        ending.start()
        deadline = time.monotonic() + GRACE
        while ending.is_alive() and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self.ended = not ending.is_alive()
        await asyncio.sleep(0.02)  # take the results that were handed over
        self.futures.write_again()
        await asyncio.to_thread(self.futures.close)
        self.store.close()

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine while requests are answered."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


@dataclass
class Samplers:
    """Sampling clients by the weights that they stand for. ephemeral: by sampler, the run and the client of snapshots
    that are in memory alone."""

    registry: EngineRegistry
    store: Store
    checkpoints: Checkpoints
    memory: Memory
    ephemeral: "OrderedDict[str, tuple[str, LocalSamplingClient]]" = field(default_factory=OrderedDict)
    _loaded: "OrderedDict[str, asyncio.Task[LocalSamplingClient]]" = field(default_factory=OrderedDict)

    def check(self, model_path: str | None, base_model: str | None, owner: Owner) -> Checkpoint | None:
        """The row of saved weights, None of a base model. Raises UnknownNameError, MissingError."""
        if model_path is not None:
            return self.checkpoints.existing(model_path, owner)
        models = self.registry.model_paths or {}
        if base_model not in models:
            raise UnknownNameError("model", str(base_model), models)
        return None

    async def client(self, model_path: str | None, base_model: str | None, owner: Owner) -> LocalSamplingClient:
        """A client on saved weights or a base model; raises as `check`, and ModelError where they cannot be loaded."""
        saved = self.check(model_path, base_model, owner)
        key = f"{saved.path} {saved.created}" if saved else f"base {base_model}"  # overwritten: loaded again
        if (known := self._loaded.get(key)) and _is_lost(known):
            del self._loaded[key]
        if key not in self._loaded:
            self._loaded[key] = asyncio.ensure_future(self._load(saved, base_model))
            while len(self._loaded) > KEPT_LOADED:
                self._loaded.popitem(last=False)
        self._loaded.move_to_end(key)
        task = self._loaded[key]
        try:
            return await asyncio.shield(task)
        except Exception:
            if self._loaded.get(key) is task:
                del self._loaded[key]
            raise

    async def _load(self, saved: Checkpoint | None, base_model: str | None) -> LocalSamplingClient:
        if saved is None:
            return await self.registry.submit(self.registry.sampler, None, base_model, of=base_model)
        of = saved.base_model
        with self.room(saved.size_bytes) as taken:  # its files are no smaller than its weights
            client: LocalSamplingClient = await self.registry.submit(self.registry.sampler, saved.path, None, of=of)
            taken.hand_over().release_with(client)
        return client

    def room(self, size: int, run: str | None = None) -> Reservation:
        """Room for weights of so many bytes. Where there is none, others go, least recently used first: those that can
        be loaded again, then the run's own that are in memory alone. Raises BusyError where that is not enough,
        TooLargeError where nothing is."""
        while True:
            try:
                return self.memory.take(SAMPLERS, size)
            except BusyError:
                own = next((name for name, (of, _) in self.ephemeral.items() if of == run), None)
                loaded = (key for key, task in self._loaded.items() if task.done() and not key.startswith("base "))
                if (key := next(loaded, None)) is not None:
                    del self._loaded[key]
                elif own is not None:
                    del self.ephemeral[own]
                else:
                    raise

    async def client_of(self, sampler_id: str, owner: Owner) -> LocalSamplingClient:
        """The client of a sampling session. Raises MissingError, also for weights that were in memory alone."""
        row = self.row(sampler_id, owner)
        if sampler_id in self.ephemeral:
            self.ephemeral.move_to_end(sampler_id)
            return self.ephemeral[sampler_id][1]
        if row.ephemeral:
            raise MissingError(
                f"the weights of sampling session {sampler_id} were in memory alone and are gone; save them with "
                "save_weights_for_sampler"
            )
        return await self.client(row.model_path, row.base_model, owner)

    def keep(self, sampler_id: str, run: str, client: LocalSamplingClient) -> None:
        """Keep weights that are in memory alone; of one run the UNSAVED that were last used."""
        self.ephemeral[sampler_id] = run, client
        snapshots = [name for name, (own, _) in self.ephemeral.items() if own == run]
        for name in snapshots[:-UNSAVED]:
            del self.ephemeral[name]

    def row(self, sampler_id: str, owner: Owner) -> Sampler:
        """A sampling session of this owner. Raises MissingError for any other."""
        row = self.store.get(Sampler, sampler_id, owner)
        if row is None:
            raise MissingError(f"there is no sampling session {sampler_id!r}; create one")
        return row


def _is_lost(task: "asyncio.Task[LocalSamplingClient]") -> bool:
    """Whether what was loaded went with the processes of its engine."""
    return task.done() and not task.cancelled() and not task.exception() and bool(task.result().lost)


def sampler_id(session: str, seq: int) -> str:
    """The id of a sampling session of a session."""
    return f"{session}:sample:{seq}"


def check_number(name: str, number: int, least: int = 0, most: int = LAST) -> None:
    """Raise RequestError for a number out of range: by default that of a run or sampler in its session."""
    if not least <= number <= most:
        raise RequestError(f"{name} = {number} is out of range: it must be from {least} to {most}")


def check_project(project: str | None) -> None:
    """Raise RequestError for a project, of which a server has none."""
    if project is not None:
        raise RequestError(f"project_id {project!r}: this server has no projects; leave it out (TINKER_PROJECT_ID)")


def metadata_text(metadata: Mapping[str, Any] | None) -> dict[str, str] | None:
    """Metadata as text. Raises RequestError for more of it than is kept."""
    if metadata is None:
        return None
    if sum(len(str(key)) + len(str(value)) for key, value in metadata.items()) > METADATA:
        raise RequestError(f"user_metadata has more than {METADATA:,} characters; keep it short")
    return {str(key): str(value) for key, value in metadata.items()}
