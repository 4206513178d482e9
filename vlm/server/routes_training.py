"""The Tinker protocol's endpoints of sessions, training and sampling. Turns bodies into calls; knows no order and no
weights. Requests and responses are the SDK's own types (tinker 0.38)."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Request, Response
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from tinker import types

from kshot_errors import LostError, RequestError
from vlm.server import wire
from vlm.server.answers import JSON, PROTOBUF, error_body
from vlm.server.bodies import Route
from vlm.server.core import Core
from vlm.server.sampling import Samples
from vlm.server.training import Training

PATIENCE = 20.0  # seconds for which a request for an answer is held; the SDK waits 45
FEATURES = {"proto_compress_fwdbwd": False, "parallel_fwdbwd_chunks": True}  # on loopback zstd costs more than it saves
DYNAMIC = {"sample_cancel_enabled": True}


class Plain(BaseModel):
    """A body of ours: nothing in it is ignored."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Finish(Plain):
    reason: dict[str, Any]
    detail: str | None = None


class Cancel(Plain):
    request_id: str


class Join(Plain):
    sampling_session_id: str
    type: str = "join_sampling_session"


class Heartbeat(Plain):
    session_id: str
    type: str = "session_heartbeat"


SAMPLE = TypeAdapter(types.SampleRequest)
BINARY = {"requestBody": {"required": True, "content": {PROTOBUF: {"schema": {"type": "string", "format": "binary"}}}}}
SAMPLE_SCHEMA = {"$ref": "#/components/schemas/SampleRequest"}  # which `vlm.server.description` puts there
SAMPLE_BODY = {"requestBody": {"required": True, "content": {JSON: {"schema": SAMPLE_SCHEMA}}}}


def routes(core: Core, training: Training, samples: Samples) -> APIRouter:
    """The router of one server."""
    router = APIRouter(prefix="/api/v1", route_class=Route)
    _sessions(router, core)
    _training(router, training)
    _sampling(router, core, samples)
    _answers(router, core)
    return router


def _sessions(router: APIRouter, core: Core) -> None:
    @router.post("/client/config")
    async def client_config(request: types.ClientConfigRequest) -> dict[str, Any]:
        return FEATURES

    @router.post("/client/dynamic_config")
    async def dynamic_config(request: types.ClientConfigRequest) -> dict[str, Any]:
        return DYNAMIC

    @router.post("/telemetry")
    async def telemetry(request: Annotated[dict[str, Any], Body()]) -> dict[str, str]:
        return {"status": "accepted"}  # nothing of it is kept

    @router.post("/create_session")
    async def create_session(request: types.CreateSessionRequest) -> dict[str, Any]:
        return {"type": "create_session", "session_id": core.create_session(request)}

    @router.post("/session_heartbeat")
    async def heartbeat(request: Heartbeat) -> dict[str, str]:
        core.heartbeat(request.session_id)
        return {"type": "session_heartbeat"}

    @router.post("/sessions/{session_id}/finish", status_code=204)
    async def finish(session_id: str, request: Finish) -> None:
        core.finish_session(session_id, {"reason": request.reason, "detail": request.detail})


def _training(router: APIRouter, training: Training) -> None:
    @router.post("/create_model")
    async def create_model(request: types.CreateModelRequest) -> dict[str, Any]:
        return _later(training.create_model(request))

    @router.post("/get_info")
    async def get_info(request: types.GetInfoRequest) -> dict[str, Any]:
        return (await training.info(request.model_id)).model_dump(mode="json")

    @router.post("/forward_backward", openapi_extra=BINARY)
    async def forward_backward(request: Request) -> dict[str, Any]:
        body = await request.body()
        try:
            parsed = wire.parse_forward_backward(body) if len(body) < LARGE else await _parse(body)
        except RequestError as error:
            run, seq = wire.numbers_of(body)
            return _later(training.numbered(run, seq, partial(_refuse, error)), run)
        return _later(training.forward_backward(parsed, len(body)), parsed.model_id)

    @router.post("/optim_step")
    async def optim_step(request: types.OptimStepRequest) -> dict[str, Any]:
        return _begun(training, request, training.optim_step)

    @router.post("/save_weights")
    async def save_weights(request: types.SaveWeightsRequest) -> dict[str, Any]:
        return _begun(training, request, training.save_weights)

    @router.post("/save_weights_for_sampler")
    async def save_weights_for_sampler(request: types.SaveWeightsForSamplerRequest) -> dict[str, Any]:
        return _begun(training, request, training.save_weights_for_sampler)

    @router.post("/save_weights_external")
    async def save_weights_external(request: types.SaveWeightsExternalRequest) -> dict[str, Any]:
        return _begun(training, request, training.save_weights_external)

    @router.post("/load_weights")
    async def load_weights(request: types.LoadWeightsRequest) -> dict[str, Any]:
        return _begun(training, request, training.load_weights)


LARGE = 1 << 20  # bytes of a body that is parsed beside the event loop


def _refuse(error: RequestError) -> str:
    raise error


def _begun(training: Training, request: Any, begin: Callable[[Any], str]) -> dict[str, Any]:
    """A request of a run by its number, if it names one."""
    if request.model_id is None:
        return _later(begin(request))
    return _later(training.numbered(request.model_id, request.seq_id, partial(begin, request)), request.model_id)


async def _parse(body: bytes) -> wire.ForwardBackward:
    return await asyncio.to_thread(wire.parse_forward_backward, body)


def _sampling(router: APIRouter, core: Core, samples: Samples) -> None:
    @router.post("/create_sampling_session")
    async def create_sampling_session(request: types.CreateSamplingSessionRequest) -> dict[str, str]:
        return {"type": "create_sampling_session", "sampling_session_id": samples.create_sampling_session(request)}

    @router.post("/join_sampling_session")
    async def join_sampling_session(request: Join) -> dict[str, Any]:
        core.samplers.check_session(request.sampling_session_id)
        number = core.store.next_clone(request.sampling_session_id)
        return {"type": "join_sampling_session", "client_counter": number}

    @router.post("/asample", openapi_extra=SAMPLE_BODY)
    async def asample(request: Request) -> dict[str, Any]:
        body = await request.body()
        # not by FastAPI: images are large, and JSON is read once
        asked = _sample_request(body) if len(body) < LARGE else await asyncio.to_thread(_sample_request, body)
        request_id, sequence_ids = samples.sample(asked)
        return {"request_id": request_id, "sample_sequence_ids": sequence_ids}

    @router.post("/cancel_future", status_code=204)
    async def cancel_future(request: Cancel) -> None:
        samples.cancel(request.request_id)


def _answers(router: APIRouter, core: Core) -> None:
    @router.post("/retrieve_future")
    async def retrieve_future(
        request: types.FutureRetrieveRequest, x_tinker_request_type: Annotated[str | None, Header()] = None
    ) -> Response:
        try:
            answer = await core.futures.wait(request.request_id, PATIENCE)
        except LostError as error:
            if x_tinker_request_type in (None, "Sample"):
                raise  # the SDK then asks for the sample anew; of a run's requests it would only say that one is broken
            return Response(_TEXTS.dump_json(error_body(error)), media_type=JSON)
        if answer is None:
            waiting = {"type": "try_again", "request_id": request.request_id, "queue_state": "active"}
            return Response(_TEXTS.dump_json(waiting), media_type=JSON)
        core.futures.retrieved(request.request_id)
        return Response(answer.content, media_type=answer.content_type)


_TEXTS = TypeAdapter(dict[str, str])


def _later(request_id: str, model_id: str | None = None) -> dict[str, Any]:
    return {"request_id": request_id, "model_id": model_id}


def _sample_request(body: bytes) -> types.SampleRequest:
    try:
        asked = SAMPLE.validate_json(body)
    except ValidationError as error:
        raise RequestError(first_fault(error.errors(include_url=False, include_input=False))) from error
    for number, chunk in enumerate(asked.prompt.chunks):
        if not isinstance(chunk, types.EncodedTextChunk | types.ImageChunk):
            raise RequestError(f"prompt chunk {number} is {chunk.type}; only text and images are supported")
    return asked


def first_fault(errors: Any) -> str:
    """The first thing that is wrong with a body, in one line."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return f"the body is no JSON: {first['ctx']['error']}"
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return " ".join(f"{place or 'body'}: {first['msg']}{more}".split())
