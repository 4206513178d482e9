"""Training requests of the Tinker protocol: an operation for each kind of request, and the service that queues them.

The way of a request: `routes` parses it → an operation → `TrainingService.submit` → the run's queue (`vlm.server.runs`)
→ the operation's `run`, on the run's client → its `reply`. Clients fetch the answer by the request id that `submit`
gives. Everything here runs on the event loop.
"""

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NoReturn

from tinker import types

from kshot.checks import check_ttl, path_of
from kshot.errors import BusyError, KshotError, MissingError, RequestError
from vlm.local.clients import LocalSamplingClient, LocalTrainingClient, recipients, refuse
from vlm.local.registry import check_optimizer, check_seed
from vlm.server.futures import PROTOBUF, Answer, error_answer, json_answer
from vlm.server.limits.memory import ADAPTERS, HELD, QUEUES, Reservation
from vlm.server.owners import Owner
from vlm.server.runs import LiveRun, Operation
from vlm.server.state import ServerState, check_number, metadata_text, sampler_id
from vlm.server.tables import Run, Sampler
from vlm.server.tinker import wire

log = logging.getLogger("kshot.server")
RUNS, OWN_RUNS = 4096, 1024  # in memory, and those of one key
SMALL = 1 << 14  # bytes of a request without data that waits


@dataclass(frozen=True)
class RunOperation(Operation):
    """A request of a run, by its model_id and seq_id, and whose it is."""

    state: ServerState
    request: Any
    owner: Owner

    def check(self) -> None:
        """Raise a KshotError for what is wrong with the request, before it is queued."""


class ForwardBackward(RunOperation):
    """A pass, with or without a gradient."""

    request: wire.ForwardBackward

    def run(self, client: LocalTrainingClient) -> Any:
        method = client.forward if self.request.forward_only else client.forward_backward
        return method(self.request.data, self.request.loss_fn, self.request.loss_fn_config)

    def reply(self, output: types.ForwardBackwardOutput) -> Answer:
        if not self.request.forward_only and (run := self.state.runs.get(self.request.model_id)):
            run.loss += output.metrics["loss:sum"]
            run.examples += len(self.request.data)
            self.state.examples[self.owner.name] += len(self.request.data)
        return Answer(wire.forward_backward_output(output), PROTOBUF)


class OptimStep(RunOperation):
    """An optimizer step."""

    request: types.OptimStepRequest

    def run(self, client: LocalTrainingClient) -> Any:
        return client.optim_step(self.request.optim_params)

    def reply(self, response: types.OptimStepResponse) -> Answer:
        if run := self.state.runs.get(self.request.model_id):
            run.steps += 1
            self.state.steps[self.owner.name] += 1
            try:
                self.state.store.add_loss(run.id, run.steps, run.loss / max(1, run.examples), run.examples)
            except KshotError:  # the step was made all the same
                log.exception("a loss was not written")
            run.loss, run.examples = 0.0, 0
        return json_answer({"metrics": response.metrics, "type": "optim_step"})


class SaveWeights(RunOperation):
    """A checkpoint with the optimizer. Without a path in the request, its name is the request's number."""

    kind, type = "weights", "save_weights"

    @property
    def name(self) -> str:
        return f"{self.request.seq_id or 0:06d}" if self.request.path is None else self.request.path

    @property
    def path(self) -> str:
        return path_of(self.request.model_id, self.kind, self.name)

    @property
    def metadata(self) -> dict[str, str] | None:
        return metadata_text(self.request.user_metadata)

    def check(self) -> None:
        _ = self.path
        check_ttl(self.request.ttl_seconds)
        _ = self.metadata

    def run(self, client: LocalTrainingClient) -> Any:
        self.state.checkpoints.remove_if_expired(self.path)
        return self.save(client)

    def save(self, client: LocalTrainingClient) -> Any:
        ttl, overwrite = self.request.ttl_seconds, self.request.overwrite
        return client.save_state(self.name, ttl, overwrite=overwrite, user_metadata=self.metadata)

    def reply(self, _: Any) -> Answer:
        self.state.checkpoints.register(self.path, self.metadata, self.owner.name)
        return json_answer({"path": self.path, "type": self.type})


class SaveWeightsForSampler(SaveWeights):
    """A checkpoint of the weights alone."""

    kind, type = "sampler_weights", "save_weights_for_sampler"

    def check(self) -> None:
        refuse(kind=None if self.request.kind == "snapshot" else self.request.kind)
        super().check()

    def save(self, client: LocalTrainingClient) -> Any:
        return client.save_weights_for_sampler(self.name, self.request.ttl_seconds, user_metadata=self.metadata)


class SaveWeightsExternal(SaveWeights):
    """The weights alone, for others to fetch: PEFT's files, encrypted where the request names recipients."""

    kind, type = "external_weights", "save_weights_external"

    @property
    def metadata(self) -> None:
        return None  # the request has none: the run's stays

    def check(self) -> None:
        super().check()
        recipients(self.request.age_encryption_recipients or ())

    def save(self, client: LocalTrainingClient) -> Any:
        to = self.request.age_encryption_recipients
        return client.save_weights_external(self.name, self.request.ttl_seconds, to)


class SnapshotForSampler(RunOperation):
    """A sampling session on the weights as they are now, in memory alone."""

    request: types.SaveWeightsForSamplerRequest

    def check(self) -> None:
        refuse(kind=None if self.request.kind == "snapshot" else self.request.kind)
        if self.request.sampling_session_seq_id is None:
            raise RequestError("save_weights_for_sampler needs a path, or sampling_session_seq_id for unsaved weights")
        check_number("sampling_session_seq_id", self.request.sampling_session_seq_id)
        self.state.retention.check(Sampler, self.owner.name)

    def run(self, client: LocalTrainingClient) -> Any:
        taken = self.state.samplers.room(client.snapshot_bytes, self.request.model_id)

        def made(call: "Future[LocalSamplingClient]") -> None:
            with taken:
                if not (call.cancelled() or call.exception()):
                    taken.hand_over().release_with(call.result())

        call = client.save_weights_and_get_sampling_client()
        call.future().add_done_callback(made)
        return call

    def reply(self, client: LocalSamplingClient) -> Answer:
        session = self.request.model_id.partition(":")[0]
        name = sampler_id(session, self.request.sampling_session_seq_id or 0)
        if self.state.store.get(Sampler, name) is not None:
            raise RequestError(f"sampling session {name} was made before; take the next sampling_session_seq_id")
        row = Sampler(name, session, client.get_base_model(), ephemeral=True, owner=self.owner.name)
        self.state.retention.add(row)
        self.state.samplers.keep(name, self.request.model_id, client)
        return json_answer({"sampling_session_id": name, "type": "save_weights_for_sampler"})


class LoadWeights(RunOperation):
    """The weights of a checkpoint into a run that there is."""

    request: types.LoadWeightsRequest

    def check(self) -> None:
        refuse(weights_access_token=self.request.weights_access_token)
        check_optimizer(self.request.optimizer_config)
        self.state.checkpoints.existing(self.request.path, self.owner)

    def run(self, client: LocalTrainingClient) -> Any:
        return (client.load_state_with_optimizer if self.request.optimizer else client.load_state)(self.request.path)

    def reply(self, _: Any) -> Answer:
        return json_answer({"path": self.request.path, "model_id": self.request.model_id, "type": "load_weights"})


@dataclass(frozen=True)
class Refused(RunOperation):
    """A request that was refused. It takes its number all the same and is answered with the error: the client goes on
    counting, and what is numbered behind it would wait for ever."""

    error: KshotError

    def check(self) -> None:
        raise self.error

    def run(self, client: LocalTrainingClient) -> NoReturn:
        raise self.error

    def reply(self, result: Any) -> NoReturn:
        raise self.error


@dataclass(frozen=True)
class TrainingService:
    """Takes training requests: gives the id of each, the same one when it is sent again."""

    state: ServerState

    def submit(self, operation: RunOperation, parsed: Reservation | None = None) -> str:
        """Queue an operation of a run; parsed: what its data takes, where it has any.

        Raises MissingError for a run that is not in memory or another owner's, RequestError for a number that cannot
        be, BusyError where too much waits. Any other mistake in a request of a run in memory is its answer: see
        `Refused`.
        """
        model_id, seq, owner = operation.request.model_id, operation.request.seq_id, operation.owner
        try:
            operation.check()
        except KshotError as error:
            if self.state.live_run(model_id, owner) is None:
                raise
            operation, parsed = Refused(self.state, operation.request, owner, error), None
        if seq is None:
            raise RequestError(f"a request of run {model_id} needs its number, seq_id, from 1 on")
        check_number("seq_id", seq, 1)
        key = f"{model_id}/{seq}"
        if (known := self.state.futures.id_of(key, owner)) is not None:
            return known
        run = self._live_run(model_id, owner)
        run.check(seq)
        with parsed or self.state.memory.take(QUEUES, SMALL) as taken:
            taken.become(QUEUES if seq == run.next_seq else HELD)
            request_id = self.state.futures.open(key, owner, taken)
        run.add(seq, request_id, operation)
        return request_id

    def create(self, request: types.CreateModelRequest, owner: Owner) -> str:
        """Begin a run with fresh LoRA weights. Raises a KshotError for a mistake in the request."""
        lora, registry = request.lora_config, self.state.registry
        if lora is None:
            raise RequestError("create_model without lora_config: this server trains LoRA adapters alone; give one")
        check_optimizer(request.optimizer_config)
        check_seed(lora.seed)
        self.state.samplers.check(None, request.base_model, owner)
        flags = {"train_mlp": lora.train_mlp, "train_attn": lora.train_attn, "train_unembed": lora.train_unembed}
        spec = registry.spec(lora.rank, **flags)
        start = partial(registry.start, base_model=request.base_model, spec=spec, seed=lora.seed)
        return self._begin(request, owner, start, (request.base_model, asdict(spec)), type="create_model")

    def resume(self, request: types.LoadWeightsRequest, owner: Owner) -> str:
        """Begin a run with the weights of a checkpoint: load_weights without a model_id. Raises as `create`."""
        LoadWeights(self.state, request, owner).check()
        if request.session_id is None or request.model_seq_id is None:
            raise RequestError("load_weights needs model_id and seq_id, or session_id and model_seq_id for a new run")
        resume, saved = self.state.registry.resume, self.state.checkpoints.existing(request.path, owner)
        start = partial(resume, path=request.path, base_model=request.base_model, optimizer=request.optimizer)
        adapter = saved.base_model, saved.lora
        return self._begin(request, owner, start, adapter, path=request.path, type="load_weights")

    def _begin(
        self,
        request: Any,
        owner: Owner,
        start: Callable[..., LocalTrainingClient],
        adapter: tuple[str, Mapping[str, Any]],
        **answer: str,
    ) -> str:
        """start: makes the run's client on the engine's thread. adapter: of which model it is, and what it covers. The
        run is called as the SDK expects it to be."""
        session, seq = request.session_id or "", request.model_seq_id or 0
        check_number("model_seq_id", seq)
        self.state.check_session(session, owner)
        model_id = f"{session}:train:{seq}"
        key = f"{model_id}/0"
        if (known := self.state.futures.id_of(key, owner)) is not None:
            return known
        if self.state.store.get(Run, model_id) is not None:
            raise RequestError(f"run {model_id} was made before; take the next model_seq_id")
        if len(self.state.runs) >= RUNS:
            raise BusyError(f"{RUNS} runs are in memory; finish a session")
        own = sum(run.owner == owner.name for run in self.state.runs.values())
        if owner.name is not None and own >= OWN_RUNS:
            raise BusyError(f"{OWN_RUNS} runs of this key are in memory; finish a session")
        self.state.retention.check(Run, owner.name)
        metadata = metadata_text(request.user_metadata)
        futures, registry, memory = self.state.futures, self.state.registry, self.state.memory
        with memory.take(QUEUES, SMALL) as taken:
            request_id = futures.open(key, owner, taken)
        live = LiveRun(model_id, session, futures.finish, futures.begun, owner.name)
        run = self.state.runs[model_id] = live

        async def begin() -> None:
            try:
                size = await registry.submit(registry.run_bytes, *adapter, of=adapter[0])
                with memory.take(ADAPTERS, size) as taken:
                    client = await registry.submit(start, model_id, user_metadata=metadata, of=adapter[0])
                    taken.hand_over().release_with(client)
                base_model, lora = client.get_info().model_name, asdict(client.spec)
                self.state.retention.add(Run(model_id, session, base_model, lora, metadata, owner=owner.name))
            except Exception as error:
                self.state.runs.pop(model_id, None)
                run.end(error)
                futures.finish(request_id, error_answer(error))
                return
            if model_id in self.state.runs:  # else its session was finished meanwhile
                run.begin(client)
            futures.finish(request_id, json_answer({"model_id": model_id, **answer}))

        self.state.background(begin())
        return request_id

    def refuse_body(self, body: Any, owner: Owner, error: RequestError) -> tuple[str, str] | None:
        """Request id and run of a body that is no request but names a run of this owner in memory and a number there:
        it is answered as `Refused`. None for any other."""
        fields = body if isinstance(body, dict) else {}
        run, seq = fields.get("model_id"), fields.get("seq_id")
        if not isinstance(run, str) or self.state.live_run(run, owner) is None or type(seq) is not int:
            return None
        return self.submit(Refused(self.state, wire.RequestNumber(run, seq), owner, error)), run

    async def info(self, model_id: str, owner: Owner) -> types.GetInfoResponse:
        """What a run is, as soon as its model is loaded. Raises MissingError for one that is not in memory."""
        run = self._live_run(model_id, owner)
        await run.started.wait()
        if run.client is None:
            raise run.failure or MissingError(f"there is no run {model_id!r}")
        return run.client.get_info()

    def _live_run(self, model_id: str, owner: Owner) -> LiveRun:
        """A run in memory. Raises MissingError for another, and says what was last saved of it."""
        if (run := self.state.live_run(model_id, owner)) is None:
            raise self.state.missing_run(model_id, owner)
        return run
