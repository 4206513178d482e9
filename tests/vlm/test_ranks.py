"""An engine over two processes of this machine, against one of this process."""

import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest
import tinker
import torch

from kshot.errors import EngineLostError, RequestError
from tests.vlm import ranked
from tests.vlm.ranked import ADAM, SPEC, Engines, check_answers, check_trained, errors, trained
from vlm import nano
from vlm.local.model.lora import Adapter, LoraSpec

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def both() -> Iterator[Engines]:
    with ranked.engines(nano.NAME, 2, torch.float64, divided=True) as both:
        yield both


def test_divided_ranks_train_what_one_does(both: Engines, mixed: list[tinker.Datum]) -> None:
    check_trained(both, trained(both.one, mixed), trained(both.many, mixed))


def test_they_answer_what_one_does(both: Engines, prompts: list[tinker.ModelInput], mixed: list[tinker.Datum]) -> None:
    check_answers(both, prompts, mixed)


def test_a_bad_datum_changes_nothing(both: Engines, mixed: list[tinker.Datum]) -> None:
    engine = both.many
    run = engine.start(SPEC, 3)
    engine.forward_backward(run, mixed, "cross_entropy", None)
    before = mixed[3].loss_fn_inputs["target_tokens"].to_torch()
    short = {name: tinker.TensorData.from_torch(t.to_torch()[:-1]) for name, t in mixed[3].loss_fn_inputs.items()}
    with pytest.raises(RequestError, match=f"{len(before) - 1} entries"):
        engine.forward_backward(run, [*mixed, tinker.Datum(mixed[3].model_input, short)], "cross_entropy", None)
    engine.optim_step(run, ADAM)
    other = both.one.start(SPEC, 3)
    both.one.forward_backward(other, mixed, "cross_entropy", None)
    both.one.optim_step(other, ADAM)
    assert errors(other.weights(), run.weights()) < both.tolerance
    with pytest.raises(RequestError, match="without gradients"):
        engine.optim_step(run, ADAM)


def test_a_tower_that_is_divided_is_not_trained(both: Engines, mixed: list[tinker.Datum]) -> None:
    generation = both.many.generation
    with pytest.raises(RequestError, match="serve it with --train-vision"):
        both.many.start(LoraSpec(4, train_vision=True), 3)
    both.many.forward_backward(both.many.start(SPEC, 3), mixed, "cross_entropy", None)
    assert both.many.generation == generation


def test_a_killed_rank_is_named_and_the_engine_starts_again(both: Engines, mixed: list[tinker.Datum]) -> None:
    engine = both.many
    run = engine.start(SPEC, 3)
    run.call("run a:train:0")
    trained(engine, mixed, run, steps=1)
    kept = run.weights(), run.optimizer_tensors()
    pid = engine.processes[1]
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineLostError, match=r"rank 1 of 2 \(cpu\) died \(SIGKILL\)"):
        engine.forward_backward(run, mixed, "cross_entropy", None)
    with pytest.raises(EngineLostError, match=r"run a:train:0 is gone: rank 1 of 2 .* go on from what was saved"):
        engine.optim_step(run, ADAM)
    other = engine.start(SPEC, 99)
    other.restore(Adapter.of(other.layout, kept[0]), kept[1])
    assert errors(kept[0], other.weights()) == 0
    resumed, going_on = trained(engine, mixed, other, steps=2), trained(both.one, mixed, steps=3)
    np.testing.assert_allclose(resumed.losses, going_on.losses[1:], rtol=both.tolerance)
    assert engine.processes[1] != pid
