"""Ranks that torchrun has started: `torchrun ... -m kshot serve ...` runs the command on every one of them.

The first one has the clients, and a process of its own beside it for its rank; the others find it by torchrun's store,
and follow its commands. Where a rank dies, torchrun ends all of them, and starts them again if it is told to
(--max-restarts).
"""

import os
import secrets
from datetime import timedelta
from multiprocessing.connection import Client, Listener
from typing import Any

import torch
import torch.distributed as dist

from vlm.local.ranks import rank
from vlm.local.ranks.group import CONTEXT, LIMIT, Member, Ranks, Seat, receive, send

KEY = "kshot/clients"  # in the store: where the process with the clients listens
WAIT = timedelta(minutes=10)  # for all of them to come


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


def follow(device: str, threads: int) -> None:
    """Be a rank until the first process ends."""
    port, key = _store().get(KEY).decode().split()
    channel = Client((os.environ["MASTER_ADDR"], int(port)), authkey=bytes.fromhex(key))
    number, count = int(os.environ["RANK"]), world()
    seat = Seat(number, count, device_here(device), threads)
    send(channel, seat)
    rank.run(channel, seat, receive(channel))


def joined(options: Any, device: str, threads: int) -> Ranks:
    """All ranks, as the first process has them."""
    key = secrets.token_bytes(16)
    own, theirs = CONTEXT.Pipe()
    CONTEXT.set_forkserver_preload([rank.run.__module__])
    seat = Seat(0, world(), device_here(device), threads)
    process = CONTEXT.Process(target=rank.run, args=(theirs, seat, options), daemon=True, name="kshot-rank-0")
    process.start()
    theirs.close()
    members = {0: Member(seat, own, process)}
    with Listener((os.environ["MASTER_ADDR"], 0), backlog=world(), authkey=key) as listener:
        _store().set(KEY, f"{listener.address[1]} {key.hex()}")
        while len(members) < world():
            channel = listener.accept()
            seat = receive(channel)
            send(channel, options)
            members[seat.rank] = Member(seat, channel)
    return Ranks([members[number] for number in range(world())], LIMIT)


def _store() -> Any:
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=WAIT)
