"""The rate limit of a client: refusals, lists, and requests that create something cost; all others are free.

A client that sends more of them than its rate waits for the answers, and beyond that is refused or loses its
connection. The generic cell rate algorithm (ITU-T I.371): a client may spend a burst at once, then a rate a second.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

RATE = 50.0  # a second
BURST = 400.0  # at once
REFUSAL, LIST, CREATION = 5.0, 10.0, 2.5  # what each costs
REFUSED = frozenset({400, 401, 403, 413, 415, 422, 429})  # 404 and 410 are answers that good clients ask for
LISTS = frozenset(f"/api/v1/{name}" for name in ("training_runs", "checkpoints", "sessions"))
CREATIONS = frozenset(f"/api/v1/create_{name}" for name in ("session", "model", "sampling_session"))
LONGEST = 2.0  # seconds that an answer waits; clients give up after more
MOST = 4096  # clients that are remembered; where there are more, those that have their whole burst are forgotten


@dataclass
class RateLimit:
    """clock: seconds. rate: what a client may spend a second."""

    clock: Callable[[], float] = time.monotonic
    rate: float = RATE
    _full: dict[str, float] = field(default_factory=dict)  # when a client has its whole burst again

    def wait(self, client: str, cost: float) -> float:
        """Seconds until an answer of this cost is sent, at most LONGEST."""
        now = self.clock()
        if len(self._full) >= MOST:
            self._full = {name: full for name, full in self._full.items() if full > now}
        full = max(now, self._full.get(client, now)) + cost / self.rate
        self._full[client] = min(full, now + BURST / self.rate + LONGEST)
        return max(0.0, self._full[client] - now - BURST / self.rate)


def cost_of(path: str) -> float:
    """Of a request, whatever its answer is."""
    if path in CREATIONS:
        return CREATION
    of_session = path.startswith("/api/v1/sessions/") and path.count("/") == 4  # it lists runs and samplers
    return LIST if path in LISTS or of_session or path.endswith("/checkpoints") else 0.0
