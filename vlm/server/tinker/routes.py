"""The Tinker protocol's endpoints: bodies → calls of the services → JSON. Bodies are the SDK's own types (tinker 0.38).

How a training request goes on from here: `vlm.server.tinker.training`.
"""

import asyncio
import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Body, Header, Query, Request, Response
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from tinker import types

from kshot.checks import KINDS, check_ttl
from kshot.errors import LostError, MissingError, RequestError
from vlm.server.futures import JSON, PROTOBUF, Answer, error_body, json_answer
from vlm.server.guard import PARSED, Route, Signer
from vlm.server.limits import images
from vlm.server.limits.memory import ANSWERS, Reservation
from vlm.server.owners import Owned, Owner
from vlm.server.state import ServerState, check_project
from vlm.server.tables import Checkpoint, Row, Run, Sampler, Session
from vlm.server.tinker import downloads, training, wire
from vlm.server.tinker.sampling import SamplingService
from vlm.server.tinker.training import TrainingService

T = TypeVar("T")
PATIENCE = 20.0  # seconds for which a request for an answer is held; the SDK waits 45
LARGE = 1 << 20  # bytes of a body that is parsed beside the event loop
PAGE = 4 << 20  # characters of a list after which no more rows are added; the cursor's limit says how many there are
AT_ONCE = 50  # rows of a list that are read at once; then others are served
# On loopback zstd costs more than it saves. In parallel the SDK sends the first part of a batch last, and the others
# would take memory that the first then lacks.
FEATURES = {"proto_compress_fwdbwd": False, "parallel_fwdbwd_chunks": False}
DYNAMIC = {"sample_cancel_enabled": True}
TYPES = dict(zip(KINDS, ("training", "sampler", "external"), strict=True))  # our folders → the protocol's words
OWNER = "local"
Limit = Annotated[int, Query(ge=1, le=1000)]
Offset = Annotated[int, Query(ge=0, le=2**31)]
Scope = Literal["owned", "accessible"]
SAMPLE = TypeAdapter(types.SampleRequest)
BINARY = {"requestBody": {"required": True, "content": {PROTOBUF: {"schema": {"type": "string", "format": "binary"}}}}}
SAMPLE_SCHEMA = {"$ref": "#/components/schemas/SampleRequest"}  # which `vlm.server.app` puts there
SAMPLE_BODY = {"requestBody": {"required": True, "content": {JSON: {"schema": SAMPLE_SCHEMA}}}}


class StrictBody(BaseModel):
    """A body of which no field is ignored."""

    model_config = ConfigDict(extra="forbid")


class Finish(StrictBody):
    reason: dict[str, Any]
    detail: str | None = None


class Cancel(StrictBody):
    request_id: str


class Ttl(StrictBody):
    ttl_seconds: int | None


class WeightsInfo(StrictBody):
    tinker_path: str


def routes(
    state: ServerState, training_service: TrainingService, sampling_service: SamplingService, signer: Signer
) -> APIRouter:
    """The router of one server."""
    router = APIRouter(prefix="/api/v1", route_class=Route)
    _server(router, state)
    one_list = asyncio.Lock()
    _sessions(router, state, one_list)
    _training(router, state, training_service)
    _sampling(router, state, sampling_service)
    _answers(router, state)
    _lists(router, state, one_list)
    downloads.add(router, state, signer)
    return router


def _server(router: APIRouter, state: ServerState) -> None:
    @router.get("/healthz", openapi_extra={"security": []})
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @router.get("/get_server_capabilities")
    async def get_server_capabilities() -> dict[str, Any]:
        engines = state.registry.engines  # of models that are loaded, whose context is known
        loaded = {name: engines[name].model.context if name in engines else None for name in state.models}
        flags = {"trainable": True, "sampleable": True}
        models = [types.SupportedModel(model_name=n, max_context_length=c, **flags) for n, c in loaded.items()]
        return {"supported_models": [each.model_dump() for each in models]}

    @router.post("/client/config")
    async def client_config(request: types.ClientConfigRequest) -> dict[str, Any]:
        return FEATURES

    @router.post("/client/dynamic_config")
    async def dynamic_config(request: types.ClientConfigRequest) -> dict[str, Any]:
        return DYNAMIC

    @router.post("/telemetry")
    async def telemetry(request: Annotated[dict[str, Any], Body()]) -> dict[str, str]:
        return {"status": "accepted"}  # nothing of it is kept


def _sessions(router: APIRouter, state: ServerState, turn: asyncio.Lock) -> None:
    @router.post("/create_session")
    async def create_session(request: types.CreateSessionRequest, owner: Owned) -> dict[str, Any]:
        return {"type": "create_session", "session_id": state.create_session(request, owner)}

    @router.post("/session_heartbeat")
    async def heartbeat(request: types.SessionHeartbeatRequest, owner: Owned) -> dict[str, str]:
        state.heartbeat(request.session_id, owner)
        return {"type": "session_heartbeat"}

    @router.post("/sessions/{session_id}/finish", status_code=204)
    async def finish(session_id: str, request: Finish, owner: Owned) -> None:
        state.finish_session(session_id, {"reason": request.reason, "detail": request.detail}, owner)

    @router.get("/sessions")
    async def sessions(
        owner: Owned,
        limit: Limit = 20,
        offset: Offset = 0,
        access_scope: Scope = "owned",
        project_id: str | None = None,
    ) -> dict[str, Any]:
        check_project(project_id)
        read = partial(state.store.newest, Session, owner=owner)
        ids, _ = await _page(turn, read, lambda row: row.id, limit, offset)
        return {"sessions": ids}

    @router.get("/sessions/{session}")
    async def session(session: str, owner: Owned, access_scope: Scope = "owned") -> dict[str, Any]:
        row = _existing(state, Session, session, owner)
        return {
            "training_run_ids": [run.id for run in state.store.of_session(Run, session)],
            "sampler_ids": [sampler.id for sampler in state.store.of_session(Sampler, session)],
            "user_metadata": row.user_metadata,
            "display_name": row.display_name,
        }


def _training(router: APIRouter, state: ServerState, service: TrainingService) -> None:
    def submit(operation: training.RunOperation, parsed: Reservation | None = None) -> dict[str, Any]:
        return accepted(service.submit(operation, parsed), operation.request.model_id)

    @router.post("/create_model")
    async def create_model(request: types.CreateModelRequest, owner: Owned) -> dict[str, Any]:
        return accepted(service.create(request, owner))

    @router.post("/get_info")
    async def get_info(request: types.GetInfoRequest, owner: Owned) -> dict[str, Any]:
        return (await service.info(request.model_id, owner)).model_dump(mode="json")

    @router.post("/forward_backward", openapi_extra=BINARY)
    async def forward_backward(request: Request, owner: Owned) -> dict[str, Any]:
        body, taken = await request.body(), request.scope[PARSED]
        try:
            parsed = await _parsed(wire.parse_forward_backward, body)
            await _take_images(taken, [datum.model_input for datum in parsed.data])
        except RequestError as error:
            return submit(training.Refused(state, wire.number_of(body), owner, error))
        return submit(training.ForwardBackward(state, parsed, owner), taken)

    @router.post("/optim_step")
    async def optim_step(request: types.OptimStepRequest, owner: Owned) -> dict[str, Any]:
        return submit(training.OptimStep(state, request, owner))

    @router.post("/save_weights")
    async def save_weights(request: types.SaveWeightsRequest, owner: Owned) -> dict[str, Any]:
        return submit(training.SaveWeights(state, request, owner))

    @router.post("/save_weights_for_sampler")
    async def save_weights_for_sampler(request: types.SaveWeightsForSamplerRequest, owner: Owned) -> dict[str, Any]:
        kind = training.SnapshotForSampler if request.path is None else training.SaveWeightsForSampler
        return submit(kind(state, request, owner))

    @router.post("/save_weights_external")
    async def save_weights_external(request: types.SaveWeightsExternalRequest, owner: Owned) -> dict[str, Any]:
        return submit(training.SaveWeightsExternal(state, request, owner))

    @router.post("/load_weights")
    async def load_weights(request: types.LoadWeightsRequest, owner: Owned) -> dict[str, Any]:
        if request.model_id is None:
            return accepted(service.resume(request, owner))
        return submit(training.LoadWeights(state, request, owner))


async def _parsed(parse: Callable[[bytes], T], body: bytes) -> T:
    return parse(body) if len(body) < LARGE else await asyncio.to_thread(parse, body)


async def _take_images(taken: Reservation, inputs: Sequence[types.ModelInput]) -> None:
    """Take what the images of a request need as well. Raises TooLargeError, BusyError."""
    chunks = [chunk.data for each in inputs for chunk in each.chunks if isinstance(chunk, types.ImageChunk)]
    if chunks:
        taken.grow(await images.decoding_bytes(chunks))


def accepted(request_id: str, model_id: str | None = None) -> dict[str, Any]:
    """What a request is answered with whose result is fetched later."""
    return {"request_id": request_id, "model_id": model_id}


def _sampling(router: APIRouter, state: ServerState, service: SamplingService) -> None:
    @router.post("/create_sampling_session")
    async def create_sampling_session(request: types.CreateSamplingSessionRequest, owner: Owned) -> dict[str, str]:
        name = service.create_sampling_session(request, owner)
        return {"type": "create_sampling_session", "sampling_session_id": name}

    @router.post("/join_sampling_session")
    async def join_sampling_session(request: types.JoinSamplingSessionRequest, owner: Owned) -> dict[str, Any]:
        state.samplers.row(request.sampling_session_id, owner)
        number = state.store.next_clone(request.sampling_session_id)
        return {"type": "join_sampling_session", "client_counter": number}

    @router.get("/samplers/{sampler}")
    async def sampler(sampler: str, owner: Owned) -> dict[str, Any]:
        row = _existing(state, Sampler, sampler, owner)
        return {"sampler_id": row.id, "base_model": row.base_model, "model_path": row.model_path}

    @router.post("/asample", openapi_extra=SAMPLE_BODY)
    async def asample(request: Request, owner: Owned) -> dict[str, Any]:
        body = await request.body()
        # not by FastAPI: images are large, and JSON is read once
        parsed = await _parsed(_sample_request, body)
        await _take_images(request.scope[PARSED], [parsed.prompt])
        request_id, sequence_ids = service.sample(parsed, request.scope[PARSED], owner)
        return {"request_id": request_id, "sample_sequence_ids": sequence_ids}

    @router.post("/cancel_future", status_code=204)
    async def cancel_future(request: Cancel, owner: Owned) -> None:
        if request.request_id in state.futures.pending(owner):
            service.cancel(request.request_id)
            for run in state.runs.values():
                run.cancel(request.request_id)


def _sample_request(body: bytes) -> types.SampleRequest:
    try:
        request = SAMPLE.validate_json(body)
    except ValidationError as error:
        raise RequestError(first_fault(error.errors(include_url=False, include_input=False))) from error
    for number, chunk in enumerate(request.prompt.chunks):
        if not isinstance(chunk, types.EncodedTextChunk | types.ImageChunk):
            raise RequestError(f"prompt chunk {number} is {chunk.type}; only text and images are supported")
    return request


def first_fault(errors: Any) -> str:
    """The first thing that is wrong with a body, in one line."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return f"the body is no JSON: {first['ctx']['error']}"
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return " ".join(f"{place or 'body'}: {first['msg']}{more}".split())


def _answers(router: APIRouter, state: ServerState) -> None:
    @router.post("/retrieve_future", responses={200: {"content": {PROTOBUF: {}}}})
    async def retrieve_future(
        request: types.FutureRetrieveRequest,
        http_request: Request,
        owner: Owned,
        x_tinker_request_type: Annotated[str | None, Header()] = None,
    ) -> Response:
        try:
            answer = await state.futures.wait(request.request_id, PATIENCE, owner)
        except LostError as error:
            if x_tinker_request_type in (None, "Sample"):
                raise  # the SDK then sends the sample again; of a run's requests it would only say that one is broken
            return _response(json_answer(error_body(error)))
        if answer is None:
            waiting = {"type": "try_again", "request_id": request.request_id, "queue_state": "active"}
            return _response(json_answer(waiting))
        state.futures.retrieved(request.request_id)
        http_request.scope[PARSED].become(ANSWERS, len(answer.content), forced=True)  # until it is sent
        return _response(answer)


def _response(answer: Answer) -> Response:
    return Response(answer.content, media_type=answer.content_type)


def _lists(router: APIRouter, state: ServerState, turn: asyncio.Lock) -> None:
    @router.get("/training_runs")
    async def training_runs(
        owner: Owned,
        limit: Limit = 20,
        offset: Offset = 0,
        access_scope: Scope = "owned",
        project_id: str | None = None,
    ) -> Response:
        check_project(project_id)
        read = partial(state.store.newest, Run, owner=owner)
        rows, limit = await _page(turn, read, partial(_run, state), limit, offset)
        cursor = _cursor(offset, limit, state.store.count(Run, owner))
        return _response(json_answer({"training_runs": rows, "cursor": cursor}))

    @router.get("/training_runs/{run}")
    async def training_run(run: str, owner: Owned, access_scope: Scope = "owned") -> dict[str, Any]:
        return _run(state, _existing(state, Run, run, owner))

    @router.get("/training_runs/{run}/checkpoints")
    async def checkpoints_of(run: str, owner: Owned, limit: Limit = 1000, offset: Offset = 0) -> Response:
        _existing(state, Run, run, owner)
        read = partial(state.store.checkpoints, run, owner=owner)
        rows, limit = await _page(turn, read, _checkpoint, limit, offset)
        cursor = _cursor(offset, limit, state.store.count_checkpoints(run))
        return _response(json_answer({"checkpoints": rows, "cursor": cursor}))

    @router.post("/weights_info")
    async def weights_info(request: WeightsInfo, owner: Owned) -> dict[str, Any]:
        row = state.checkpoints.existing(request.tinker_path, owner)
        flags = {name: row.lora[name] for name in ("train_unembed", "train_mlp", "train_attn")}
        return {"base_model": row.base_model, "is_lora": True, "lora_rank": row.lora["rank"], **flags}

    def own(run: str, kind: str, name: str, owner: Owner) -> str:
        return state.checkpoints.existing(f"tinker://{run}/{kind}/{name}", owner, change=True).path

    @router.get("/checkpoints")
    async def checkpoints(owner: Owned, limit: Limit = 100, offset: Offset = 0) -> Response:
        read = partial(state.store.checkpoints, None, owner=owner)
        rows, limit = await _page(turn, read, _checkpoint, limit, offset)
        cursor = _cursor(offset, limit, state.store.count(Checkpoint, owner))
        return _response(json_answer({"checkpoints": rows, "cursor": cursor}))

    @router.delete("/training_runs/{run}/checkpoints/{kind}/{name}", status_code=204)
    async def delete(run: str, kind: str, name: str, owner: Owned) -> None:
        state.checkpoints.remove(own(run, kind, name, owner))

    @router.put("/training_runs/{run}/checkpoints/{kind}/{name}/ttl", status_code=204)
    async def set_ttl(run: str, kind: str, name: str, request: Ttl, owner: Owned) -> None:
        check_ttl(request.ttl_seconds)
        state.checkpoints.set_ttl(own(run, kind, name, owner), request.ttl_seconds)

    @router.post("/training_runs/{run}/checkpoints/{kind}/{name}/publish", status_code=204)
    async def publish(run: str, kind: str, name: str, owner: Owned) -> None:
        state.store.update(Checkpoint, own(run, kind, name, owner), public=True)

    @router.delete("/training_runs/{run}/checkpoints/{kind}/{name}/publish", status_code=204)
    async def unpublish(run: str, kind: str, name: str, owner: Owned) -> None:
        state.store.update(Checkpoint, own(run, kind, name, owner), public=False)


async def _page(
    turn: asyncio.Lock, read: Callable[[int, int], list[Row]], make: Callable[[Row], Any], limit: int, offset: int
) -> tuple[list[Any], int]:
    """At most `limit` rows as JSON has them, and the limit: the number of rows where PAGE is less. read: of rows, so
    many from a place on. turn: one list is made at a time, so that many of them hold up nobody else."""
    page, size = list[Any](), 0
    async with turn:
        while len(page) < limit and size < PAGE:
            asked = min(AT_ONCE, limit - len(page))
            rows = [make(row) for row in read(asked, offset + len(page))]
            page += rows
            size += sum(len(json.dumps(row)) for row in rows)
            if len(rows) < asked:
                return page, limit
            await asyncio.sleep(0)
    return page, len(page)


def _cursor(offset: int, limit: int, total: int) -> dict[str, int]:
    return {"offset": offset, "limit": limit, "total_count": total}


def _existing(state: ServerState, kind: type[Row], key: str, owner: Owner) -> Row:
    row = state.store.get(kind, key, owner)
    if row is None:
        raise MissingError(f"there is no {kind.__name__.lower()} {key!r}")
    return row


def _run(state: ServerState, row: Run) -> dict[str, Any]:
    live = state.runs.get(row.id)
    last, last_sampler = (state.store.last_checkpoint(row.id, kind) for kind in KINDS[:2])
    return {
        "training_run_id": row.id,
        "base_model": row.base_model,
        "model_owner": OWNER,
        "is_lora": True,
        "corrupted": False,
        "lora_rank": row.lora["rank"],
        "last_request_time": _time(live.last_request if live else row.last_request),
        "last_checkpoint": last and _checkpoint(last),
        "last_sampler_checkpoint": last_sampler and _checkpoint(last_sampler),
        "user_metadata": row.user_metadata,
    }


def _checkpoint(row: Checkpoint) -> dict[str, Any]:
    return {
        "checkpoint_id": f"{row.kind}/{row.name}",
        "checkpoint_type": TYPES[row.kind],
        "time": _time(row.created),
        "tinker_path": row.path,
        "size_bytes": row.size_bytes,
        "public": row.public,
        "user_metadata": row.user_metadata,
        "expires_at": None if row.expires is None else _time(row.expires),
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
