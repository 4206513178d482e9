"""What is costly, and what is refused, is answered at a limited rate; all else at once."""

from pathlib import Path

import pytest

from tests.vlm.raw import JSON, SESSION, refused, talking
from tests.vlm.serving import served
from vlm.server import guard
from vlm.server.limits import rate_limit
from vlm.server.limits.rate_limit import BURST, LONGEST, MOST, RATE, RateLimit, cost_of


def test_a_burst_at_once_then_a_rate() -> None:
    now = [100.0]
    limit = RateLimit(lambda: now[0])
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
    limit = RateLimit(lambda: now[0])
    for _ in range(1000):
        assert limit.wait("a", 100) <= LONGEST
    for number in range(MOST):
        limit.wait(str(number), 1)
    now[0] += 60
    limit.wait("b", 1)
    assert len(limit._full) <= 2


def test_what_is_limited() -> None:
    assert cost_of("/api/v1/training_runs") == cost_of("/api/v1/training_runs/x/checkpoints") == rate_limit.LIST
    assert cost_of("/api/v1/create_model") == rate_limit.CREATION
    assert cost_of("/api/v1/sessions/x") == rate_limit.LIST
    for path in ("forward_backward", "asample", "retrieve_future", "session_heartbeat", "training_runs/x"):
        assert not cost_of(f"/api/v1/{path}")


def test_lists_and_refusals_on_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many lists are refused; a refusal waits, and nothing else does. Here nobody waits: the seconds are noted."""
    limit, noted = RateLimit(lambda: 0.0), list[tuple[str, float]]()

    def wait(client: str, cost: float) -> float:
        noted.append((client, limit.wait(client, cost)))
        return noted[-1][1] if noted[-1][1] >= LONGEST else 0.0

    async def no_sleep(_: float) -> None:
        pass

    monkeypatch.setattr(guard, "_sleep", no_sleep)

    with served(tmp_path) as server, talking(server.address) as raw:
        run = raw.run(raw.session())
        monkeypatch.setattr(server.app.rate_limit, "wait", wait)
        lists = int((BURST + LONGEST * RATE) / rate_limit.LIST) + 1
        answers = [raw.http.get("/api/v1/training_runs") for _ in range(lists)]
        assert {each.status_code for each in answers[:-1]} == {200}
        assert "too often" in refused(answers[-1], 429)
        count = len(noted)
        assert raw.http.get(f"/api/v1/training_runs/{run}").status_code == 200
        assert len(noted) == count
        refused(raw.http.post(SESSION, content=b"{", headers=JSON), 429, "too often")
        broken = raw.http.post("/api/v1/session_heartbeat", content=b"{", headers=JSON)
        refused(broken, words="no JSON")
        assert (noted[-1][1], broken.headers["connection"]) == (LONGEST, "close")
        raw.http.post(SESSION, content=b"{", headers=JSON | {"X-API-Key": "another"})
        assert len({client for client, _ in noted}) == 1  # a key that nobody has checked makes no other client
