"""How soon a client is answered: refusals, lists and what makes new things at a limited rate, all else at once.

Who floods a server with what it refuses, or with what is costly to answer, waits for his answers himself, and takes no
more of the server than this rate. The generic cell rate algorithm (ITU-T I.371): a client has a burst at once, then a
rate a second.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

RATE = 50.0  # units a second
BURST = 400.0  # units at once
REFUSAL, LIST, NEW = 5.0, 10.0, 2.5  # units
REFUSED = frozenset({400, 401, 403, 413, 415, 422, 429})  # what is not there (404, 410) is asked for by good clients
LISTS = frozenset(f"/api/v1/{name}" for name in ("training_runs", "checkpoints", "sessions"))
CREATE = frozenset(f"/api/v1/create_{name}" for name in ("session", "model", "sampling_session"))
LONGEST = 2.0  # seconds that an answer waits: nobody's own clients give up for that
MOST = 4096  # clients that are remembered: beyond it those that wait for nothing are forgotten


@dataclass
class Pace:
    """clock: seconds. rate: units a second."""

    clock: Callable[[], float] = time.monotonic
    rate: float = RATE
    _free: dict[str, float] = field(default_factory=dict)  # when a client has its whole burst again

    def wait(self, client: str, units: float) -> float:
        """Seconds until an answer of so many units is sent, at most LONGEST."""
        now = self.clock()
        if len(self._free) >= MOST:
            self._free = {name: free for name, free in self._free.items() if free > now}
        free = max(now, self._free.get(client, now)) + units / self.rate
        self._free[client] = min(free, now + BURST / self.rate + LONGEST)
        return max(0.0, self._free[client] - now - BURST / self.rate)


def units_of(path: str) -> float:
    """Of a request, whatever its answer."""
    if path in CREATE:
        return NEW
    return LIST if path in LISTS or path.endswith("/checkpoints") else 0.0
