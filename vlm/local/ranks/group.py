"""The processes of an engine ("ranks"): how they start, get their commands, and end.

The process with the clients is none of them: it sends each rank a command and waits for all answers, so ranks never
wait for a client. A rank that dies, fails, or in time takes no command or gives no answer, ends all of them, and the
error names it.

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
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any, cast
from weakref import finalize

import torch

from kshot.errors import EngineLostError, KshotError

log = logging.getLogger("kshot")

LIMIT = 600.0  # seconds that a rank may be behind the others, and that it may take to receive a command
NOTICE = 2.0  # seconds in which it shows which rank died, where another one has lost its connection
CONTEXT = get_context("forkserver")
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
DONE, REFUSED, FAILED = "done", "refused", "failed"  # of an answer: its value, a KshotError, anything else in a line
TIMED_OUT = "timed out", "timeout"  # what gloo and NCCL say where another rank does not come
_starting = threading.Lock()


@dataclass(frozen=True)
class Seat:
    """What a rank is told of itself. store: a file by which ranks find each other, or "" for the store of
    torchrun. limit: seconds after which waiting for the others is an error."""

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
        self.members, self.limit, self.lost = list[Member](), limit, ""
        self._finalizer, self._sent = finalize(self, _end, self.members, folder), 0.0
        for member in members:
            self.add(member)

    @classmethod
    def start(
        cls, run: Callable[..., object], devices: Sequence[str], threads: int, *arguments: Any, limit: float = LIMIT
    ) -> "Ranks":
        """A process a device, which calls run(channel, seat, *arguments)."""
        folder = Path(tempfile.mkdtemp(prefix="kshot-ranks-"))
        ranks = cls([], limit, folder)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
        try:
            for rank, device in enumerate(devices):
                seat = Seat(rank, len(devices), device, threads, str(folder / "store"), limit)
                ranks.add(started(run, seat, *arguments))
        except BaseException:
            ranks.end()
            raise
        return ranks

    def add(self, member: Member) -> None:
        """The next one."""
        _limit_sending(member.channel, self.limit)
        self.members.append(member)

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
        self._sent = time.monotonic()
        for member, command in zip(self.members, commands, strict=True):
            try:
                send(member.channel, command)
            except BlockingIOError:
                self._lose(member, f"took no command for {self.limit:.0f} seconds")
            except OSError:
                pass  # it is dead, which shows in its answer
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
                    self._lose(*self._culprit(member, answer[1], [*waiting.values()]))
                first = first or time.monotonic()
        outcomes = [found[rank] for rank in range(len(self.members))]
        for kind, value in outcomes:
            if kind == REFUSED:
                raise rebuilt(*value)
        return [value for _, value in outcomes]

    def end(self, why: str = "") -> None:
        """Stop all of them. why: where they are lost; without it, those that were not started here are told to end."""
        if not (self.lost or why):
            for member in self.members:
                if member.process is None:
                    with suppress(OSError):
                        send(member.channel, None)
        self.lost = self.lost or why or "the engine was closed"
        self._finalizer()

    def note_dead(self) -> None:
        """Where a process has ended, all are lost. Not while there is a call."""
        if not self.lost and (dead := self._dead()):
            self.end(_end_with(dead[0], dead[0].fate))

    def _dead(self) -> list[Member]:
        return [each for each in self.members if each.process is not None and not each.process.is_alive()]

    def _culprit(self, member: Member, error: str, silent: Sequence[Member]) -> tuple[Member, str]:
        """Which rank is to blame where this one failed: others fail when a rank dies in the middle of a pass, or when
        one of those that have not answered does not come to where they meet."""
        wait(self.sentinels, NOTICE)
        if dead := self._dead():
            return dead[0], dead[0].fate
        if silent and time.monotonic() - self._sent > self.limit and any(each in error.lower() for each in TIMED_OUT):
            ready = wait([each.channel for each in silent], 0)
            if hung := [each for each in silent if each.channel not in ready]:
                return hung[0], f"did not meet the others in {self.limit:.0f} seconds"
        return member, f"failed ({error})"

    def _lose(self, member: Member, fate: str) -> None:
        self.end(_end_with(member, fate))
        raise EngineLostError(self.lost)


def _end_with(member: Member, fate: str) -> str:
    return f"{member} {fate}, and the engine ended with it"


def started(run: Callable[..., object], seat: Seat, *arguments: Any) -> Member:
    """A process of this one that calls run(channel, seat, *arguments)."""
    CONTEXT.set_forkserver_preload([run.__module__])
    ours, theirs = CONTEXT.Pipe()
    name = f"kshot-rank-{seat.rank}"
    process = CONTEXT.Process(target=run, args=(theirs, seat, *arguments), daemon=True, name=name)
    with theirs, _without_main():
        process.start()
    return Member(seat, ours, process)


@contextmanager
def _without_main() -> Iterator[None]:
    """Processes that are started have nothing of this one's main module. multiprocessing would run it in each, and a
    script without `if __name__ == "__main__"` would start its own ranks there; ranks need nothing of it."""
    with _starting:
        main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


def _limit_sending(channel: Connection, limit: float) -> None:
    """Have `send` raise BlockingIOError where nothing is taken for so many seconds."""
    with socket.socket(fileno=os.dup(channel.fileno())) as end:
        value = struct.pack("ll", int(limit), int(limit % 1 * 1e6))  # a timeval
        end.setblocking(True)  # or it would take the default timeout of sockets, if there is one
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)


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


def serve(channel: Connection, perform: Callable[..., Any], settled: Callable[[], None]) -> bool:
    """In a rank: answer commands until nobody sends any; says whether that was told. settled: called after each, also
    one that was refused; before its answer is sent."""
    while True:
        try:
            command = receive(channel)
        except (EOFError, OSError):
            return False
        if command is None:
            return True
        send(channel, answer(perform, settled, *command))


def answer(call: Callable[..., Any], settled: Callable[[], None], *arguments: Any) -> tuple[str, Any]:
    """What a call gives, or how it failed."""
    try:
        try:
            result = DONE, call(*arguments)
        except KshotError as error:
            result = REFUSED, (type(error), str(error))
        settled()
        return result
    except BaseException as error:
        log.exception("a rank failed")
        return FAILED, in_a_line(error)


def in_a_line(error: BaseException) -> str:
    """An error's class, and the first line of what it says."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
