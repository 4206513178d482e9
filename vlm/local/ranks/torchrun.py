"""Ranks that torchrun has started: `torchrun ... -m kshot serve ...` runs the command on every one of them.

The first one has the clients, and a process of its own beside it for its rank; the others find it by torchrun's store,
and follow its commands. Where a rank dies, torchrun ends all of them, and starts them again if it is told to
(--max-restarts).
"""

import logging
import os
import secrets
import time
from collections.abc import Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Any, cast

import torch
import torch.distributed as dist

from kshot.errors import EngineLostError, KshotError
from vlm.local.ranks import rank
from vlm.local.ranks.group import LIMIT, Member, Ranks, Seat, receive, send, started
from vlm.local.ranks.rank import WAIT, torchrun_store

log = logging.getLogger("kshot")

KEY = "clients"  # in the store: where the process with the clients listens
GRACE = 10  # seconds to answer what is under way when ranks are lost
WAY_OUT = "start torchrun again, or give it --max-restarts"


def world() -> int:
    """How many processes torchrun has started; 0 without it."""
    count = int(os.environ.get("WORLD_SIZE", "0")) if "LOCAL_RANK" in os.environ else 0
    return count if count > 1 else 0


def first() -> bool:
    """Whether this is the one with the clients."""
    return os.environ.get("RANK") == "0"


def device_here(asked: str) -> str:
    """The device of this process: its GPU, where there are any and the CPU is not asked for."""
    return "cpu" if asked == "cpu" or not torch.cuda.is_available() else f"cuda:{os.environ['LOCAL_RANK']}"


def end_on_loss(why: str) -> None:
    """End this process with its clients: torchrun alone starts ranks, and it starts all of them or none. Not at once:
    requests are answered, and where torchrun is ending all of them, it comes to its own end."""
    time.sleep(GRACE)
    log.error("%s; torchrun ends, or starts all again (--max-restarts)", why)
    os._exit(1)


def follow(device: str, threads: int) -> None:
    """Be a rank until the first process ends. Raises KshotError where that is not there, and where it ends without a
    word: torchrun on another node takes processes without an error for those that are done, and starts none again."""
    channel = _found()
    number, count = int(os.environ["RANK"]), world()
    seat = Seat(number, count, device_here(device), threads)
    send(channel, seat)
    if not rank.run(channel, seat, receive(channel)):
        time.sleep(1.5 * GRACE)  # or torchrun would end the first one before that has said why
        raise EngineLostError(f"rank {number} of {count} has ended without being told to; {WAY_OUT}")


def _found() -> Connection:
    """A channel to the first process."""
    host = os.environ["MASTER_ADDR"]
    try:
        port, key = torchrun_store().get(KEY).decode().split()
        return Client((host, int(port)), authkey=bytes.fromhex(key))
    except (OSError, EOFError, AuthenticationError, dist.DistError) as error:
        raise KshotError(f"the first process of torchrun does not answer at {host} ({error}); {WAY_OUT}") from error


def joined(options: Any, device: str, threads: int) -> Ranks:
    """All ranks, as the first process has them. Raises EngineLostError where they were there before, and KshotError
    where not all of them come."""
    store = torchrun_store()
    if store.check([KEY]):
        raise EngineLostError(f"the ranks that torchrun has started are gone; {WAY_OUT}")
    members = {0: started(rank.run, Seat(0, world(), device_here(device), threads), options)}
    for channel in _arriving(store, world() - 1):
        seat = receive(channel)
        send(channel, options)
        members[seat.rank] = Member(seat, channel)
    return Ranks([members[number] for number in range(world())], LIMIT)


def _arriving(store: Any, count: int) -> Iterator[Connection]:
    """A channel to each of the others, as they come."""
    key = secrets.token_bytes(16)
    with Listener((os.environ["MASTER_ADDR"], 0), backlog=count + 1, authkey=key) as listener:
        cast(Any, listener)._listener._socket.settimeout(WAIT.total_seconds())  # multiprocessing has no door to it
        store.set(KEY, f"{listener.address[1]} {key.hex()}")
        for number in range(count):
            try:
                channel = listener.accept()
            except TimeoutError as error:
                came = f"{number + 1} of {count + 1} processes of torchrun have come in {WAIT}"
                raise KshotError(f"{came}; look at what the others say, and {WAY_OUT}") from error
            yield channel
