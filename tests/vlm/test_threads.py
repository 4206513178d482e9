"""How many threads a model computes with: by a clock that the test moves, and once for a model and a machine."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from kshot.errors import NotFiniteError
from vlm import nano
from vlm.local import threads
from vlm.local.clients import LocalSamplingClient
from vlm.local.registry import EngineRegistry
from vlm.local.threads import FreeCores, choose, fewest


@pytest.fixture
def engine(sampler: LocalSamplingClient) -> Any:
    return sampler._engine


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of the numbers; the environment says none, as a user's does not."""
    monkeypatch.setenv("KSHOT_CACHE", str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield tmp_path / threads.FILE
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("seconds", "most", "number"),
    [
        ({1: 1.0}, 1, 1),
        ({1: 1.0, 2: 0.97}, 2, 1),
        ({1: 1.0, 2: 0.6}, 2, 2),
        ({1: 1.0, 2: 0.6, 4: 0.59, 6: 0.8}, 6, 2),
        ({1: 8.0, 2: 4.0, 4: 2.0, 7: 1.2}, 7, 7),
    ],
)
def test_the_fewest_that_are_about_as_fast_as_any(
    seconds: dict[int, float], most: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However slow one step in three is."""
    now, steps = 0.0, 0
    monkeypatch.setattr(threads, "SECONDS", 1e9)

    def step() -> None:
        nonlocal now, steps
        now, steps = now + seconds[torch.get_num_threads()] * (7 if steps % 3 == 0 else 1), steps + 1

    torch.set_num_threads(1)
    assert fewest(step, most, lambda: now) == number
    assert steps == (1 + threads.ROUNDS) * len(seconds)
    assert torch.get_num_threads() == 1


def test_it_takes_two_rounds_where_they_are_slow() -> None:
    now = 0.0

    def step() -> None:
        nonlocal now
        now += 10.0 / torch.get_num_threads()

    assert fewest(step, 2, lambda: now) == 2
    assert now == 30.0


def test_a_model_that_cannot_make_a_step_is_not_measured(
    engine: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own error is for where it is used."""
    weight = engine.model.stock.get_parameter("model.language_model.layers.1.mlp.down_proj.weight")
    with monkeypatch.context() as context, torch.no_grad():
        context.setattr(weight, "data", torch.full_like(weight, torch.nan))
        with pytest.raises(NotFiniteError):
            threads._step(engine, threads.LEAST)()
        assert choose(engine, 2) == 2
    assert not cache.exists()


def test_a_model_is_measured_once(engine: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_times", Quiet)
    asked = []
    monkeypatch.setattr(threads, "fewest", lambda step, most: (step(), asked.append(most), 2)[-1])
    assert choose(engine, 2) == 2
    assert [*json.loads(cache.read_text()).values()] == [2]
    assert choose(engine, 2) == 2
    assert asked == [2]
    cache.write_text("[1")
    choose(engine, 2)
    choose(engine, 3)
    assert asked == [2, 2, 3]  # anew where it cannot be read, and for another machine
    assert len(json.loads(cache.read_text())) == 2


class Quiet(tuple[float, ...]):
    """Of a machine on which nothing else runs."""

    idle = 0.0

    def __new__(cls) -> "Quiet":
        return super().__new__(cls, (0.0,))


def test_a_number_from_beside_other_programs_is_not_kept(
    engine: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = iter((0.0, 1e9))
    monkeypatch.setattr(threads, "_busy", lambda: next(busy))
    monkeypatch.setattr(threads, "fewest", lambda *_: 1)
    assert choose(engine, 2) == 1
    assert not cache.exists()


def test_who_says_a_number_has_it_and_a_large_model_has_all(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "fewest", None)
    assert choose(engine, 1) == 1
    monkeypatch.setattr(threads, "WORK", threads.WORK / 100)
    assert choose(engine, 64) == 64
    monkeypatch.undo()
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setattr(threads, "fewest", None)
    assert choose(engine, 5) == 5


def test_a_service_sets_it_where_it_computes(tmp_path: Path) -> None:
    registry = EngineRegistry(tmp_path, threads=2)
    try:
        assert registry.submit(lambda: (registry.engine(nano.NAME), torch.get_num_threads())[1]).result() == 2
        assert registry.chosen == {nano.NAME: 2}
    finally:
        registry.scheduler.close()


def test_no_more_threads_than_cores_that_others_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    now = busy = own = 0.0
    monkeypatch.setattr(threads, "_busy", lambda: busy)
    monkeypatch.setattr(threads.time, "process_time", lambda: own)
    fit = FreeCores(3, clock=lambda: now, cores=4)

    def after(seconds: float, mine: float, others: float) -> int:
        nonlocal now, busy, own
        now, busy, own = now + seconds, busy + (mine + others) * seconds, own + mine * seconds
        fit()
        return torch.get_num_threads()

    torch.set_num_threads(3)
    assert after(1.0, mine=3.0, others=0.0) == 3
    assert after(1.0, mine=2.5, others=1.4) == 3
    assert after(1.0, mine=2.0, others=1.8) == 2
    assert after(threads.WINDOW / 2, mine=1.0, others=3.0) == 2  # too short to count
    assert after(threads.WINDOW / 2, mine=1.0, others=3.0) == 1
    assert after(1.0, mine=0.5, others=9.0) == 1
    assert after(1.0, mine=1.0, others=0.1) == 3


def test_a_server_has_a_core_for_its_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm.local.registry.choose", lambda _, most: most)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    for told, number in ({}, 3), ({"OMP_NUM_THREADS": "4"}, 4):
        registry = EngineRegistry(tmp_path, spare=1)
        try:
            with monkeypatch.context() as context:
                context.delenv("OMP_NUM_THREADS", raising=False)
                for name, value in told.items():
                    context.setenv(name, value)
                registry.submit(registry.engine, nano.NAME).result()
            assert registry.chosen == {nano.NAME: number}
        finally:
            registry.scheduler.close()


def test_a_number_that_was_said_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for said, number in ({"threads": 2}, 2), ({}, 3):
        registry = EngineRegistry(tmp_path, **said)
        try:
            with monkeypatch.context() as context:
                context.setattr(torch, "get_num_threads", lambda: 4)
                context.setattr("vlm.local.registry.choose", lambda *_: 3)
                registry.submit(registry.engine, nano.NAME).result()
            assert registry.chosen == {nano.NAME: number}
            assert (registry.scheduler.before_step is None) == bool(said)
        finally:
            registry.scheduler.close()
