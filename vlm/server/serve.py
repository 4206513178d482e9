"""`kshot serve`: runs a server on a socket until a signal stops it."""

import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from kshot.errors import INTERRUPTED, InputError, RequestError
from vlm import models, nano
from vlm.local.registry import SHARDS, EngineRegistry, dtype_of, state_folder
from vlm.local.registry import follow as follow
from vlm.places import parted
from vlm.server.app import Options, application
from vlm.server.connections import BACKLOG, KEEP_ALIVE, Connections, most_connections
from vlm.server.guard import Keys, is_loopback
from vlm.server.limits import images
from vlm.server.limits.memory import IMAGES, Memory
from vlm.server.state import ServerState
from vlm.server.store import Store
from vlm.server.tables import Checkpoint

log = logging.getLogger("kshot.server")
SWITCH = 0.0005  # seconds after which Python lets another thread run: requests are answered beside the engine's thread
GRACE = 5  # seconds that open connections have when the server stops


def engine_registry(
    model_arguments: list[str],
    state: Path | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    *,
    train_vision: bool = False,
    features: Path | None = None,
    threads: int | None = None,
    shard: str = SHARDS[0],
) -> EngineRegistry:
    """The engines of a server; `serve` loads them.

    model_arguments: NAME or NAME=PATH of each model, with @PLACE behind it (see `vlm.places`) where it has one of its
    own; none: the nano model. threads: of the models' arithmetic on a CPU, by default as many as are fastest
    (`vlm.local.threads`), and one core at least is left that answers requests. The rest: see `vlm.connect`.
    Raises InputError for an argument that is neither, ModelError for an absent device, UnknownNameError for a dtype or
    a shard.
    """
    (paths, places), torch_dtype = model_paths(model_arguments), dtype_of(dtype)
    registry = EngineRegistry((state or state_folder()).resolve(), device, torch_dtype, train_vision, features)
    registry.model_paths, registry.places, registry.threads, registry.shard = paths, places, threads, shard
    registry.check_places()  # now, not when the first request comes
    return registry


def serve(
    registry: EngineRegistry,
    options: Options,
    on_start: Callable[[str], None],
    loading: AbstractContextManager[Any] | None = None,
    memory: Memory | None = None,
) -> None:
    """Load the models, then answer requests until SIGINT or SIGTERM. on_start: called with the address once it listens.
    loading: around the loading. memory: what clients may make it hold; by default `default_limit` of it.

    Raises KeyboardInterrupt after SIGINT; InputError where the address cannot be listened on or is not loopback without
    keys, or where another server uses the state folder; UnknownNameError and ModelError for a model that cannot be
    served.
    """
    if options.keys.digests is None and not is_loopback(options.host):
        raise InputError(f"--host {options.host} is reached by others; give --api-key-file, or listen on 127.0.0.1")
    listening = _listen(options)
    options = replace(options, port=listening.getsockname()[1])
    memory = memory or Memory()
    ahead = memory.limit // 8  # for good: images are decoded ahead while there is room in it, for each model
    _ = memory.take(IMAGES, ahead)
    registry.pixel_bytes, registry.decoders = ahead // max(1, len(registry.model_paths or ())), images.AT_ONCE
    registry.spare = 1  # a core that answers requests
    with listening:
        with loading or nullcontext():
            registry.load()  # the port is taken, and nobody is answered yet
        state = ServerState(registry, Store(registry.state), memory, keep=options.keep)
        if options.keys.digests is not None and not options.keys.shared:
            _say_whose(state.store, options.keys)
        connections = Connections(most_connections())
        config = uvicorn.Config(
            application(state, options, connections),
            http=connections.protocol,  # type: ignore[arg-type]  # which uvicorn calls
            ws="none",
            backlog=BACKLOG,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=GRACE,
            timeout_keep_alive=KEEP_ALIVE,
            server_header=False,
            lifespan="on",
        )
        sys.setswitchinterval(SWITCH)
        gc.freeze()  # what was loaded stays: looking at it in each collection costs milliseconds
        server = _Server(config, state, partial(on_start, options.address))
        try:
            server.run([listening])
        finally:
            gc.unfreeze()  # or libraries complain at exit of objects that were not collected
            if not state.ended:  # the interpreter would wait for the engine's thread
                log.warning("stopped in the middle of a pass")
                os._exit(INTERRUPTED)
        if server.interrupted:  # uvicorn raises the signal again, in vain where it is ignored: in a background job
            raise KeyboardInterrupt


def _say_whose(store: Store, keys: Keys) -> None:
    """Say which checkpoints are not reached by one key alone."""
    counts = store.owners(Checkpoint)
    if everybodys := counts.get(None, 0):
        log.warning("%s checkpoints were saved without a key file: all keys see them", f"{everybodys:,}")
    if strangers := sum(count for name, count in counts.items() if name not in keys.owners):
        log.warning(
            "%s checkpoints are of keys that are not in the key file: nobody sees them; --shared shows them",
            f"{strangers:,}",
        )


def model_paths(arguments: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Model name → folder or hub id; and → place, where it has one. None given: of the nano model."""
    paths, places = dict[str, str](), dict[str, str]()
    for text in arguments or [nano.NAME]:
        model, place = parted(text)
        name, equals, path = model.partition("=")
        if not name or (equals and not path):
            raise InputError(f"--model {text!r}: give a name, or NAME=PATH")
        if name in paths:
            raise InputError(f"--model {name!r} is given twice; leave one out")
        models.check(path or name)
        paths[name] = path or name
        places |= {name: place} if place else {}
    return paths, places


class _Server(uvicorn.Server):
    """uvicorn, with a call when it listens."""

    def __init__(self, config: uvicorn.Config, state: ServerState, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._state, self._on_start = state, on_start
        self.interrupted = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.interrupted |= sig == signal.SIGINT
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._state.futures.stop()  # or it would wait for requests that wait for answers
        await super().shutdown(sockets)


def _listen(options: Options) -> socket.socket:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio sets TCP_NODELAY on such alone
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((options.host, options.port))
    except (OSError, OverflowError) as error:
        listening.close()
        raise RequestError(f"cannot listen on {options.address}: {error}; give another --port or --host") from error
    return listening
