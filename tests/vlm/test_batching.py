"""Continuous batching: sequences that share passes are what each would be alone, and nothing starves nothing.

What a sequence must be is computed by the stock model, the whole of it anew for every token.
"""

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from kshot.errors import ImageError, RequestError
from tests.vlm.helpers import disturb, plain_peft, stock_inputs
from vlm.inputs import ImageRule, model_input
from vlm.local import scheduler as scheduling
from vlm.local.clients import LocalSamplingClient, LocalTrainingClient
from vlm.local.engine import Engine
from vlm.local.model.attention import DecodeStep
from vlm.local.model.lora import LoraSpec
from vlm.local.sampling import decoder as decoding
from vlm.local.sampling import sampler as sampling
from vlm.local.sampling.decoder import Decoder, TokenSequence
from vlm.local.sampling.sampler import SamplingRequest
from vlm.local.scheduler import Scheduler
from vlm.prompts import Prompt

SOON = 60  # seconds after which a test gives up
Sample = tuple[list[int], list[float]]  # tokens and their log-probabilities
Samples = list[list[Sample]]  # of each request
ENDLESS = types.SamplingParams(stop=[], temperature=0.0)  # until the model's context is full


@pytest.fixture(scope="module")
def engine(sampler: LocalSamplingClient) -> Engine:
    """The session's, whose own scheduler has nothing to do meanwhile."""
    return sampler._engine


@pytest.fixture(scope="module")
def requests(prompts: list[tinker.ModelInput], prompt: Prompt) -> list[SamplingRequest]:
    """Of every length and kind: greedy and drawn, one sample and several."""
    made = []
    for n, asked in enumerate([*prompts, model_input(prompt.tokenizer.encode("The quick brown fox " * 9))]):
        greedy = types.SamplingParams(max_tokens=3 + 2 * n, temperature=0.0, stop=[])
        drawn = types.SamplingParams(max_tokens=12 - 2 * n, temperature=1.3, seed=n, stop=[])
        made += [SamplingRequest(asked, greedy), SamplingRequest(asked, drawn, 1 + n % 3)]
    return made


@dataclass(frozen=True)
class Desk:
    """An engine, requests with what the stock model writes for each, sample by sample, and a scheduler."""

    engine: Engine
    requests: list[SamplingRequest]
    alone: Samples
    scheduler: Scheduler

    def sample(
        self, request: SamplingRequest, on_token: scheduling.OnToken | None = None
    ) -> Future[types.SampleResponse]:
        """Start to sample from the model as it is."""
        return self.scheduler.sample(self.engine, None, request, on_token)

    def hold(self) -> Callable[[], None]:
        """Keep the scheduler busy until what is returned is called, so that all requests meanwhile arrive together."""
        gate, begun = threading.Event(), threading.Event()
        self.scheduler.submit(lambda: (begun.set(), gate.wait(SOON)))
        begun.wait(SOON)
        return gate.set

    def assert_alone(self, number: int, answer: Future[types.SampleResponse]) -> None:
        assert_alone(answer.result(SOON).sequences, self.alone[number])


@pytest.fixture(scope="module")
def alone(engine: Engine, stock: Any, requests: list[SamplingRequest], rule: ImageRule) -> Samples:
    return [checked(stock, each, sampling.sample(engine, None, [each])[0], rule) for each in requests]


@pytest.fixture
def desk(engine: Engine, requests: list[SamplingRequest], alone: Samples) -> Iterator[Desk]:
    made = Desk(engine, requests, alone, Scheduler())
    yield made
    made.scheduler.close()


@pytest.fixture
def passes(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Of each pass of the text model, whether it reads prompts or writes, and how many positions it has."""
    hidden, made = desk.engine.model.text.hidden, list[tuple[str, int]]()

    def counted(inputs: Any, attention: Any, *args: Any) -> torch.Tensor:
        made.append(("write" if isinstance(attention, DecodeStep) else "read", len(inputs.ids)))
        return hidden(inputs, attention, *args)

    monkeypatch.setattr(desk.engine.model.text, "hidden", counted)
    return made


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
        allowed = rows.copy()  # what stands for an image is never written
        allowed[:, [stock.config.image_token_id, stock.config.video_token_id]] = -np.inf
        tokens = allowed.argmax(1).tolist()
        if p.temperature:
            mass = np.exp((allowed - allowed.max(1, keepdims=True)) / p.temperature).cumsum(1)
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
        assert sequence.logprobs == pytest.approx(log_probs, abs=5e-5)


def test_a_sequence_is_the_same_whoever_is_in_the_batch(desk: Desk) -> None:
    """They join at different times, in pairs or alone, and leave as they end."""
    requests = desk.requests
    for order in (range(len(requests)), [7, 0, 11, 3, 2, 9, 5, 10, 1, 8, 4, 6]):
        decoder, answers, left = Decoder(desk.engine, None, 64), dict[int, sampling.SamplingResult](), list(order)
        most = 0
        while left or decoder.active:
            some = [left.pop() for _ in range(min(len(left), 1 + len(left) % 2))]
            answers |= zip(some, sampling.prefill(decoder, [requests[n] for n in some]) if some else [], strict=True)
            most = max(most, len(decoder.step()))
        assert most >= 8
        for number, answer in answers.items():
            assert_alone(answer.response().sequences, desk.alone[number])


@pytest.mark.parametrize(("rows", "cached"), [(2, 1 << 17), (64, 700)])
def test_those_that_find_no_row_or_no_room_wait(
    rows: int, cached: int, desk: Desk, passes: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "CACHED", cached)
    decoder = Decoder(desk.engine, None, rows)
    answers = [sampling.prefill(decoder, [request])[0] for request in desk.requests]
    assert not decoder.free_rows or rows == 64
    assert passes == [("read", request.prompt.length) for request in desk.requests]
    while decoder.active:
        decoder.step()
        capacity = decoder._cache.capacity if decoder._cache else 0
        assert len(decoder._running) == 1 or len(decoder._running) * (capacity - decoding.ROOM) <= cached
    assert 2 <= max(passes[len(desk.requests) :])[1] <= min(rows, 9)
    for answer, expected in zip(answers, desk.alone, strict=True):
        assert_alone(answer.response().sequences, expected)


def test_many_threads_are_answered_together(desk: Desk, passes: list[tuple[str, int]]) -> None:
    """64 at once: far fewer passes than one by one; every token is told, in order."""
    told, scheduler = [dict[TokenSequence, list[int]]() for _ in range(64)], desk.scheduler
    chosen = [n % len(desk.requests) for n in range(64)]

    def request(n: int) -> Sequence[types.SampledSequence]:
        def note(sequence: TokenSequence) -> None:
            told[n].setdefault(sequence, []).append(sequence.tokens[-1])

        return desk.sample(desk.requests[chosen[n]], note).result(SOON).sequences

    release = desk.hold()
    with ThreadPoolExecutor(64) as pool:
        answers = [pool.submit(request, n) for n in range(64)]
        while scheduler.waiting_samples < 64:
            threading.Event().wait(0.001)
        release()
        for n, answer in enumerate(answers):
            assert_alone(answer.result(), desk.alone[chosen[n]])
            assert list(told[n].values()) == [sequence.tokens for sequence in answer.result()]
    written = sum(len(s.tokens) for answer in answers for s in answer.result())
    assert scheduler.tokens_sampled == written
    longest = max(len(tokens) for each in desk.alone for tokens, _ in each)
    assert len(passes) < 3 * longest + 10 < written / 5
    assert max(size for kind, size in passes if kind == "write") == sampling.ROWS
    scheduler.submit(int).result(SOON)  # the turn in which the last answer was given is over
    assert (scheduler.waiting_jobs, scheduler.waiting_samples, scheduler.active_sequences) == (0, 0, 0)
    assert scheduler.busy_seconds > 0


def test_requests_take_as_many_passes_as_the_longest(
    desk: Desk, prompts: list[tinker.ModelInput], passes: list[tuple[str, int]]
) -> None:
    release = desk.hold()
    params = types.SamplingParams(max_tokens=9, temperature=0.0, stop=[])
    started = [desk.sample(SamplingRequest(prompts[4], params)) for _ in range(40)]
    release()
    assert len({tuple(each.result(SOON).sequences[0].tokens) for each in started}) == 1
    assert passes == [("read", 40 * prompts[4].length), *[("write", 40)] * 8]


def test_snapshots_take_turns(desk: Desk, client: LocalTrainingClient, stock: Any, rule: ImageRule) -> None:
    disturb(client)
    tuned, tokens = desk.engine.snapshot(client._run.adapter), list[str]()
    some = [replace(each, params=each.params.model_copy(update={"max_tokens": 4})) for each in desk.requests[:4]]
    plain = plain_peft(client, stock).base_model.model
    release = desk.hold()
    base = desk.sample(desk.requests[2], lambda _: tokens.append("base"))
    started = [desk.scheduler.sample(desk.engine, tuned, each, lambda _: tokens.append("tuned")) for each in some]
    release()
    written = [checked(plain, each, future.result(SOON), rule) for each, future in zip(some, started, strict=True)]
    desk.assert_alone(2, base)
    assert written[2][0][0] != desk.alone[2][0][0][:4]
    assert 0 < tokens.index("tuned") < tokens.index("base", tokens.index("tuned"))


def of(chunk: types.ModelInputChunk) -> dict[str, Any]:
    return {"prompt": tinker.ModelInput(chunks=[chunk])}


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {  # what the request has, and what the error must name
    "off the vocabulary": (of(types.EncodedTextChunk(tokens=[5, 4096])), RequestError, "4096 is outside"),
    "a broken image": (of(types.ImageChunk(data=b"no", format="png")), ImageError, "image"),
    "an asset": (of(types.ImageAssetPointerChunk(location="x", format="png")), RequestError, "is not supported"),
    "no sample": ({"num_samples": 0}, RequestError, "num_samples = 0"),
    "too much of the prompt": (
        {"prompt_logprobs": True, "prompt_logprobs_last_n": 10**6},
        RequestError,
        "prompt_logprobs_last_n = 1000000",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_request_fails_alone(kind: str, desk: Desk) -> None:
    (changes, error, named), requests = BAD[kind], desk.requests
    release = desk.hold()
    before, bad, after = (desk.sample(each) for each in (requests[0], replace(requests[0], **changes), requests[1]))
    release()
    with pytest.raises(error, match=named):
        bad.result(SOON)
    desk.assert_alone(0, before)
    desk.assert_alone(1, after)


def test_who_raises_when_told_fails_alone(desk: Desk) -> None:
    def third(sequence: TokenSequence) -> None:
        if len(sequence.tokens) == 3:
            raise OSError("nobody listens")

    release = desk.hold()
    good, bad = desk.sample(desk.requests[1]), desk.sample(desk.requests[1], third)
    release()
    with pytest.raises(OSError, match="nobody listens"):
        bad.result(SOON)
    desk.assert_alone(1, good)


def test_a_pass_that_fails_fails_what_shares_it_and_no_more(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "ROWS", 2)
    engine, requests = desk.engine, desk.requests
    hidden, left = engine.model.text.hidden, [2]
    other = engine.snapshot(engine.start(LoraSpec(1), 0).adapter)  # of B = 0: the model as it is

    def failing(inputs: Any, attention: Any, *args: Any) -> torch.Tensor:
        if isinstance(attention, DecodeStep) and len(inputs.ids) == 2:  # of the two requests below
            left[0] -= 1
            if left[0] == 0:
                raise torch.OutOfMemoryError("no memory")
        return hidden(inputs, attention, *args)

    monkeypatch.setattr(engine.model.text, "hidden", failing)
    release = desk.hold()
    lost = [desk.sample(request) for request in requests[:2]]
    kept, waiting = desk.scheduler.sample(engine, other, requests[0]), desk.sample(requests[3])
    release()
    for each in lost:
        with pytest.raises(torch.OutOfMemoryError, match="no memory"):
            each.result(SOON)
    desk.assert_alone(0, kept)
    desk.assert_alone(3, waiting)
    desk.assert_alone(1, desk.sample(requests[1]))


def test_a_full_context_ends_a_sequence_and_no_other(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last token needs no position of its own: nothing is computed from it."""
    requests, alone, room = desk.requests, desk.alone, 2
    long, short = 2 * np.argsort([request.prompt.length for request in requests[::2]])[[-1, 0]]
    monkeypatch.setattr(desk.engine.model, "context", requests[long].prompt.length + room)
    release = desk.hold()
    full, fitting = (desk.sample(SamplingRequest(requests[n].prompt, ENDLESS)) for n in (long, short))
    release()
    (cut,), (longer,) = full.result(SOON).sequences, fitting.result(SOON).sequences
    assert (cut.stop_reason, longer.stop_reason) == ("length", "length")
    assert cut.tokens == alone[long][0][0][: room + 1]
    assert len(longer.tokens) == requests[long].prompt.length + room + 1 - requests[short].prompt.length
    assert longer.tokens[: len(alone[short][0][0])] == alone[short][0][0]


def test_who_cancels_frees_the_rows(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "ROWS", 2)
    going, requests = threading.Semaphore(0), desk.requests
    endless = SamplingRequest(requests[0].prompt, ENDLESS)
    first, second = (desk.sample(endless, lambda _: going.release()) for _ in range(2))
    for _ in range(8):
        assert going.acquire(timeout=SOON)
    waiting, gone = desk.sample(requests[1]), desk.sample(requests[3])
    assert gone.cancel()
    brief = SamplingRequest(requests[2].prompt, types.SamplingParams(max_tokens=1, temperature=0.0))
    answer = desk.sample(brief).result(SOON)  # needs no row
    assert answer.sequences[0].tokens == desk.alone[2][0][0][:1]
    assert gone in wait([gone], SOON).done
    assert not waiting.done()
    assert first.cancel()
    desk.assert_alone(1, waiting)
    assert not second.done()
    assert second.cancel()  # who holds the future alone cancels as well
    for each in (first, second, gone):
        with pytest.raises(CancelledError):
            each.result(SOON)
    assert not waiting.cancel()
    for _ in range(2):
        desk.scheduler.submit(int).result(SOON)
    assert desk.scheduler.active_sequences == 0


def test_jobs_do_not_wait_for_sampling_to_end(
    desk: Desk, client: LocalTrainingClient, mixed: list[tinker.Datum]
) -> None:
    """A step of training runs on the engine between two tokens."""
    run, engine, submit = client._run, desk.engine, desk.scheduler.submit
    started = desk.sample(SamplingRequest(desk.requests[0].prompt, ENDLESS))
    loss = submit(engine.forward_backward, run, mixed, "cross_entropy", None).result(SOON)
    step = submit(engine.optim_step, run, types.AdamParams(learning_rate=1e-3)).result(SOON)
    assert loss.metrics["loss:sum"] > 0
    assert step.metrics is not None
    assert not started.done()
    started.cancel()


def test_sampling_does_not_wait_for_all_jobs(desk: Desk) -> None:
    """A token comes after every job."""
    ran, seen, scheduler = list[int](), list[int](), desk.scheduler
    release = desk.hold()
    jobs = [scheduler.submit(ran.append, n) for n in range(200)]
    started = desk.sample(desk.requests[0], lambda _: seen.append(len(ran)))
    assert (scheduler.waiting_jobs, scheduler.waiting_samples) == (200, 1)
    release()
    assert len(started.result(SOON).sequences[0].tokens) == len(seen) == 3
    assert all(after - before <= 1 for before, after in zip([0, *seen], seen, strict=False))
    for job in jobs:
        job.result(SOON)
    assert ran == list(range(200))


def test_jobs_fail_alone_and_are_not_begun_once_cancelled(desk: Desk) -> None:
    release, ran, submit = desk.hold(), list[str](), desk.scheduler.submit

    def fail() -> None:
        raise ValueError("this one")

    futures: list[Future[Any]] = [submit(ran.append, "a"), submit(fail), submit(ran.append, "b")]
    last = submit(lambda word, times=1: word * times, "c", times=2)
    assert futures[2].cancel()
    release()
    assert last.result(SOON) == "cc"
    with pytest.raises(ValueError, match="this one"):
        futures[1].result(SOON)
    assert ran == ["a"]


def test_the_workers_own_thread_cannot_submit(desk: Desk) -> None:
    for call in (lambda: desk.scheduler.submit(int), lambda: desk.sample(desk.requests[0])):
        with pytest.raises(RequestError, match="cannot ask its own service"):
            desk.scheduler.submit(call).result(SOON)


def test_a_closed_scheduler_finishes_what_was_requested(desk: Desk) -> None:
    release, scheduler = desk.hold(), desk.scheduler
    started, job = desk.sample(desk.requests[1]), scheduler.submit(int)
    scheduler.close(wait=False)
    for call in (lambda: scheduler.submit(int), lambda: desk.sample(desk.requests[0])):
        with pytest.raises(RequestError, match="connect again"):
            call()
    assert (scheduler.waiting_jobs, scheduler.waiting_samples, job.done()) == (1, 1, False)
    release()
    scheduler.close()
    assert job.done()
    assert started.done()
    desk.assert_alone(1, started)


def test_a_scheduler_that_nobody_has_ends_its_thread(engine: Engine, requests: list[SamplingRequest]) -> None:
    scheduler = Scheduler()
    thread = scheduler.submit(threading.current_thread).result(SOON)
    scheduler.sample(engine, None, requests[0]).result(SOON)
    del scheduler
    gc.collect()
    thread.join(SOON)
    assert not thread.is_alive()
