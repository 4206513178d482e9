"""The Tinker protocol's endpoints that show and keep what there is: models, runs, checkpoints, sessions, samplers.

Knows no training and no sampling.
"""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict
from tinker import types

from kshot_errors import MissingError, RequestError
from kshot_training import KINDS
from vlm.server.bodies import Route
from vlm.server.checkpoints import check_ttl
from vlm.server.core import Core
from vlm.server.store_rows import Checkpoint, Run

TYPES = dict(zip(KINDS, ("training", "sampler"), strict=True))  # our folders → the protocol's words
OWNER = "local"
ALL = 2**31
Limit = Annotated[int, Query(ge=1, le=1000)]
Offset = Annotated[int, Query(ge=0, le=2**31)]
Scope = Literal["owned", "accessible"]


class Ttl(BaseModel):
    model_config = ConfigDict(extra="forbid")
    ttl_seconds: int | None


class WeightsInfo(BaseModel):
    model_config = ConfigDict(extra="forbid")
    tinker_path: str


def routes(core: Core) -> APIRouter:
    """The router of one server."""
    router = APIRouter(prefix="/api/v1", route_class=Route)
    _server(router, core)
    _runs(router, core)
    _checkpoints(router, core)
    _sessions(router, core)
    return router


def _server(router: APIRouter, core: Core) -> None:
    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @router.get("/get_server_capabilities")
    async def get_server_capabilities() -> dict[str, Any]:
        return {"supported_models": [_model(core, name) for name in core.host.places or {}]}


def _runs(router: APIRouter, core: Core) -> None:
    @router.get("/training_runs")
    async def training_runs(
        limit: Limit = 20, offset: Offset = 0, access_scope: Scope = "owned", project_id: str | None = None
    ) -> dict[str, Any]:
        _no_projects(project_id)
        runs = [_run(core, row) for row in core.store.runs(limit, offset)]
        return {"training_runs": runs, "cursor": _cursor(limit, offset, core.store.run_count())}

    @router.get("/training_runs/{run}")
    async def training_run(run: str, access_scope: Scope = "owned") -> dict[str, Any]:
        return _run(core, _existing(core, run))

    @router.get("/training_runs/{run}/checkpoints")
    async def checkpoints_of(run: str) -> dict[str, Any]:
        _existing(core, run)
        return {"checkpoints": [_checkpoint(row) for row in core.store.checkpoints(run, limit=ALL)]}

    @router.post("/weights_info")
    async def weights_info(request: WeightsInfo) -> dict[str, Any]:
        row = core.checkpoints.existing(request.tinker_path)
        flags = {name: row.lora[name] for name in ("train_unembed", "train_mlp", "train_attn")}
        return {"base_model": row.base_model, "is_lora": True, "lora_rank": row.lora["rank"], **flags}


def _checkpoints(router: APIRouter, core: Core) -> None:
    @router.get("/checkpoints")
    async def checkpoints(limit: Limit = 100, offset: Offset = 0) -> dict[str, Any]:
        rows = core.store.checkpoints(limit=limit, offset=offset)
        return {
            "checkpoints": [_checkpoint(row) for row in rows],
            "cursor": _cursor(limit, offset, core.store.checkpoint_count()),
        }

    @router.delete("/training_runs/{run}/checkpoints/{kind}/{name}", status_code=204)
    async def delete(run: str, kind: str, name: str) -> None:
        path = core.checkpoints.existing(f"tinker://{run}/{kind}/{name}").path
        core.checkpoints.remove(path)

    @router.put("/training_runs/{run}/checkpoints/{kind}/{name}/ttl", status_code=204)
    async def set_ttl(run: str, kind: str, name: str, request: Ttl) -> None:
        check_ttl(request.ttl_seconds)
        core.checkpoints.expire(f"tinker://{run}/{kind}/{name}", request.ttl_seconds)

    @router.post("/training_runs/{run}/checkpoints/{kind}/{name}/publish", status_code=204)
    async def publish(run: str, kind: str, name: str) -> None:
        core.store.set_public(core.checkpoints.existing(f"tinker://{run}/{kind}/{name}").path, True)

    @router.delete("/training_runs/{run}/checkpoints/{kind}/{name}/publish", status_code=204)
    async def unpublish(run: str, kind: str, name: str) -> None:
        core.store.set_public(core.checkpoints.existing(f"tinker://{run}/{kind}/{name}").path, False)


def _sessions(router: APIRouter, core: Core) -> None:
    @router.get("/sessions")
    async def sessions(
        limit: Limit = 20, offset: Offset = 0, access_scope: Scope = "owned", project_id: str | None = None
    ) -> dict[str, Any]:
        _no_projects(project_id)
        return {"sessions": [row.id for row in core.store.sessions(limit, offset)]}

    @router.get("/sessions/{session}")
    async def session(session: str, access_scope: Scope = "owned") -> dict[str, Any]:
        row = core.store.session(session)
        if row is None:
            raise MissingError(f"there is no session {session!r}")
        return {
            "training_run_ids": [run.id for run in core.store.runs_of(session)],
            "sampler_ids": [sampler.id for sampler in core.store.samplers_of(session)],
            "user_metadata": row.user_metadata,
            "display_name": row.display_name,
        }

    @router.get("/samplers/{sampler}")
    async def sampler(sampler: str) -> dict[str, Any]:
        row = core.store.sampler(sampler)
        if row is None:
            raise MissingError(f"there is no sampler {sampler!r}")
        return {"sampler_id": row.id, "base_model": row.base_model, "model_path": row.model_path}


def _existing(core: Core, run: str) -> Run:
    row = core.store.run(run)
    if row is None:
        raise MissingError(f"there is no run {run!r}")
    return row


def _model(core: Core, name: str) -> dict[str, Any]:
    engine = core.host.engines.get(name)
    context = None if engine is None else engine.model.context  # known once it is loaded
    return types.SupportedModel(
        model_name=name, max_context_length=context, trainable=True, sampleable=True
    ).model_dump()


def _run(core: Core, row: Run) -> dict[str, Any]:
    live = core.runs.get(row.id)
    last = {kind: core.store.last_checkpoint(row.id, kind) for kind in KINDS}
    return {
        "training_run_id": row.id,
        "base_model": row.base_model,
        "model_owner": OWNER,
        "is_lora": True,
        "corrupted": False,
        "lora_rank": row.lora["rank"],
        "last_request_time": _time(live.last_request if live else row.last_request),
        "last_checkpoint": _optional(last[KINDS[0]]),
        "last_sampler_checkpoint": _optional(last[KINDS[1]]),
        "user_metadata": row.user_metadata,
    }


def _optional(row: Checkpoint | None) -> dict[str, Any] | None:
    return None if row is None else _checkpoint(row)


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


def _cursor(limit: int, offset: int, total: int) -> dict[str, int]:
    return {"offset": offset, "limit": limit, "total_count": total}


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def _no_projects(project: str | None) -> None:
    if project is not None:
        raise RequestError(f"project_id {project!r}: this server has no projects; leave it out")
