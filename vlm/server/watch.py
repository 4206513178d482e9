"""The overview that the server's page shows, and metrics in Prometheus' text format
(https://prometheus.io/docs/instrumenting/exposition_formats/).
"""

import json
import math
import time
from collections import Counter
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

from vlm.server.connections import Connections
from vlm.server.owners import Owned, Owner
from vlm.server.state import ServerState
from vlm.server.tables import Run, Session

NEWEST = 50  # runs and checkpoints on the page
POINTS = 300  # of a curve
CURVES = 500  # of runs that are over, in memory
TEXT = "text/plain; version=0.0.4; charset=utf-8"


def routes(
    state: ServerState, requests: "Counter[tuple[str | None, str, int]]", connections: Connections, address: str
) -> APIRouter:
    """The router of what one server says of itself. requests: by owner, endpoint and status. address: where clients
    connect to. Counts are of what an owner reaches; how busy the engine is, and its tokens, is of all together."""
    router = APIRouter()
    curves: dict[str, list[list[Any]]] = {}  # of runs that are over: they do not change

    @router.get("/api/v1/overview")
    async def overview(owner: Owned) -> dict[str, Any]:
        if len(curves) > CURVES:
            curves.clear()
        return {
            "version": version("kshot"),
            "started": state.started,
            "now": time.time(),
            "address": address,
            "models": [_model(state, name) for name in state.models],
            "runs": [_run(state, row, curves) for row in state.store.newest(Run, NEWEST, owner=owner)],
            "checkpoints": [
                {name: getattr(row, name) for name in ("path", "kind", "created", "size_bytes", "expires")}
                for row in state.store.checkpoints(limit=NEWEST, owner=owner)
            ],
            "memory": {"limit": state.memory.limit, "taken": state.memory.taken},
            "queue": {
                "jobs": _sum(state, "waiting_jobs"),
                "samples": _sum(state, "waiting_samples"),
                "sequences": _sum(state, "active_sequences"),
                "tokens_sampled": _sum(state, "tokens_sampled"),
                "busy_share": _sum(state, "busy_seconds") / max(1e-9, time.time() - state.started),
            },
        }

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics(owner: Owned) -> Response:
        return Response(_metrics(state, requests, owner, connections), media_type=TEXT)

    return router


def _model(state: ServerState, name: str) -> dict[str, Any]:
    engine = state.registry.engines.get(name)
    return {
        "name": name,
        "loaded": engine is not None,
        "context": engine.model.context if engine else None,
        "threads": state.registry.chosen.get(name),  # on a CPU, once it is loaded
    }


def _run(state: ServerState, row: Run, curves: dict[str, list[list[Any]]]) -> dict[str, Any]:
    live, session = state.runs.get(row.id), state.store.get(Session, row.session)
    over = session is not None and session.finished is not None
    losses = curves.get(row.id)
    if losses is None:
        points = state.store.losses(row.id, POINTS)
        losses = [[each.step, each.time, each.loss if math.isfinite(each.loss) else None] for each in points]
        if live is None:
            curves[row.id] = losses
    return {
        "id": row.id,
        "base_model": row.base_model,
        "rank": row.lora["rank"],
        "state": "live" if live else "finished" if over else "lost",
        "steps": losses[-1][0] if losses else 0,
        "created": row.created,
        "last_request": live.last_request if live else row.last_request,
        "user_metadata": row.user_metadata,
        "losses": losses,
    }


def _metrics(
    state: ServerState, requests: "Counter[tuple[str | None, str, int]]", owner: Owner, connections: Connections
) -> str:
    def own(counts: "Counter[str | None]") -> int:
        return sum(count for name, count in counts.items() if owner.reaches(name))

    made = Counter[tuple[str, int]]()
    for (name, path, status), count in requests.items():
        made[path, status] += count if owner.reaches(name) else 0
    plain = {
        "kshot_waiting_jobs": ("Training and other calls that wait for the engine.", _sum(state, "waiting_jobs")),
        "kshot_waiting_samples": ("Sampling requests that wait for the engine.", _sum(state, "waiting_samples")),
        "kshot_active_sequences": ("Sequences in progress.", _sum(state, "active_sequences")),
        "kshot_pending_requests": ("Requests without an answer yet.", len(state.futures.pending(owner))),
        "kshot_live_runs": ("Training runs in memory.", own(Counter(run.owner for run in state.runs.values()))),
        "kshot_loaded_models": ("Base models in memory.", len(state.registry.engines)),
        "kshot_engine_busy_seconds_total": ("Time the engines have worked.", _sum(state, "busy_seconds")),
        "kshot_sampled_tokens_total": ("Tokens that were sampled.", _sum(state, "tokens_sampled")),
        "kshot_examples_total": ("Examples that were trained on.", own(state.examples)),
        "kshot_optimizer_steps_total": ("Optimizer steps.", own(state.steps)),
        "kshot_connections": ("Open connections.", len(connections.open)),
        "kshot_head_bytes": ("Heads of requests in memory.", connections.heads),
        "kshot_unread_bytes": ("Large answers that clients have not taken yet.", connections.unread),
    }
    lines = [line for name, (text, value) in plain.items() for line in (*_head(name, text), f"{name} {value}")]
    lines += _head("kshot_memory_limit_bytes", "What clients may make the server hold.")
    lines.append(f"kshot_memory_limit_bytes {state.memory.limit}")
    lines += _head("kshot_memory_bytes", "What they make it hold, by kind.")
    lines += [f'kshot_memory_bytes{{kind="{kind}"}} {size}' for kind, size in state.memory.taken.items()]
    lines += _head("kshot_requests_total", "HTTP requests.")
    for (path, status), count in sorted((+made).items()):
        lines.append(f'kshot_requests_total{{path="{path}",status="{status}"}} {count}')
    lines += _head("kshot_threads", "Threads that a model computes with on a CPU.")
    lines += [
        f"kshot_threads{{model={json.dumps(name, ensure_ascii=False)}}} {count}"
        for name, count in state.registry.chosen.items()
    ]
    lines += _head("kshot_model_busy_seconds_total", "Of models with processes of their own.")
    lines += [
        f"kshot_model_busy_seconds_total{{model={json.dumps(name, ensure_ascii=False)}}} {scheduler.busy_seconds}"
        for name, scheduler in state.registry.own_schedulers.items()
    ]
    lines += _head("kshot_connections_closed_total", "Connections that were refused or cut off.")
    for reason, count in sorted(connections.closed.items()):
        lines.append(f'kshot_connections_closed_total{{reason="{reason}"}} {count}')
    return "\n".join(lines) + "\n"


def _sum(state: ServerState, name: str) -> Any:
    """Over all schedulers."""
    return sum(getattr(scheduler, name) for scheduler in [*state.registry.schedulers.values()])


def _head(name: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}"]
