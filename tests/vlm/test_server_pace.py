"""What is costly, and what is refused, is answered at a limited rate; all else at once."""

from pathlib import Path

import pytest

from tests.vlm.raw import JSON, SESSION, refused, talking
from tests.vlm.serving import served
from vlm.server.limits import pace
from vlm.server.limits.pace import BURST, LONGEST, MOST, RATE, Pace, units_of


def test_a_burst_at_once_then_a_rate() -> None:
    now = [100.0]
    limit = Pace(lambda: now[0])
    assert sum(limit.wait("a", 10) for _ in range(int(BURST / 10))) == pytest.approx(0)
    assert limit.wait("a", 10) == pytest.approx(10 / RATE)
    assert limit.wait("a", 10) == pytest.approx(20 / RATE)
    assert limit.wait("b", 10) == 0  # another client
    now[0] += 30 / RATE
    assert limit.wait("a", 10) == pytest.approx(0, abs=1e-9)
    now[0] += BURST / RATE
    assert limit.wait("a", BURST - 10) == pytest.approx(0, abs=1e-9)


def test_nobody_waits_for_long_and_few_are_remembered() -> None:
    now = [0.0]
    limit = Pace(lambda: now[0])
    for _ in range(1000):
        assert limit.wait("a", 100) <= LONGEST
    for number in range(MOST):
        limit.wait(str(number), 1)
    now[0] += 60
    limit.wait("b", 1)
    assert len(limit._free) <= 2


def test_what_is_limited() -> None:
    assert units_of("/api/v1/training_runs") == units_of("/api/v1/training_runs/x/checkpoints") == pace.LIST
    assert units_of("/api/v1/create_model") == pace.NEW
    for path in ("forward_backward", "asample", "retrieve_future", "session_heartbeat", "training_runs/x"):
        assert not units_of(f"/api/v1/{path}")


class Noted(Pace):
    """Nobody waits, and how long he would have is noted."""

    def __init__(self) -> None:
        super().__init__(lambda: 0.0)
        self.held: list[float] = []

    def wait(self, client: str, units: float) -> float:
        self.held.append(super().wait(client, units))
        return self.held[-1] if self.held[-1] >= LONGEST else 0.0


def test_lists_and_refusals_on_a_server(tmp_path: Path) -> None:
    """Too many lists are refused; a refusal is held for its turn, and nothing else is."""
    with served(tmp_path) as server, talking(server.address) as raw:
        run, noted = raw.run(raw.session()), Noted()
        object.__setattr__(server.app, "pace", noted)
        lists = int((BURST + LONGEST * RATE) / pace.LIST) + 1
        answers = [raw.http.get("/api/v1/training_runs") for _ in range(lists)]
        assert {each.status_code for each in answers[:-1]} == {200}
        assert "too often" in refused(answers[-1], 429)
        count = len(noted.held)
        assert raw.http.get(f"/api/v1/training_runs/{run}").status_code == 200
        assert len(noted.held) == count
        refused(raw.http.post(SESSION, content=b"{", headers=JSON), 429, "too often")
        refused(raw.http.post("/api/v1/session_heartbeat", content=b"{", headers=JSON), words="no JSON")
        assert noted.held[-1] == LONGEST
