"""Mistakes of a client, on the local engine and on a server: the same tests, errors and sentences.

A request that cannot be made is one that was made: those numbered behind it go on.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tinker
from tinker import types

from tests.vlm.services import PATIENCE, Service, step
from vlm import nano

ADAM = types.AdamParams(learning_rate=1e-2, eps=1e-2)
ONE = types.SamplingParams(max_tokens=1)
MISSING = "tinker://00000000-0000-4000-8000-000000000000:train:0/weights/never"


def text(tokens: list[int]) -> tinker.ModelInput:
    return tinker.ModelInput.from_ints(tokens)


def picture(data: bytes, expected: int | None) -> tinker.ModelInput:
    return tinker.ModelInput(chunks=[types.ImageChunk(data=data, format="png", expected_tokens=expected)])


def targets(question: tinker.ModelInput, tokens: Any, **more: Any) -> tinker.Datum:
    fields = {"target_tokens": np.asarray(tokens), **more}
    return tinker.Datum(question, {name: tinker.TensorData.from_numpy(values) for name, values in fields.items()})


Change = Callable[[Any, list[tinker.Datum], bytes], Any]
WRONG: dict[str, tuple[Change, str]] = {  # what is done with a run, good data and an image of 16 tokens
    "stable_reinforce": (lambda run, good, _: run.forward_backward(good, "stable_reinforce"), "unknown loss function"),
    "a loss that is none": (lambda run, good, _: run.forward(good, "nll"), "choose from: cross_entropy"),
    "a configuration": (
        lambda run, good, _: run.forward_backward(good, "ppo", {"clip": 0.1}),
        r"takes \['clip_high_threshold', 'clip_low_threshold'\]",
    ),
    "no gradients": (lambda run, *_: run.optim_step(ADAM), "optim_step without gradients"),
    "another optimizer": (lambda run, *_: run.optim_step(types.DimuonParams(learning_rate=1e-3)), "one AdamParams"),
    "a token off the vocabulary": (
        lambda run, *_: run.forward_backward([targets(text([5, 4096]), [0, 0])], "cross_entropy"),
        "4096",
    ),
    "a target off the vocabulary": (
        lambda run, *_: run.forward_backward([targets(text([5]), [4096])], "cross_entropy"),
        "target 4096",
    ),
    "a broken image": (
        lambda run, *_: run.forward([targets(picture(b"no image", 16), [0] * 16)], "cross_entropy"),
        "image",
    ),
    "an image of other tokens": (
        lambda run, _, image: run.forward([targets(picture(image, 17), [0] * 17)], "cross_entropy"),
        "Expected 17 tokens, got 16",
    ),
    "too few targets": (lambda run, *_: run.forward([targets(text([5, 6]), [0])], "cross_entropy"), "2 positions"),
    "a misspelt field": (
        lambda run, *_: run.forward([targets(text([5]), [0], weight=np.ones(1, np.float32))], "cross_entropy"),
        "weights",
    ),
    "a cube": (
        lambda run, *_: run.forward([targets(text([5]), [[[0]]])], "cross_entropy"),
        "target_tokens",
    ),
    "a name with a slash": (lambda run, *_: run.save_state("a/b"), "checkpoint name 'a/b'"),
    "a name that leads out": (lambda run, *_: run.save_weights_for_sampler("../x"), r"checkpoint name '\.\./x'"),
    "a checkpoint that is none": (lambda run, *_: run.load_state("weights/x"), "'weights/x' is no checkpoint path"),
    "a checkpoint that is not there": (lambda run, *_: run.load_state(MISSING), f"checkpoint {MISSING} does not exist"),
    "another kind of sampler": (
        lambda run, *_: run.save_weights_and_get_sampling_client(kind="inflight"),
        "kind='inflight' is not supported",
    ),
}


@pytest.mark.filterwarnings("ignore:DEPRECATED. TrainingClient.load_state:FutureWarning")
@pytest.mark.parametrize("kind", WRONG)
def test_after_a_mistake_the_run_goes_on(
    kind: str, both: Service, mixed: list[tinker.Datum], make_image: Callable[..., bytes]
) -> None:
    """The requests before and behind it were submitted together with it."""
    run, (change, named) = both.start(), WRONG[kind]
    before = run.forward(mixed[2:], "cross_entropy")
    with both.refuses(named):
        change(run, mixed[2:], make_image(1, 64, 64)).result(PATIENCE)
    behind = run.forward(mixed[2:], "cross_entropy")
    assert behind.result(PATIENCE).metrics == before.result(PATIENCE).metrics
    with both.refuses("forward_backward first"):
        run.optim_step(ADAM).result(PATIENCE)
    step(run, mixed[2:], ADAM)


def test_what_cannot_be_made_is_named(both: Service) -> None:
    create, client = both.client.create_lora_training_client, both.client
    for call, named in (
        (lambda: create("kshot/nano"), "unknown model 'kshot/nano'"),
        (lambda: create(nano.NAME, rank=0), "rank 0|trains nothing"),
        (lambda: create(nano.NAME, seed=-1), "seed -1 must be a whole number"),
        (lambda: create(nano.NAME, optimizer=tinker.DimuonOptimizerConfig()), "not supported"),
        (lambda: client.create_training_client_from_state(MISSING), f"checkpoint {MISSING} does not exist"),
        (lambda: client.create_training_client_from_state_with_optimizer(MISSING), "does not exist"),
        (lambda: client.create_sampling_client(model_path=MISSING), "does not exist"),
        (lambda: client.create_sampling_client(model_path="tinker://x"), "'tinker://x' is no checkpoint path"),
        (lambda: client.create_sampling_client(base_model="kshot/nano"), "unknown model 'kshot/nano'"),
    ):
        with both.refuses(named):
            call().result(PATIENCE)
    run = both.start()
    path = run.save_weights_for_sampler("weights-only").result(PATIENCE).path
    with both.refuses("without optimizer state"):
        client.create_training_client_from_state_with_optimizer(path).result(PATIENCE)
    with both.refuses("not of 'kshot/nano'"):
        client.create_training_client_from_state(path, base_model="kshot/nano").result(PATIENCE)
    assert both.start().model_id != run.model_id


def test_samples_that_cannot_be_are_named(
    both: Service, mixed: list[tinker.Datum], make_image: Callable[..., bytes]
) -> None:
    sampler, question, image = both.base(), mixed[0].model_input, make_image(1, 64, 64)
    before = sampler.compute_logprobs(question).result(PATIENCE)
    for wrong in ({"top_p": 0.0}, {"temperature": -1.0}, {"max_tokens": 0}, {"seed": -1}, {"top_k": -2}):
        name, value = next(iter(wrong.items()))
        with both.refuses(f"{name} = {value} is out of range"):
            sampler.sample(question, 1, types.SamplingParams(**{"max_tokens": 2, **wrong})).result(PATIENCE)  # type: ignore[arg-type]
    off = types.TensorData.from_numpy(np.full((question.length - 1, 1), 4096))
    short = types.TensorData(data=[1], dtype="int64", shape=[1, 1])
    for arguments, named in (
        ((text([4096]), 1, ONE), "4096"),
        ((text([5] * 4097), 1, ONE), "4097 positions|4,097"),
        ((picture(b"no image", 16), 1, ONE), "image"),
        ((picture(image, 17), 1, ONE), "Expected 17 tokens, got 16"),
        ((question, 0, ONE), "num_samples = 0 is out of range"),
        ((question, 1, ONE, False, 5000), "topk_prompt_logprobs = 5000 is out of range"),
        ((question, 1, ONE, False, 0, 0, off), "id 4096 is outside"),
        ((question, 1, ONE, False, 0, 0, short), "must have .* rows"),
    ):
        with both.refuses(named):
            sampler.sample(*arguments).result(PATIENCE)
    assert sampler.compute_logprobs(question).result(PATIENCE) == before
