"""A long training pass gives way: others sample between its packs, it can be cancelled there, and it is computed as if
it were alone."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from kshot.errors import RequestError
from tests.vlm.helpers import disturb, gradients_of, taken
from tests.vlm.raw import PROMPT, Raw, accepted, sample_of, until
from tests.vlm.serving import Server
from vlm import nano
from vlm.local import packs as packing
from vlm.local import scheduler as schedulers
from vlm.local.clients import LocalSamplingClient, LocalTrainingClient, SamplingRequest
from vlm.local.engine import Engine
from vlm.local.registry import LocalServiceClient

SOON = 60
PACKS = 8
FEW = types.SamplingParams(max_tokens=4, temperature=0.0, stop=[])


@pytest.fixture
def long(mixed: list[tinker.Datum], monkeypatch: pytest.MonkeyPatch) -> list[tinker.Datum]:
    """Data of PACKS packs, with images."""
    monkeypatch.setattr(packing, "PACK", 1)
    return (mixed * PACKS)[:PACKS]


class Packs:
    """Counts the packs of training, and stops before one of them until it is told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.stop_before = 0, 0
        self.there, self.go_on = threading.Event(), threading.Event()
        log_probs = Engine._log_probs

        def counted(*args: Any) -> torch.Tensor:
            self.begun += 1
            if self.begun == self.stop_before:
                self.there.set()
                assert self.go_on.wait(SOON)
            return log_probs(*args)

        monkeypatch.setattr(Engine, "_log_probs", counted)

    def stopped(self, before: int, start: Callable[[], Any]) -> Any:
        """What `start` gives, once its pack of this number is about to begin."""
        self.stop_before = self.begun + before
        started = start()
        assert self.there.wait(SOON)
        return started


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> Packs:
    return Packs(monkeypatch)


def values(output: types.ForwardBackwardOutput) -> list[np.ndarray]:
    return [each["logprobs"].to_numpy() for each in output.loss_fn_outputs]


def test_a_pass_among_samples_is_bit_for_bit_the_pass_alone(
    service: LocalServiceClient,
    sampler: LocalSamplingClient,
    client: LocalTrainingClient,
    long: list[tinker.Datum],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where samples come of the run's own snapshot, and of another run, whose gradients do not mix with it;
    between packs and within them."""
    monkeypatch.setattr(schedulers, "GIVE_WAY_AFTER", 0.0)
    other = service.create_lora_training_client(nano.NAME, rank=2, seed=8).result()
    for run, seed in ((client, 0), (other, 1)):
        disturb(run, seed)
    own, foreign = (run.save_weights_and_get_sampling_client().result() for run in (client, other))
    request = SamplingRequest(PROMPT, types.SamplingParams(max_tokens=12, temperature=1.0, seed=3, stop=[]), 2)
    samples = [each.start(request).result(SOON).sequences for each in (sampler, own, foreign)]
    data = list(reversed(long))[:3]
    alone, of_other = [], []
    for run, some, made in ((client, long, alone), (other, data, of_other)):
        made += [run.forward_backward(some, "cross_entropy").result(SOON), taken(run)]
    started = [each.start(request) for each in (sampler, own, foreign)]
    output = client.forward_backward(long, "cross_entropy")
    second = other.forward_backward(data, "cross_entropy")
    again = [each.result(SOON).sequences for each in started]
    for before, after in zip(samples, again, strict=True):
        assert [each.tokens for each in before] == [each.tokens for each in after]
    assert output.result(SOON).metrics == alone[0].metrics
    assert all(np.array_equal(a, b) for a, b in zip(values(output.result()), values(alone[0]), strict=True))
    second.result(SOON)
    for run, made in ((client, alone), (other, of_other)):
        assert all(torch.equal(gradient, made[1][name]) for name, gradient in gradients_of(run).items())


def test_a_sample_waits_for_packs_and_not_for_the_pass(
    service: LocalServiceClient,
    sampler: LocalSamplingClient,
    client: LocalTrainingClient,
    long: list[tinker.Datum],
    packs: Packs,
) -> None:
    """Its tokens come one a pack at least, and a sampling client that is made meanwhile waits for one pack as well."""
    passed = packs.stopped(2, lambda: client.forward_backward(long, "cross_entropy"))
    step = client.optim_step(types.AdamParams(learning_rate=1e-3))
    seen: list[int] = []
    started = sampler.start(SamplingRequest(PROMPT, FEW), lambda _: seen.append(packs.begun))
    made: list[int] = []
    created = service.create_sampling_client(base_model=nano.NAME)
    created.future().add_done_callback(lambda _: made.append(packs.begun))
    packs.go_on.set()
    assert len(started.result(SOON).sequences[0].tokens) == 4
    passed.result(SOON)
    step.result(SOON)
    assert seen[0] == 2
    assert seen[-1] <= 5 < PACKS
    assert made == [2]


def test_runs_take_turns(service: LocalServiceClient, mixed: list[tinker.Datum], packs: Packs) -> None:
    """Of one that sends much, a run that sends little waits for one request; each run's are in order."""
    much, little = (service.create_lora_training_client(nano.NAME, rank=2, seed=n).result() for n in (1, 2))
    order: list[tuple[str, int]] = []

    def sent(name: str, run: LocalTrainingClient, number: int) -> Any:
        future = run.forward(mixed[:1], "cross_entropy")
        future.future().add_done_callback(lambda _: order.append((name, number)))
        return future

    first = packs.stopped(1, lambda: sent("much", much, 0))
    waiting = [sent("much", much, n) for n in range(1, 5)] + [sent("little", little, n) for n in range(2)]
    packs.go_on.set()
    for each in (first, *waiting):
        each.result(SOON)
    assert order[:5] == [("much", 0), ("much", 1), ("little", 0), ("much", 2), ("little", 1)]
    assert order[5:] == [("much", 3), ("much", 4)]


def test_a_sample_waits_for_a_layer_and_not_for_the_pack(
    sampler: LocalSamplingClient,
    client: LocalTrainingClient,
    mixed: list[tinker.Datum],
    packs: Packs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All its tokens come within the one pack, forwards and backwards, and change none of its numbers."""
    alone, gradients = client.forward_backward(mixed, "cross_entropy").result(SOON), taken(client)
    monkeypatch.setattr(schedulers, "GIVE_WAY_AFTER", 0.0)
    passed = packs.stopped(1, lambda: client.forward_backward(mixed, "cross_entropy"))
    seen: list[bool] = []
    started = sampler.start(SamplingRequest(PROMPT, FEW), lambda _: seen.append(passed.future().done()))
    packs.go_on.set()
    assert passed.result(SOON).metrics == alone.metrics
    started.result(SOON)
    assert seen == [False] * 4
    assert all(torch.equal(gradient, gradients[name]) for name, gradient in gradients_of(client).items())


def test_a_cancelled_pass_ends_at_the_next_pack_and_leaves_no_gradient(
    client: LocalTrainingClient, long: list[tinker.Datum], packs: Packs
) -> None:
    client.forward_backward(long[:1], "cross_entropy").result(SOON)
    passed = packs.stopped(4, lambda: client.forward_backward(long, "cross_entropy"))
    behind = client.forward(long[:1], "cross_entropy")
    assert passed.future().cancel()
    packs.go_on.set()
    with pytest.raises(CancelledError):
        passed.result(SOON)
    behind.result(SOON)
    assert packs.begun == 1 + 4 + 1
    assert all(not gradient.any() for gradient in gradients_of(client).values())
    with pytest.raises(RequestError, match="without gradients"):
        client.optim_step(types.AdamParams()).result(SOON)


def test_a_custom_loss_gives_way_and_ends_too(
    sampler: LocalSamplingClient, client: LocalTrainingClient, long: list[tinker.Datum], packs: Packs
) -> None:
    def loss(_: Any, log_probs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return sum((each.square().sum() for each in log_probs), torch.zeros(())), {}

    alone = client.forward_backward_custom(long, loss).result(SOON)
    gradients = taken(client)
    started = sampler.start(SamplingRequest(PROMPT, FEW))
    assert client.forward_backward_custom(long, loss).result(SOON).metrics == alone.metrics
    started.result(SOON)
    assert all(torch.equal(gradient, gradients[name]) for name, gradient in taken(client).items())
    passed = packs.stopped(PACKS + 3, lambda: client.forward_backward_custom(long, loss))
    assert passed.future().cancel()
    packs.go_on.set()
    client.get_info()
    client.forward(long[:1], "cross_entropy").result(SOON)
    assert packs.begun == 4 * PACKS + PACKS + 3 + 1
    assert all(not gradient.any() for gradient in gradients_of(client).values())


# On a server


@pytest.fixture
def stopped(raw: Raw, long: list[tinker.Datum], packs: Packs) -> Iterator[tuple[str, str, str]]:
    """Session and run of a pass that stands before its third pack, and the pass."""
    session = raw.session()
    run = raw.run(session)
    yield session, run, packs.stopped(3, lambda: accepted(raw.pass_of(run, 1, long)))
    packs.go_on.set()


def test_a_training_request_can_be_cancelled(
    server: Server, raw: Raw, stopped: tuple[str, str, str], packs: Packs, long: list[tinker.Datum]
) -> None:
    """The one that runs, one that waits for the engine, and one that waits for a number."""
    _, run, running = stopped
    queued, kept, held = (accepted(raw.pass_of(run, seq, long[:1])) for seq in (2, 3, 5))
    for request_id in (running, queued, held, "0" * 32):
        assert raw.post("cancel_future", request_id=request_id).status_code == 204
    packs.go_on.set()
    for request_id in (running, queued):
        assert raw.answer(request_id)["error"] == "the request was cancelled"
    raw.output(kept)
    raw.output(accepted(raw.pass_of(run, 4, long[:1])))
    assert raw.answer(held)["error"] == "the request was cancelled"
    raw.output(accepted(raw.pass_of(run, 6, long[:1])))
    assert packs.begun == 3 + 3
    assert not server.state.runs[run].cancelled


def test_a_finished_session_ends_its_passes(
    server: Server, raw: Raw, stopped: tuple[str, str, str], packs: Packs
) -> None:
    session, run, running = stopped
    assert raw.post(f"sessions/{session}/finish", reason={}, detail=None).status_code == 204
    assert "was finished" in raw.answer(running)["error"]
    packs.go_on.set()
    raw.sampled(raw.submit("asample", **sample_of(PROMPT, max_tokens=2)))
    until(lambda: server.state.registry.scheduler.waiting_jobs == 0)
    assert packs.begun == 3
    assert run not in server.state.runs
