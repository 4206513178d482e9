"""Requests of training: runs, passes, steps and checkpoints, in the SDK's own types. Answers come later, by request id.

Runs on the event loop. Knows no HTTP and no mathematics.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from tinker import types

from kshot.checks import path_of
from kshot.errors import BusyError, KshotError, MissingError, RequestError
from vlm.local.clients import LocalSamplingClient, LocalTrainingClient, refuse
from vlm.local.registry import check_optimizer, check_seed
from vlm.server.checkpoints import check_ttl
from vlm.server.futures import PROTOBUF, Answer, error_answer, json_answer
from vlm.server.runs import LiveRun, Operation, when_done
from vlm.server.state import ServerState, check_number, kept
from vlm.server.tinker import wire
from vlm.server.tinker.sampling import sampler_id

RUNS = 4096  # in memory
WAITING_BYTES = 1 << 30  # of bodies of requests that wait, beside those that are their run's next


@dataclass(frozen=True)
class TrainingService:
    """The training side of a server. Every method that begins a request gives its id; sent again, it is the same."""

    state: ServerState

    def create_model(self, request: types.CreateModelRequest) -> str:
        """A new run with fresh LoRA weights; the id of the request."""
        lora = request.lora_config
        if lora is None:
            raise RequestError("create_model without lora_config: this server trains LoRA adapters alone; give one")
        check_optimizer(request.optimizer_config)
        check_seed(lora.seed)
        self.state.check_model(request.base_model)
        spec = self.state.registry.spec(
            lora.rank, train_mlp=lora.train_mlp, train_attn=lora.train_attn, train_unembed=lora.train_unembed
        )

        def make(model_id: str) -> Any:
            metadata = kept(request.user_metadata)
            return self.state.registry.submit(
                self.state.registry.start, model_id, request.base_model, spec, lora.seed, metadata
            )

        def answer(model_id: str) -> Answer:
            return json_answer({"model_id": model_id, "type": "create_model"})

        return self._begin(request.session_id, request.model_seq_id, make, answer, request.user_metadata)

    def load_weights(self, request: types.LoadWeightsRequest) -> str:
        """Weights of a checkpoint into a run, or into a new one; the id of the request."""
        refuse(weights_access_token=request.weights_access_token)
        check_optimizer(request.optimizer_config)
        saved = self.state.checkpoints.existing(request.path)

        def answer(model_id: str) -> Answer:
            return json_answer({"path": saved.path, "model_id": model_id, "type": "load_weights"})

        if request.model_id is not None:
            name = "load_state_with_optimizer" if request.optimizer else "load_state"
            return self.add(
                request.model_id,
                request.seq_id,
                lambda client: getattr(client, name)(saved.path),
                lambda _: answer(request.model_id or ""),
            )
        if request.session_id is None or request.model_seq_id is None:
            raise RequestError("load_weights needs model_id and seq_id, or session_id and model_seq_id for a new run")

        def make(model_id: str) -> Any:
            given = model_id, saved.path, request.base_model, kept(request.user_metadata)
            return self.state.registry.submit(self.state.registry.resume, *given, optimizer=request.optimizer)

        return self._begin(request.session_id, request.model_seq_id, make, answer, request.user_metadata)

    def add(
        self,
        model_id: str,
        seq: int | None,
        call: Callable[[LocalTrainingClient], Any],
        answer: Callable[[Any], Answer],
        size: int = 0,
    ) -> str:
        """A request of a run, of so many bytes; its id. Sent again, it is the same one."""
        if seq is None or seq < 1:
            raise RequestError(f"seq_id {seq} of a request of run {model_id}: a run's requests are numbered from 1")
        key = f"{model_id}/{seq}"
        if (known := self.state.futures.known(key)) is not None:
            return known
        run = self.live(model_id)
        run.check(seq)
        if size and seq != run.next_seq and sum(self.state.sizes.values()) + size > WAITING_BYTES:
            raise BusyError("too much data is waiting to be trained on; send it again later")
        request_id = self.state.futures.open(key)
        self.state.sizes[request_id] = size
        run.add(seq, Operation(request_id, call, answer))
        return request_id

    def save_weights_external(self, request: types.SaveWeightsExternalRequest) -> str:
        """Refused: checkpoints are files already, in PEFT's layout."""
        raise RequestError(
            "save_weights_external is not offered; checkpoints lie below --state as PEFT's safetensors: save_state"
        )

    def numbered(self, model_id: str, seq: int | None, begin: Callable[[], str]) -> str:
        """The id of the request that `begin` begins. One that it refuses takes its number all the same and is answered
        with the error: the client goes on counting, and what is numbered behind it would wait for ever."""
        try:
            return begin()
        except BusyError:  # it is sent again
            raise
        except KshotError as error:
            if model_id not in self.state.runs:
                raise
            refused = error

        def call(_: LocalTrainingClient) -> Any:
            raise refused

        return self.add(model_id, seq, call, json_answer)

    def refused(self, body: Any, fault: RequestError) -> dict[str, Any] | None:
        """What is answered to a body that is no request, where it names a run in memory and the number there: an error
        later, for the reason that `numbered` has. None for any other."""
        named = body if isinstance(body, dict) else {}
        run, seq = named.get("model_id"), named.get("seq_id")
        if not isinstance(run, str) or run not in self.state.runs or type(seq) is not int:
            return None

        def begin() -> str:
            raise fault

        return {"request_id": self.numbered(run, seq, begin), "model_id": run}

    def live(self, model_id: str) -> LiveRun:
        """A run in memory. Raises MissingError for another, and says what was last saved of it."""
        if model_id in self.state.runs:
            return self.state.runs[model_id]
        if self.state.store.run(model_id) is None:
            raise MissingError(f"there is no run {model_id!r}; create one")
        raise self.state.lost(model_id, "this server was started again, or its session is over")

    async def info(self, model_id: str) -> types.GetInfoResponse:
        """What a run is, as soon as its model is loaded."""
        run = self.live(model_id)
        await run.started.wait()
        if run.client is None:
            raise run.failure or MissingError(f"there is no run {model_id!r}")
        return run.client.get_info()

    def forward_backward(self, request: wire.ForwardBackward, size: int) -> str:
        """A pass, with or without a gradient, from a body of so many bytes; the id of the request."""

        def call(client: LocalTrainingClient) -> Any:
            method = client.forward if request.forward_only else client.forward_backward
            return method(request.data, request.loss_fn, request.loss_fn_config)

        def answer(output: types.ForwardBackwardOutput) -> Answer:
            if not request.forward_only and (run := self.state.runs.get(request.model_id)):
                run.loss += output.metrics["loss:sum"]
                run.examples += len(request.data)
                self.state.examples += len(request.data)
            return Answer(wire.forward_backward_output(output), PROTOBUF)

        return self.add(request.model_id, request.seq_id, call, answer, size)

    def optim_step(self, request: types.OptimStepRequest) -> str:
        """An optimizer step; the id of the request."""

        def answer(response: types.OptimStepResponse) -> Answer:
            if run := self.state.runs.get(request.model_id):
                run.steps += 1
                self.state.steps += 1
                with self.state.logged("a loss was not written"):  # the step was made all the same
                    self.state.store.add_loss(run.id, run.steps, run.loss / max(1, run.examples), run.examples)
                run.loss, run.examples = 0.0, 0
            return json_answer({"metrics": response.metrics, "type": "optim_step"})

        return self.add(
            request.model_id, request.seq_id, lambda client: client.optim_step(request.optim_params), answer
        )

    def save_weights(self, request: types.SaveWeightsRequest) -> str:
        """A checkpoint with optimizer; the id of the request."""
        name = _named(request.path, request.seq_id)
        path = path_of(request.model_id, "weights", name)
        check_ttl(request.ttl_seconds)
        metadata = kept(request.user_metadata)

        def answer(_: Any) -> Answer:
            self.state.checkpoints.note(path, request.ttl_seconds, metadata)
            return json_answer({"path": path, "type": "save_weights"})

        def call(client: LocalTrainingClient) -> Any:
            self.state.checkpoints.free(path)
            return client.save_state(name, overwrite=request.overwrite, user_metadata=metadata)

        return self.add(request.model_id, request.seq_id, call, answer)

    def save_weights_for_sampler(self, request: types.SaveWeightsForSamplerRequest) -> str:
        """Weights to sample from, in a checkpoint or (without a name) in memory; the id of the request."""
        refuse(kind=None if request.kind == "snapshot" else request.kind)
        if request.path is None:
            return self._snapshot(request)
        path = path_of(request.model_id, "sampler_weights", request.path)
        check_ttl(request.ttl_seconds)
        name, metadata = request.path, kept(request.user_metadata)

        def answer(_: Any) -> Answer:
            self.state.checkpoints.note(path, request.ttl_seconds, metadata)
            return json_answer({"path": path, "type": "save_weights_for_sampler"})

        def call(client: LocalTrainingClient) -> Any:
            self.state.checkpoints.free(path)
            return client.save_weights_for_sampler(name, user_metadata=metadata)

        return self.add(request.model_id, request.seq_id, call, answer)

    def _begin(
        self,
        session: str,
        seq: int,
        make: Callable[[str], Any],
        answer: Callable[[str], Answer],
        metadata: dict[str, Any] | None,
    ) -> str:
        """A new run, called as the SDK expects it to be; the id of the request."""
        check_number("model_seq_id", seq)
        self.state.active(session)
        model_id = f"{session}:train:{seq}"
        key = f"{model_id}/0"
        if (known := self.state.futures.known(key)) is not None:
            return known
        if self.state.store.run(model_id) is not None:
            raise RequestError(f"run {model_id} was made before; take the next model_seq_id")
        if len(self.state.runs) >= RUNS:
            raise BusyError(f"{RUNS} runs are in memory; finish a session")
        metadata = kept(metadata)
        request_id = self.state.futures.open(key)
        run = self.state.runs[model_id] = LiveRun(model_id, session, self.state.settle)

        def begun(result: Any) -> None:
            if isinstance(result, BaseException):
                self.state.runs.pop(model_id, None)
                run.end(result)
                return self.state.futures.finish(request_id, error_answer(result))
            base_model = result.get_info().model_name
            try:
                self.state.store.add_run(model_id, session, base_model, asdict(result.spec), metadata)
            except KshotError as error:
                return begun(error)
            if model_id in self.state.runs:  # else its session was finished meanwhile
                run.begin(result)
            return self.state.futures.finish(request_id, answer(model_id))

        when_done(make(model_id), begun)
        return request_id

    def _snapshot(self, request: types.SaveWeightsForSamplerRequest) -> str:
        if request.sampling_session_seq_id is None:
            raise RequestError("save_weights_for_sampler needs a path, or sampling_session_seq_id for unsaved weights")
        session = self.live(request.model_id).session
        name = sampler_id(session, request.sampling_session_seq_id)
        if self.state.futures.known(f"{request.model_id}/{request.seq_id}") is None and self.state.store.sampler(name):
            raise RequestError(f"sampling session {name} was made before; take the next sampling_session_seq_id")

        def answer(client: LocalSamplingClient) -> Answer:
            if self.state.store.sampler(name) is not None:
                raise RequestError(f"sampling session {name} was made before; take the next sampling_session_seq_id")
            self.state.store.add_sampler(name, session, client.get_base_model(), None, ephemeral=True)
            self.state.samplers.keep(name, request.model_id, client)
            return json_answer({"sampling_session_id": name, "type": "save_weights_for_sampler"})

        return self.add(
            request.model_id, request.seq_id, lambda client: client.save_weights_and_get_sampling_client(), answer
        )


def _named(name: str | None, seq: int | None) -> str:
    return f"{seq or 0:06d}" if name is None else name
