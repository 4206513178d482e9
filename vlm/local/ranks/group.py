"""The processes of an engine ("ranks"): how they start, get their commands, and end.

The process with the clients is none of them: it sends each rank a command and waits for all answers, so ranks never
wait for a client. A rank that dies, fails or gives no answer in time ends all of them, and the error names it.

Ranks are forked from a process that has torch imported and has used nothing of it, so that starting them again takes
a moment.
"""

import copyreg
import io
import logging
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast
from weakref import finalize

import torch

from kshot.errors import EngineLostError, KshotError

log = logging.getLogger("kshot")

LIMIT = 600.0  # seconds that a rank may be behind the others
NOTICE = 2.0  # seconds in which it shows which rank died, where another one has lost its connection
CONTEXT = get_context("forkserver")
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
DONE, REFUSED, FAILED = "done", "refused", "failed"  # of an answer: its value, a KshotError, anything else


@dataclass(frozen=True)
class Seat:
    """What a rank is told of itself. store: a file by which ranks find each other, or "" for torch's environment
    variables. limit: seconds after which waiting for the others is an error."""

    rank: int
    count: int
    device: str
    threads: int
    store: str = ""
    limit: float = LIMIT


@dataclass(frozen=True)
class Member:
    """A rank as the process with the clients sees it. process: None where that is none of its own."""

    seat: Seat
    channel: Connection
    process: Any = None

    def __str__(self) -> str:
        return f"rank {self.seat.rank} of {self.seat.count} ({self.seat.device})"

    @property
    def fate(self) -> str:
        """How its process ended, as far as it has."""
        if self.process is None:
            return "ended"
        self.process.join(NOTICE)
        status = self.process.exitcode
        return f"died ({signal.Signals(-status).name})" if status and status < 0 else f"ended (status {status})"


class Ranks:
    """The processes of one engine, in order. lost: why they are gone, or ""."""

    def __init__(self, members: Sequence[Member], limit: float = LIMIT, folder: Path | None = None) -> None:
        self.members, self.limit, self.lost = [*members], limit, ""
        self._finalizer = finalize(self, _end, self.members, folder)

    @classmethod
    def start(
        cls, run: Callable[..., None], devices: Sequence[str], threads: int, *arguments: Any, limit: float = LIMIT
    ) -> "Ranks":
        """A process a device, which calls run(channel, seat, *arguments)."""
        CONTEXT.set_forkserver_preload([run.__module__])
        folder = Path(tempfile.mkdtemp(prefix="kshot-ranks-"))
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
        members = []
        for rank, device in enumerate(devices):
            ours, theirs = CONTEXT.Pipe()
            seat = Seat(rank, len(devices), device, threads, str(folder / "store"), limit)
            process = CONTEXT.Process(
                target=run, args=(theirs, seat, *arguments), daemon=True, name=f"kshot-rank-{rank}"
            )
            process.start()
            theirs.close()
            members.append(Member(seat, ours, process))
        return cls(members, limit, folder)

    @property
    def sentinels(self) -> list[int]:
        """What becomes ready when a process ends."""
        return [each.process.sentinel for each in self.members if each.process is not None]

    def call(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The answers of all ranks, in order, each to a command of its own.

        Raises the first rank's KshotError, and EngineLostError where one is lost: then all of them are.
        """
        if self.lost:
            raise EngineLostError(self.lost)
        for member, command in zip(self.members, commands, strict=True):
            with suppress(OSError):  # it is dead, which shows in its answer
                send(member.channel, command)
        return self.answers()

    def answers(self) -> list[Any]:
        """Those to the last command; raises as `call`."""
        waiting = {member.channel: member for member in self.members}
        found, first = dict[int, tuple[str, Any]](), 0.0
        while waiting:
            ready = wait([*waiting], None if not found else max(0.0, first + self.limit - time.monotonic()))
            if not ready:
                self._lose(next(iter(waiting.values())), f"gave no answer for {self.limit:.0f} seconds")
            for channel in ready:
                member = waiting.pop(channel)  # type: ignore[call-overload]
                try:
                    found[member.seat.rank] = answer = receive(member.channel)
                except (EOFError, OSError):
                    self._lose(member, member.fate)
                if answer[0] == FAILED:
                    self._lose(*self._culprit(member, answer[1]))
                first = first or time.monotonic()
        outcomes = [found[rank] for rank in range(len(self.members))]
        for kind, value in outcomes:
            if kind == REFUSED:
                raise rebuilt(*value)
        return [value for _, value in outcomes]

    def end(self, why: str = "the engine was closed") -> None:
        """Stop all of them."""
        self.lost = self.lost or why
        self._finalizer()

    def _culprit(self, member: Member, error: str) -> tuple[Member, str]:
        """Which rank is to blame where this one failed: others fail when a rank dies in the middle of a pass."""
        wait(self.sentinels, NOTICE)
        dead = [each for each in self.members if each.process is not None and not each.process.is_alive()]
        return (dead[0], dead[0].fate) if dead else (member, f"failed ({error.splitlines()[-1]})")

    def _lose(self, member: Member, fate: str) -> None:
        self.end(f"{member} {fate}, and the engine ended with it")
        raise EngineLostError(self.lost)


def _end(members: Sequence[Member], folder: Path | None) -> None:
    for each in members:
        each.channel.close()
        if each.process is not None:
            each.process.kill()
    for each in members:
        if each.process is not None:
            each.process.join()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def rebuilt(kind: type[KshotError], message: str) -> KshotError:
    """A KshotError of another process: its class may take other arguments than the message."""
    error = kind.__new__(kind, message)
    error.args = (message,)
    return error


def _reduced(tensor: torch.Tensor) -> tuple[Any, ...]:
    try:
        return torch.from_numpy, (tensor.numpy(),)
    except (TypeError, RuntimeError):  # numpy has no bfloat16, and nothing that is on a GPU or has a gradient
        return cast(tuple[Any, ...], tensor.__reduce_ex__(pickle.HIGHEST_PROTOCOL))


class _Pickler(pickle.Pickler):
    """By value: what multiprocessing makes of tensors is memory that both ends change. As arrays, which takes a tenth
    of the time that torch's own form takes: a request has several small ones a datum."""

    dispatch_table = copyreg.dispatch_table | {torch.Tensor: _reduced}


def send(channel: Connection, value: Any) -> None:
    """Pickled, see `_Pickler`."""
    file = io.BytesIO()
    _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(value)
    channel.send_bytes(file.getbuffer())


def receive(channel: Connection) -> Any:
    """What `send` sent. Raises EOFError and OSError where the other end is gone."""
    return pickle.loads(channel.recv_bytes())  # noqa: S301 - of processes that were started here


def serve(channel: Connection, perform: Callable[..., Any], settled: Callable[[], None]) -> None:
    """In a rank: answer commands until nobody sends any. settled: called after each, also one that was refused; before
    its answer is sent."""
    while True:
        try:
            command = receive(channel)
        except (EOFError, OSError):
            return
        send(channel, answer(perform, settled, *command))


def answer(call: Callable[..., Any], settled: Callable[[], None], *arguments: Any) -> tuple[str, Any]:
    """What a call gives, or how it failed."""
    from traceback import format_exc

    try:
        try:
            result = DONE, call(*arguments)
        except KshotError as error:
            result = REFUSED, (type(error), str(error))
        settled()
        return result
    except BaseException:
        log.exception("a rank failed")
        return FAILED, format_exc()
