"""Continuous batching: sequences that share passes are what each would be alone, and nothing starves nothing.

What a sequence must be is computed by the stock model, the whole of it anew for every token.
"""

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from kshot.errors import ImageError, RequestError
from tests.vlm.helpers import disturb, plain_peft, stock_inputs
from vlm import nano
from vlm.inputs import ImageRule, model_input
from vlm.local import scheduler as scheduling
from vlm.local.clients import LocalTrainingClient
from vlm.local.engine import BASE, Engine, Snapshot
from vlm.local.model.attention import DecodeStep
from vlm.local.model.load import Model
from vlm.local.sampling import decoder as decoding
from vlm.local.sampling import sampler as sampling
from vlm.local.sampling.decoder import Decoder, TokenSequence
from vlm.local.sampling.sampler import SamplingRequest
from vlm.local.scheduler import Scheduler
from vlm.prompts import Prompt

SOON = 60  # seconds after which a test gives up
Sample = tuple[list[int], list[float]]  # tokens and their log-probabilities
Start = Callable[..., Future[types.SampleResponse]]
Samples = list[list[Sample]]  # of each request
ENDLESS = types.SamplingParams(stop=[], temperature=0.0)  # until the model's context is full


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(Model(nano.NAME))


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    made = Scheduler()
    yield made
    made.close()


@pytest.fixture
def sample(scheduler: Scheduler, engine: Engine) -> Start:
    """Start to sample from the model as it is."""
    return partial(scheduler.sample, engine, BASE)


@pytest.fixture(scope="module")
def requests(prompts: list[tinker.ModelInput], prompt: Prompt) -> list[SamplingRequest]:
    """Of every length and kind: greedy and drawn, one sample and several."""
    made = []
    for n, asked in enumerate([*prompts, model_input(prompt.tokenizer.encode("The quick brown fox " * 9))]):
        greedy = types.SamplingParams(max_tokens=3 + 2 * n, temperature=0.0, stop=[])
        drawn = types.SamplingParams(max_tokens=12 - 2 * n, temperature=1.3, seed=n, stop=[])
        made += [SamplingRequest(asked, greedy), SamplingRequest(asked, drawn, 1 + n % 3)]
    return made


@pytest.fixture(scope="module")
def alone(engine: Engine, stock: Any, requests: list[SamplingRequest], rule: ImageRule) -> Samples:
    """Of each request: what the stock model writes, sample by sample."""
    return [checked(stock, each, sampling.sample(engine, BASE, [each])[0], rule) for each in requests]


def checked(stock: Any, request: SamplingRequest, response: types.SampleResponse, rule: ImageRule) -> list[Sample]:
    """Tokens and log-probabilities of the samples, each token the one that a stock forward of those before it gives,
    by the inverse of the distribution function in numpy where it is drawn, with the numbers of the sample's own
    generator."""
    p, samples = request.params, list[Sample]()
    for number, sequence in enumerate(response.sequences):
        mixed = np.random.SeedSequence([p.seed or 0, number]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(mixed))
        stock.model.rope_deltas = None
        inputs = stock_inputs(model_input(*request.prompt.chunks, sequence.tokens), rule)
        with torch.no_grad():
            rows = stock(**inputs).logits[0, request.prompt.length - 1 : -1].double().numpy()
        tokens = rows.argmax(1).tolist()
        if p.temperature:
            mass = np.exp((rows - rows.max(1, keepdims=True)) / p.temperature).cumsum(1)
            drawn = [torch.rand((), generator=generator, dtype=torch.float64).item() for _ in rows]
            tokens = [int(np.searchsorted(row, draw * row[-1])) for row, draw in zip(mass, drawn, strict=True)]
        log_probs = [float(row[token] - np.logaddexp.reduce(row)) for row, token in zip(rows, tokens, strict=True)]
        samples.append((tokens, log_probs))
    assert_alone(response.sequences, samples)
    assert {len(tokens) for tokens, _ in samples} == {p.max_tokens}
    return samples


def assert_alone(sequences: Sequence[types.SampledSequence], expected: list[Sample]) -> None:
    assert [sequence.tokens for sequence in sequences] == [tokens for tokens, _ in expected]
    for sequence, (_, log_probs) in zip(sequences, expected, strict=True):
        assert sequence.logprobs == pytest.approx(log_probs, abs=1e-5)


def held(scheduler: Scheduler) -> Callable[[], None]:
    """Keep the scheduler busy until what is returned is called, so that all requests meanwhile arrive together."""
    gate, begun = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        gate.wait(SOON)

    scheduler.submit(hold)
    begun.wait(SOON)
    return gate.set


def passes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Of each pass of the text model from now on, whether it reads prompts or writes, and how many positions it has."""
    hidden, made = engine.model.text.hidden, list[tuple[str, int]]()

    def counted(inputs: Any, attention: Any, *args: Any) -> torch.Tensor:
        made.append(("write" if isinstance(attention, DecodeStep) else "read", len(inputs.ids)))
        return hidden(inputs, attention, *args)

    monkeypatch.setattr(engine.model.text, "hidden", counted)
    return made


def test_a_sequence_is_the_same_whoever_is_in_the_batch(
    engine: Engine, requests: list[SamplingRequest], alone: Samples
) -> None:
    """They join at different times, in pairs or alone, and leave as they end."""
    for order in (range(len(requests)), [7, 0, 11, 3, 2, 9, 5, 10, 1, 8, 4, 6]):
        decoder, answers, left = Decoder(engine, BASE, 64), dict[int, sampling.SamplingResult](), list(order)
        most = 0
        while left or decoder.active:
            some = [left.pop() for _ in range(min(len(left), 1 + len(left) % 2))]
            answers |= zip(some, sampling.prefill(decoder, [requests[n] for n in some]) if some else [], strict=True)
            most = max(most, len(decoder.step()))
        assert most >= 8
        for number, answer in answers.items():
            assert_alone(answer.response().sequences, alone[number])


@pytest.mark.parametrize(("rows", "cached"), [(2, 1 << 17), (64, 700)])
def test_those_that_find_no_row_or_no_room_wait(
    rows: int,
    cached: int,
    engine: Engine,
    requests: list[SamplingRequest],
    alone: Samples,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decoding, "CACHED", cached)
    decoder, made = Decoder(engine, BASE, rows), passes(engine, monkeypatch)
    answers = [sampling.prefill(decoder, [request])[0] for request in requests]
    assert not decoder.free_rows or rows == 64
    assert made == [("read", request.prompt.length) for request in requests]
    while decoder.active:
        decoder.step()
        capacity = decoder._cache.capacity if decoder._cache else 0
        assert len(decoder._running) == 1 or len(decoder._running) * (capacity - decoding.ROOM) <= cached
    assert 2 <= max(made[len(requests) :])[1] <= min(rows, 9)
    for answer, expected in zip(answers, alone, strict=True):
        assert_alone(answer.response().sequences, expected)


def test_many_threads_are_answered_together(
    sample: Start,
    engine: Engine,
    requests: list[SamplingRequest],
    alone: Samples,
    scheduler: Scheduler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """64 at once: far fewer passes than one by one; every token is told, in order."""
    made, told = passes(engine, monkeypatch), [dict[TokenSequence, list[int]]() for _ in range(64)]
    chosen = [n % len(requests) for n in range(64)]

    def request(n: int) -> Sequence[types.SampledSequence]:
        def note(sequence: TokenSequence) -> None:
            told[n].setdefault(sequence, []).append(sequence.tokens[-1])

        return sample(requests[chosen[n]], note).result(SOON).sequences

    release = held(scheduler)
    with ThreadPoolExecutor(64) as pool:
        answers = [pool.submit(request, n) for n in range(64)]
        while scheduler.waiting_samples < 64:
            threading.Event().wait(0.001)
        release()
        for n, answer in enumerate(answers):
            assert_alone(answer.result(), alone[chosen[n]])
            assert list(told[n].values()) == [sequence.tokens for sequence in answer.result()]
    written = sum(len(s.tokens) for answer in answers for s in answer.result())
    assert scheduler.tokens_sampled == written
    longest = max(len(tokens) for each in alone for tokens, _ in each)
    assert len(made) < 3 * longest + 10 < written / 5
    assert max(size for kind, size in made if kind == "write") == sampling.ROWS
    scheduler.submit(int).result(SOON)  # the turn in which the last answer was inputs is over
    assert (scheduler.waiting_jobs, scheduler.waiting_samples, scheduler.active_sequences) == (0, 0, 0)
    assert scheduler.busy_seconds > 0


def test_requests_take_as_many_passes_as_the_longest(
    sample: Start,
    engine: Engine,
    prompts: list[tinker.ModelInput],
    scheduler: Scheduler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, release = passes(engine, monkeypatch), held(scheduler)
    params = types.SamplingParams(max_tokens=9, temperature=0.0, stop=[])
    started = [sample(SamplingRequest(prompts[4], params)) for _ in range(40)]
    release()
    assert len({tuple(each.result(SOON).sequences[0].tokens) for each in started}) == 1
    assert made == [("read", 40 * prompts[4].length), *[("write", 40)] * 8]


def test_snapshots_take_turns(
    sample: Start,
    engine: Engine,
    requests: list[SamplingRequest],
    alone: Samples,
    client: LocalTrainingClient,
    stock: Any,
    rule: ImageRule,
    scheduler: Scheduler,
) -> None:
    disturb(client)
    tuned, tokens = engine.snapshot(client._run.adapter), list[str]()
    asked = [replace(request, params=request.params.model_copy(update={"max_tokens": 4})) for request in requests[:4]]
    plain = plain_peft(client, stock).base_model.model
    release = held(scheduler)
    base = sample(requests[2], lambda _: tokens.append("base"))
    started = [scheduler.sample(engine, tuned, request, lambda _: tokens.append("tuned")) for request in asked]
    release()
    written = [checked(plain, each, future.result(SOON), rule) for each, future in zip(asked, started, strict=True)]
    assert_alone(base.result(SOON).sequences, alone[2])
    assert written[2][0][0] != alone[2][0][0][:4]
    assert 0 < tokens.index("tuned") < tokens.index("base", tokens.index("tuned"))


BAD: dict[str, tuple[Callable[[SamplingRequest], SamplingRequest], type[Exception], str]] = {
    "off the vocabulary": (lambda a: replace(a, prompt=model_input([5, 4096])), RequestError, "4096 is outside"),
    "a broken image": (
        lambda a: replace(a, prompt=tinker.ModelInput(chunks=[types.ImageChunk(data=b"no", format="png")])),
        ImageError,
        "image",
    ),
    "a miscounted image": (
        lambda a: replace(
            a, prompt=tinker.ModelInput(chunks=[a.prompt.chunks[1].model_copy(update={"expected_tokens": 17})])
        ),
        RequestError,
        "Expected 17 tokens",
    ),
    "an asset": (
        lambda a: replace(
            a, prompt=tinker.ModelInput(chunks=[types.ImageAssetPointerChunk(location="x", format="png")])
        ),
        RequestError,
        "'image_asset_pointer' is not supported",
    ),
    "no sample": (lambda a: replace(a, num_samples=0), RequestError, "num_samples = 0"),
    "too much of the prompt": (
        lambda a: replace(a, prompt_logprobs=True, prompt_logprobs_last_n=10**6),
        RequestError,
        "prompt_logprobs_last_n = 1000000",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_request_fails_alone(
    sample: Start, kind: str, requests: list[SamplingRequest], alone: Samples, scheduler: Scheduler
) -> None:
    spoil, error, named = BAD[kind]
    release = held(scheduler)
    before, bad, after = (sample(request) for request in (requests[0], spoil(requests[0]), requests[1]))
    release()
    with pytest.raises(error, match=named):
        bad.result(SOON)
    for good, expected in ((before, alone[0]), (after, alone[1])):
        assert_alone(good.result(SOON).sequences, expected)


def test_who_raises_when_told_fails_alone(
    sample: Start, requests: list[SamplingRequest], alone: Samples, scheduler: Scheduler
) -> None:
    def third(sequence: TokenSequence) -> None:
        if len(sequence.tokens) == 3:
            raise OSError("nobody listens")

    release = held(scheduler)
    good, bad = sample(requests[1]), sample(requests[1], third)
    release()
    with pytest.raises(OSError, match="nobody listens"):
        bad.result(SOON)
    assert_alone(good.result(SOON).sequences, alone[1])


def test_a_pass_that_fails_fails_what_shares_it_and_no_more(
    sample: Start,
    engine: Engine,
    requests: list[SamplingRequest],
    alone: Samples,
    scheduler: Scheduler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scheduling, "ROWS", 2)
    hidden, left, other = engine.model.text.hidden, [2], Snapshot()

    def failing(inputs: Any, attention: Any, *args: Any) -> torch.Tensor:
        if isinstance(attention, DecodeStep) and len(inputs.ids) == 2:  # of the two requests below
            left[0] -= 1
            if left[0] == 0:
                raise torch.OutOfMemoryError("no memory")
        return hidden(inputs, attention, *args)

    monkeypatch.setattr(engine.model.text, "hidden", failing)
    release = held(scheduler)
    lost = [sample(request) for request in (requests[0], requests[1])]
    kept, waiting = scheduler.sample(engine, other, requests[0]), sample(requests[3])
    release()
    for each in lost:
        with pytest.raises(torch.OutOfMemoryError, match="no memory"):
            each.result(SOON)
    assert_alone(kept.result(SOON).sequences, alone[0])
    assert_alone(waiting.result(SOON).sequences, alone[3])
    assert_alone(sample(requests[1]).result(SOON).sequences, alone[1])


def test_a_full_context_ends_a_sequence_and_no_other(
    sample: Start,
    engine: Engine,
    requests: list[SamplingRequest],
    alone: Samples,
    scheduler: Scheduler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last token needs no position of its own: nothing is computed from it."""
    long, short = 2 * np.argsort([request.prompt.length for request in requests[::2]])[[-1, 0]]
    room = 2
    monkeypatch.setattr(engine.model, "context", requests[long].prompt.length + room)
    release = held(scheduler)
    full, fitting = (sample(SamplingRequest(requests[n].prompt, ENDLESS)) for n in (long, short))
    release()
    (cut,), (longer,) = full.result(SOON).sequences, fitting.result(SOON).sequences
    assert (cut.stop_reason, longer.stop_reason) == ("length", "length")
    assert cut.tokens == alone[long][0][0][: room + 1]
    assert len(longer.tokens) == requests[long].prompt.length + room + 1 - requests[short].prompt.length
    assert longer.tokens[: len(alone[short][0][0])] == alone[short][0][0]


def test_who_cancels_frees_the_rows(
    sample: Start,
    requests: list[SamplingRequest],
    alone: Samples,
    scheduler: Scheduler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scheduling, "ROWS", 2)
    going = threading.Semaphore(0)
    first, second = (sample(SamplingRequest(requests[0].prompt, ENDLESS), lambda _: going.release()) for _ in range(2))
    for _ in range(8):
        assert going.acquire(timeout=SOON)
    waiting, gone = sample(requests[1]), sample(requests[3])
    assert gone.cancel()
    brief = SamplingRequest(requests[2].prompt, types.SamplingParams(max_tokens=1, temperature=0.0))
    answer = sample(brief).result(SOON)  # needs no row
    assert answer.sequences[0].tokens == alone[2][0][0][:1]
    assert gone in wait([gone], SOON).done
    assert not waiting.done()
    assert first.cancel()
    assert_alone(waiting.result(SOON).sequences, alone[1])
    assert not second.done()
    assert second.cancel()  # who holds the future alone cancels as well
    for each in (first, second, gone):
        with pytest.raises(CancelledError):
            each.result(SOON)
    assert not waiting.cancel()
    scheduler.submit(int).result(SOON)
    scheduler.submit(int).result(SOON)
    assert scheduler.active_sequences == 0


def test_jobs_do_not_wait_for_sampling_to_end(
    sample: Start,
    engine: Engine,
    requests: list[SamplingRequest],
    client: LocalTrainingClient,
    mixed: list[tinker.Datum],
    scheduler: Scheduler,
) -> None:
    """A step of training runs on the engine between two tokens."""
    run = client._run
    started = sample(SamplingRequest(requests[0].prompt, ENDLESS))
    loss = scheduler.submit(engine.forward_backward, run, mixed, "cross_entropy", None).result(SOON)
    step = scheduler.submit(engine.optim_step, run, types.AdamParams(learning_rate=1e-3)).result(SOON)
    assert loss.metrics["loss:sum"] > 0
    assert step.metrics is not None
    assert not started.done()
    started.cancel()


def test_sampling_does_not_wait_for_all_jobs(
    sample: Start, requests: list[SamplingRequest], scheduler: Scheduler
) -> None:
    """A token comes after every job."""
    ran, seen = list[int](), list[int]()
    release = held(scheduler)
    jobs = [scheduler.submit(ran.append, n) for n in range(200)]
    started = sample(requests[0], lambda _: seen.append(len(ran)))
    assert (scheduler.waiting_jobs, scheduler.waiting_samples) == (200, 1)
    release()
    assert len(started.result(SOON).sequences[0].tokens) == len(seen) == 3
    assert all(after - before <= 1 for before, after in zip([0, *seen], seen, strict=False))
    for job in jobs:
        job.result(SOON)
    assert ran == list(range(200))


def test_jobs_fail_alone_and_are_not_begun_once_cancelled(scheduler: Scheduler) -> None:
    release, ran = held(scheduler), list[str]()

    def fail() -> None:
        raise ValueError("this one")

    futures: list[Future[Any]] = [
        scheduler.submit(ran.append, "a"),
        scheduler.submit(fail),
        scheduler.submit(ran.append, "b"),
    ]
    last = scheduler.submit(lambda word, times=1: word * times, "c", times=2)
    assert futures[2].cancel()
    release()
    assert last.result(SOON) == "cc"
    with pytest.raises(ValueError, match="this one"):
        futures[1].result(SOON)
    assert ran == ["a"]


def test_the_workers_own_thread_cannot_submit(
    sample: Start, requests: list[SamplingRequest], scheduler: Scheduler
) -> None:
    for call in (lambda: scheduler.submit(int), lambda: sample(requests[0])):
        with pytest.raises(RequestError, match="cannot ask its own service"):
            scheduler.submit(call).result(SOON)


def test_a_closed_scheduler_finishes_what_was_requested(
    sample: Start, requests: list[SamplingRequest], alone: Samples, scheduler: Scheduler
) -> None:
    release = held(scheduler)
    started, job = sample(requests[1]), scheduler.submit(int)
    scheduler.close(wait=False)
    for call in (lambda: scheduler.submit(int), lambda: sample(requests[0])):
        with pytest.raises(RequestError, match="connect again"):
            call()
    assert (scheduler.waiting_jobs, scheduler.waiting_samples, job.done()) == (1, 1, False)
    release()
    scheduler.close()
    assert job.done()
    assert started.done()
    assert_alone(started.result().sequences, alone[1])


def test_a_scheduler_that_nobody_has_ends_its_thread(engine: Engine, requests: list[SamplingRequest]) -> None:
    scheduler = Scheduler()
    thread = scheduler.submit(threading.current_thread).result(SOON)
    scheduler.sample(engine, BASE, requests[0]).result(SOON)
    del scheduler
    gc.collect()
    thread.join(SOON)
    assert not thread.is_alive()
