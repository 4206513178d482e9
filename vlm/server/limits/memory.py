"""The one budget of memory that a server has: what clients make it hold is taken from here before it is there.

Bytes are taken by kind and given back when the thing is gone. Sizes are upper bounds of what Python and its libraries
need, made of shapes and counts before anything is built. The models themselves, their caches of features and the
passes of the engine are not in it: they do not grow with what clients send.
"""

import re
from collections import Counter, deque
from collections.abc import Mapping
from threading import Lock
from weakref import finalize

import psutil

from kshot.errors import BusyError, InputError, TooLargeError
from vlm.local.registry import group_free_bytes

BODIES, MESSAGES, IMAGES = "bodies", "messages", "images"  # as received, parsed, and their pixels
HELD, QUEUES = "held", "queues"  # requests of runs before whose number another is missing; all others that wait
ADAPTERS, SAMPLERS, ANSWERS = "adapters", "samplers", "answers"  # runs with their optimizers, snapshots, results
KINDS = BODIES, MESSAGES, IMAGES, HELD, QUEUES, ADAPTERS, SAMPLERS, ANSWERS
# The most of the limit that may be taken by a kind that does not go away by itself. Together they leave a quarter to
# all others: so that what is held can be followed by the request that it waits for.
SHARES: Mapping[str, float] = {ADAPTERS: 3 / 8, SAMPLERS: 1 / 8, HELD: 1 / 8, IMAGES: 1 / 8}
SMALL = 1 << 20  # bytes of a request that may take the last eighth too: small ones are answered beside large ones
LAST = 1 / 8
DEFAULT = 1 / 4  # of the machine's memory, or of what the process's control groups leave
LEAST = 64 << 20
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class Memory:
    """A number of bytes, and how many of them are taken, by kind. Safe from any thread.

    limit: by default `default_limit`.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = default_limit() if limit is None else limit
        self._taken, self._total, self._lock = Counter[str](), 0, Lock()
        self._freed = deque["Reservation"]()  # by the garbage collector, which may come while the lock is held

    def take(self, kind: str, size: int = 0) -> "Reservation":
        """A reservation of so many bytes. Raises as `Reservation.grow`."""
        reservation = Reservation(self, kind)
        reservation.grow(size)
        return reservation

    @property
    def taken(self) -> dict[str, int]:
        """Bytes by kind."""
        self._collect()
        return {kind: self._taken[kind] for kind in KINDS}

    def change(self, old: tuple[str, int], new: tuple[str, int], *, forced: bool) -> None:
        """Put the second (kind, bytes) in place of the first; `Reservation` calls it. Raises as `Reservation.grow`."""
        self._collect()
        (kind, size), more = new, new[1] - old[1]
        if size < 0:
            raise ValueError(f"{size} bytes of {kind}")
        with self._lock:
            if not forced and size > (0 if old[0] != kind else old[1]):
                self._check(kind, size, more, self._taken[kind] + size - (old[1] if old[0] == kind else 0))
            self._taken[old[0]] -= old[1]
            self._taken[kind] += size
            self._total += more

    def free(self, reservation: "Reservation") -> None:
        """Release a reservation later; for what may be called at any moment."""
        self._freed.append(reservation)

    def _check(self, kind: str, size: int, more: int, of_kind: int) -> None:
        share = SHARES.get(kind, 1.0)
        never = 1 - LAST if kind == HELD else min(share, 1 - LAST)  # what is held fits later, when its turn comes
        if size > self.limit * never:
            raise TooLargeError(
                f"{kind} of {size:,} bytes are more than this server takes (its --memory is {self.limit:,} bytes); "
                "ask for less at once"
            )
        room = self.limit * (1.0 if size <= SMALL else 1 - LAST)
        if of_kind > self.limit * share or (more > 0 and self._total + more > room):
            busy = ", ".join(f"{name} {taken >> 20:,} MB" for name, taken in self._taken.most_common(3) if taken)
            raise BusyError(f"no memory for {kind} of {size:,} bytes more ({busy}); send it again later")

    def _collect(self) -> None:
        while self._freed:
            self._freed.popleft().release()


class Reservation:
    """Bytes of one kind; released once, by `release` or at the end of a `with`."""

    def __init__(self, memory: Memory, kind: str) -> None:
        self._memory, self.kind, self.size = memory, kind, 0

    def __enter__(self) -> "Reservation":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def grow(self, more: int, *, forced: bool = False) -> None:
        """Take more. Raises TooLargeError where this alone is beyond the limit, BusyError where it is beside others.

        forced: never raises; for what is there already.
        """
        self.become(self.kind, self.size + more, forced=forced)

    def become(self, kind: str, size: int | None = None, *, forced: bool = False) -> None:
        """Be of another kind and, where it is given, of another size; raises as `grow`, and is then as it was."""
        size = self.size if size is None else size
        if kind == self.kind and size == self.size:
            return
        self._memory.change((self.kind, self.size), (kind, size), forced=forced)
        self.kind, self.size = kind, size

    def hand_over(self) -> "Reservation":
        """All of it as a reservation of another owner's; this one is empty then."""
        other = Reservation(self._memory, self.kind)
        other.size, self.size = self.size, 0
        return other

    def release(self) -> None:
        """Give it back."""
        self.become(self.kind, 0, forced=True)

    def release_with(self, thing: object) -> None:
        """Give it back when nobody has this object any more."""
        finalize(thing, self._memory.free, self).atexit = False


def default_limit() -> int:
    """A quarter of the machine's memory, or of what the limits of this process's control groups leave (bytes)."""
    return int(min(psutil.virtual_memory().total, group_free_bytes()) * DEFAULT)


def size_of(text: str) -> int:
    """Bytes of a text as 4GB, 512M or 1073741824; units are powers of 1,024. Raises InputError for another, and for
    less than LEAST."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if size < LEAST:
        raise InputError(f"--memory {text!r}: give {LEAST >> 20}MB or more, as a number of bytes or as 4GB")
    return size


def readable(size: int) -> str:
    """Bytes as people read them: 4.0 GB."""
    return f"{size / UNITS['G']:.1f} GB" if size >= UNITS["G"] else f"{size / UNITS['M']:.0f} MB"
