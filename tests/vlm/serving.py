"""A server to test against: in this process on a thread, or as the command in a process of its own.

with served(folder) as server: vlm.connect(server.address)
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from vlm import nano
from vlm.local.registry import EngineRegistry
from vlm.server.app import Options, application
from vlm.server.connections import Connections
from vlm.server.state import ServerState
from vlm.server.store import Store

MODEL_PATHS = {nano.NAME: nano.NAME}
KEY = "tml-a-key-of-a-test"
HEADERS = {"X-API-Key": KEY}


@dataclass(frozen=True)
class Server:
    """A running server and, of one in this process, its parts."""

    address: str
    state: ServerState
    app: Any
    connections: Connections


@contextmanager
def served(folder: Path, registry: EngineRegistry | None = None, port: int = 0, **options: Any) -> Iterator[Server]:
    """A server on loopback, on a thread; port 0: any that is free."""
    registry = registry or EngineRegistry(folder, model_paths=MODEL_PATHS)
    state = ServerState(registry, Store(registry.state))
    connections = Connections()
    app = application(state, Options(**options), connections)
    with listening(app, connections, lifespan="on", port=port) as address:
        yield Server(address, state, app, connections)


@contextmanager
def listening(app: Any, connections: Connections | None = None, **config: Any) -> Iterator[str]:
    """The address of an application while it is served on a thread."""
    config = {"port": 0, "http": (connections or Connections()).protocol, **config}
    server = uvicorn.Server(uvicorn.Config(app, **{"log_level": "warning", "timeout_graceful_shutdown": 2, **config}))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server ended at once"
        thread.join(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@dataclass(frozen=True)
class Command:
    """`kshot serve` in a process of its own."""

    address: str
    said: str
    process: "subprocess.Popen[str]"

    def kill(self) -> None:
        """As a crash or the system would: no time to finish anything."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(120)


@contextmanager
def command(state: Path, *arguments: str, in_background: bool = False) -> Iterator[Command]:
    """The command with these arguments, once it has said where it listens. in_background: as a shell starts a
    background job, with SIGINT ignored."""
    options = ["serve", "--port", "0", "--state", str(state), *arguments]
    start = [sys.executable, "-c", "from experiments.cli.main import main; main()", *options]
    if in_background:
        start = ["/bin/bash", "-c", 'trap "" INT; exec "$@"', "bash", *start]
    with subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            line = process.stdout.readline()
            address = re.search(r"at (http://\S+)", line)
            assert address, line + process.stdout.read()
            yield Command(address[1], line, process)
        finally:
            process.kill()


def dial(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.address.rpartition(":")[2])), timeout=30)


def reply(server: Server, request: bytes) -> bytes:
    """What the server says to these bytes."""
    with dial(server) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))
