"""What was under way when a rank died or failed, and what comes after."""

import gc
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest
import tinker
import torch
from tinker import types

from kshot.errors import EngineLostError, KshotError, RequestError
from tests.vlm.ranked import ADAM, SPEC
from vlm import label_trie, nano
from vlm.local import scoring
from vlm.local.ranks import engine as engine_module
from vlm.local.ranks.inference import ModelOptions, RanksEngine
from vlm.local.sampling import sampler
from vlm.local.sampling.sampler import SamplingRequest

pytestmark = pytest.mark.ranks
TRIE = label_trie.build([[7, 8, 9], [12, 9]], "constrained")


@pytest.fixture(scope="module")
def engine() -> Iterator[RanksEngine]:
    engine = RanksEngine(ModelOptions(nano.NAME, nano.NAME, torch.float32, decoders=0), ["cpu"] * 2, 1, limit=60)
    try:
        yield engine
    finally:
        engine.end()


def restarted(engine: RanksEngine) -> int:
    """The generation of new ranks, in the place of those of which one is killed."""
    os.kill(engine.processes[1], signal.SIGKILL)
    with suppress(EngineLostError):
        engine.command("facts")
    engine.start_ranks()
    return engine.generation


def asked(prompt: tinker.ModelInput, tokens: int) -> SamplingRequest:
    return SamplingRequest(prompt, types.SamplingParams(max_tokens=tokens, temperature=0.0))


@pytest.mark.parametrize("trained", [False, True])
def test_samples_of_lost_ranks_end_and_the_new_ones_stay(
    engine: RanksEngine, prompts: list[tinker.ModelInput], trained: bool
) -> None:
    snapshot = engine.snapshot_of(engine.start(SPEC, 3)) if trained else None
    decoder = sampler.decoder_of(engine, snapshot, 4)
    sampler.prefill(decoder, [asked(prompts[0], 500)])
    decoder.step()
    generation = restarted(engine)
    with pytest.raises(EngineLostError, match="is gone: rank 1 of 2"):
        sampler.prefill(decoder, [asked(prompts[1], 3)])
    with pytest.raises(EngineLostError, match="is gone: rank 1 of 2"):
        decoder.step()
    assert (engine.generation, engine.holds(generation)) == (generation, True)
    anew = sampler.decoder_of(engine, None, 4)
    (found,) = sampler.prefill(anew, [asked(prompts[1], 3)])
    while not found.done:
        assert anew.step()


@pytest.mark.slow
def test_a_decoder_that_has_ended_goes_on_with_new_ranks(engine: RanksEngine, prompts: list[tinker.ModelInput]) -> None:
    decoder = sampler.decoder_of(engine, None, 4)
    sampler.prefill(decoder, [asked(prompts[0], 1)])
    restarted(engine)
    (found,) = sampler.prefill(decoder, [asked(prompts[1], 3)])
    while not found.done:
        assert decoder.step()


@pytest.mark.slow
def test_a_request_in_the_middle_of_its_passes_leaves_new_ranks_alone(
    engine: RanksEngine, mixed: list[tinker.Datum]
) -> None:
    run, generations = engine.start(SPEC, 3), list[int]()

    def between(last: bool) -> None:
        if not generations:
            generations.append(restarted(engine))

    with pytest.raises(EngineLostError, match=r"an adapter is gone: rank 1 of 2 .* go on from what was saved"):
        engine.forward_backward(run, mixed, "cross_entropy", None, between=between)
    assert engine.generation == generations[0]
    assert engine.holds(generations[0])
    other = engine.start(SPEC, 3)
    engine.forward_backward(other, mixed, "cross_entropy", None)
    engine.optim_step(other, ADAM)


@pytest.mark.slow
def test_scores_of_lost_weights_are_none_of_the_base_model(
    engine: RanksEngine, prompts: list[tinker.ModelInput], monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = engine.snapshot_of(engine.start(SPEC, 3))
    generation = restarted(engine)
    with pytest.raises(EngineLostError, match="go on from what was saved"):
        scoring.score_tree(engine, snapshot, prompts, TRIE)
    monkeypatch.setattr(snapshot, "check", lambda: None)  # whoever forgets to ask gets an error from the rank
    with pytest.raises(KshotError, match=f"KeyError: {snapshot.number}"):
        scoring.score_tree(engine, snapshot, prompts, TRIE)
    assert engine.generation == generation


def test_a_rank_that_dies_while_nothing_is_asked_is_replaced(engine: RanksEngine) -> None:
    noticed, generation = threading.Event(), engine.generation
    engine.on_loss = noticed.set
    os.kill(engine.processes[0], signal.SIGKILL)
    assert noticed.wait(30)
    assert engine.lost == "rank 0 of 2 (cpu) died (SIGKILL), and the engine ended with it"
    engine.start(SPEC, 3)  # is no request that finds out
    assert engine.generation == generation + 1


def test_what_fails_on_a_rank_with_whole_weights_fails_alone(
    engine: RanksEngine, mixed: list[tinker.Datum], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> tuple[torch.Tensor, dict[str, float], list[str]]:
        return torch.zeros(()), {}, ["no slope"] * len(mixed)

    run, other, generation = engine.start(SPEC, 3), engine.start(SPEC, 4), engine.generation
    engine.forward_backward(other, mixed, "cross_entropy", None)
    with monkeypatch.context() as patched:
        patched.setattr(engine_module, "slopes_of", broken)
        with pytest.raises(KshotError, match=r"rank 0 of 2 \(cpu\) failed in 'backward': TypeError: "):
            engine.forward_backward_custom(run, mixed, lambda *_: (torch.zeros(()), {}))
    with pytest.raises(RequestError, match="without gradients"):
        engine.optim_step(run, ADAM)
    engine.optim_step(other, ADAM)
    engine.forward_backward(run, mixed, "cross_entropy", None)
    engine.optim_step(run, ADAM)
    assert engine.generation == generation


@pytest.mark.slow
def test_ranks_end_with_an_engine_that_nobody_has() -> None:
    engine = RanksEngine(ModelOptions(nano.NAME, nano.NAME, torch.float32, decoders=0), ["cpu"] * 2, 1, limit=60)
    processes = [psutil.Process(pid) for pid in engine.processes]
    assert len(processes) == 2
    del engine
    gc.collect()
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive
