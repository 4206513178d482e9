"""The engine: its steps, batches, runs and snapshots, also in bfloat16 and on a GPU, and what does not fit the model.

Against transformers and PEFT: `test_adapters.py`. Mistakes on every service: `test_conformance_mistakes.py`.
"""

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from kshot.errors import RequestError
from tests.baselines.plain_lora import adamw
from tests.vlm.helpers import IMAGE, Pictured, adapter_of, disturb, gradients_of
from tests.vlm.services import step
from vlm import nano
from vlm.classifier import batches, fit, predict
from vlm.label_trie import build
from vlm.local.clients import LocalSamplingClient, LocalTrainingClient
from vlm.local.engine import Engine
from vlm.local.model.load import Model
from vlm.local.model.lora import LoraSpec
from vlm.local.registry import LocalServiceClient
from vlm.local.sampling.sampler import SamplingRequest, sample
from vlm.local.scoring import score_tree
from vlm.local.vision import Vision
from vlm.prompts import Prompt

ADAM = types.AdamParams(learning_rate=3e-3, eps=1e-8)


def test_log_probs_of_a_gradient_come_back_where_the_weight_is_not_0(
    client: LocalTrainingClient, mixed: list[tinker.Datum]
) -> None:
    weighted = client.forward_backward(mixed, "cross_entropy").result()
    everywhere = client.forward(mixed, "cross_entropy").result()
    assert weighted.metrics["loss:sum"] == pytest.approx(everywhere.metrics["loss:sum"], rel=1e-6)
    for datum, some, full in zip(mixed, weighted.loss_fn_outputs, everywhere.loss_fn_outputs, strict=True):
        weights = datum.loss_fn_inputs["weights"].to_numpy()
        assert some["logprobs"].shape == full["logprobs"].shape == [datum.model_input.length]
        expected = np.where(weights == 0, 0.0, full["logprobs"].to_numpy())
        assert some["logprobs"].to_numpy() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "adam",
    [
        types.AdamParams(learning_rate=1e-2),
        types.AdamParams(learning_rate=1e-2, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.1, grad_clip_norm=0.5),
    ],
)
def test_steps_equal_adam_written_out(
    client: LocalTrainingClient, mixed: list[tinker.Datum], adam: types.AdamParams
) -> None:
    """Two steps of Adam with decoupled weight decay and clipping by global norm (Loshchilov & Hutter 2019)."""
    disturb(client)
    moments: dict[str, list[torch.Tensor]] = {}
    for number in (1, 2):
        client.forward_backward(mixed, "cross_entropy").result()
        state = {n: p.double() for n, p in adapter_of(client).items()}
        for n, gradient in gradients_of(client).items():
            state[n].grad = gradient.double()
        expected, norm = adamw(state, moments, number, adam)
        answer = client.optim_step(adam).result()
        assert answer.metrics["grad_norm:mean"] == pytest.approx(norm, rel=1e-4)
        for n, tensor in adapter_of(client).items():
            assert torch.allclose(tensor.double(), expected[n], atol=2e-5), n


def test_the_loss_falls_and_the_model_answers(
    client: LocalTrainingClient, prompt: Prompt, examples: list[Pictured]
) -> None:
    views, adam = batches(examples, 12, 30, np.random.default_rng(0)), types.AdamParams(learning_rate=1e-2, eps=1e-8)
    losses = [loss.metrics["loss:sum"] for loss, _ in fit(client, views, prompt, adam)]
    assert losses[-1] < losses[0] / 20
    sampler = client.save_weights_and_get_sampling_client().result()
    log_probs = predict(sampler, [e.image for e in examples], prompt)
    assert np.exp(log_probs).sum(1) == pytest.approx(np.ones(12), rel=1e-5)  # float32
    assert (log_probs.argmax(1) == [e.label for e in examples]).mean() >= 0.9


def test_seeds_reproduce_bit_for_bit(service: LocalServiceClient, prompt: Prompt, examples: list[Pictured]) -> None:
    def trained(seed: int) -> list[float]:
        client = service.create_lora_training_client(nano.NAME, rank=4, seed=seed).result()
        views = batches(examples, 6, 3, np.random.default_rng(seed))
        return [loss.metrics["loss:sum"] for loss, _ in fit(client, views, prompt, ADAM)]

    assert trained(3) == trained(3)
    assert trained(3) != trained(4)


def test_interleaved_runs_of_different_rank_equal_each_alone(
    service: LocalServiceClient, mixed: list[tinker.Datum]
) -> None:
    def start(rank: int) -> LocalTrainingClient:
        return service.create_lora_training_client(nano.NAME, rank=rank, seed=rank).result()

    alone = [[step(client, mixed[n : n + 2], ADAM) for n in (0, 1, 2)] for client in (start(2), start(8))]
    a, b = start(2), start(8)
    mingled = [(step(a, mixed[n : n + 2], ADAM), step(b, mixed[n : n + 2], ADAM)) for n in (0, 1, 2)]
    assert [list(losses) for losses in zip(*mingled, strict=True)] == alone


def test_image_features_do_not_depend_on_their_company(
    client: LocalTrainingClient, chunks: list[types.ImageChunk]
) -> None:
    model = client._engine.model
    together, alone = Vision(model).features(chunks), [Vision(model).features([chunk])[0] for chunk in chunks]
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.values, other.values)


def test_a_run_that_is_let_go_gives_its_memory_back(service: LocalServiceClient) -> None:
    client = service.create_lora_training_client(nano.NAME, rank=2, seed=0).result()
    flats = [weakref.ref(flat) for flat in client._run.adapter.flats.values()]
    service.create_sampling_client(base_model=nano.NAME).result()  # the worker has let go of what it did before
    assert all(flat() is not None for flat in flats)
    del client
    gc.collect()
    assert all(flat() is None for flat in flats)


def test_requests_outlive_the_client_that_made_them(service: LocalServiceClient, mixed: list[tinker.Datum]) -> None:
    futures = [
        service.create_lora_training_client(nano.NAME, rank=2, seed=0).result().forward_backward(mixed, "cross_entropy")
        for _ in range(3)
    ]
    gc.collect()
    losses = [future.result().metrics["loss:sum"] for future in futures]
    assert losses == losses[:1] * 3


@pytest.mark.parametrize(
    ("flags", "kinds"),
    [
        ({"train_mlp": False, "train_unembed": False}, {"self_attn"}),
        ({"train_attn": False, "train_unembed": False}, {"mlp"}),
        ({"train_attn": False, "train_mlp": False}, {"lm_head"}),
        ({}, {"self_attn", "mlp", "lm_head"}),
    ],
)
def test_the_flags_choose_what_is_trained(service: LocalServiceClient, flags: dict[str, bool], kinds: set[str]) -> None:
    client = service.create_lora_training_client(nano.NAME, rank=3, seed=0, **flags).result()
    names = list(adapter_of(client))
    assert {k for k in ("self_attn", "mlp", "lm_head") if any(f".{k}." in n for n in names)} == kinds
    assert not any("visual" in n for n in names)


def test_a_profile_sums_the_models_own_seconds(
    service: LocalServiceClient, mixed: list[tinker.Datum], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = service.create_lora_training_client(nano.NAME, rank=4, seed=7).result()
    sampler = client.save_weights_and_get_sampling_client().result()
    monkeypatch.setattr(client._engine, "vision", Vision(client._engine.model))  # no image is cached
    with client.profile() as seconds:
        client.forward_backward(mixed, "cross_entropy").result()
        client.optim_step(ADAM).result()
    assert all(spent > 0 for spent in seconds.values())
    assert client.tower_forwards == 3  # different images
    kept = dict(seconds)
    with sampler.profile() as others:
        sampler.compute_logprobs(mixed[0].model_input).result()
    assert seconds == kept
    assert others["forward"] > 0 == others["tower"]


BAD: dict[str, tuple[list[Any] | None, str]] = {  # the chunks of the input, and what the error must name
    "a placeholder": ([types.EncodedTextChunk(tokens=[5, IMAGE])], "ImageChunk"),
    "an asset": ([types.ImageAssetPointerChunk(location="a", format="png")], "not supported"),
    "images side by side": (None, "side by side"),
    "empty": ([types.EncodedTextChunk(tokens=[])], "0 positions"),
    "too long": ([types.EncodedTextChunk(tokens=[5] * 4097)], "4097 positions"),
}


@pytest.mark.parametrize("kind", BAD)
def test_inputs_that_do_not_fit_are_named(
    kind: str, client: LocalTrainingClient, prompt: Prompt, examples: list[Pictured]
) -> None:
    good, (chunks, named) = prompt.datum(examples[0].image, 0), BAD[kind]
    datum = replace(good, model_input=tinker.ModelInput(chunks=chunks or [good.model_input.chunks[1]] * 2))
    with pytest.raises(RequestError, match=named):
        client.forward_backward([datum], "cross_entropy").result()


def test_a_target_is_never_ignored(client: LocalTrainingClient, prompt: Prompt, examples: list[Pictured]) -> None:
    """torch would take -100 for "leave this one out"."""
    datum = prompt.datum(examples[0].image, 0)
    datum.loss_fn_inputs["target_tokens"].to_numpy()[-1] = -100
    with pytest.raises(RequestError, match="target -100"):
        client.forward_backward([datum], "cross_entropy").result()


def test_parameters_of_adam_out_of_range_are_named(client: LocalTrainingClient, mixed: list[tinker.Datum]) -> None:
    with pytest.raises(RequestError, match="one AdamParams"):
        client.optim_step()
    client.forward_backward(mixed, "cross_entropy").result()
    for wrong in ({"grad_clip_norm": float("nan")}, {"beta1": 1.0}):
        with pytest.raises(RequestError, match=f"{next(iter(wrong))} = "):
            client.optim_step(types.AdamParams(**wrong)).result()


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5])
def test_seeds_that_are_none_are_named(service: LocalServiceClient, seed: Any) -> None:
    with pytest.raises(RequestError, match="seed"):
        service.create_lora_training_client(nano.NAME, seed=seed)


@pytest.fixture(scope="module")
def engines(sampler: LocalSamplingClient) -> tuple[Engine, Engine]:
    """In bfloat16, as real checkpoints are loaded, and in float32."""
    half = Engine(Model(nano.NAME, dtype=torch.bfloat16))
    assert half.model.stock.dtype == torch.bfloat16
    return half, sampler._engine


def test_training_in_bfloat16(engines: tuple[Engine, Engine], mixed: list[tinker.Datum]) -> None:
    losses = []
    for engine in engines:
        run = engine.start(LoraSpec(rank=4), seed=0)
        assert all(t.dtype == torch.float32 for t in run.adapter.named().values())
        for _ in range(5):
            losses.append(engine.forward_backward(run, mixed, "cross_entropy", None).metrics["loss:sum"])
            engine.optim_step(run, types.AdamParams(learning_rate=1e-2, eps=1e-8))
    assert losses[0] == pytest.approx(losses[5], rel=0.02)
    assert losses[4] < losses[0] / 2
    assert losses[9] < losses[5] / 2


def test_scoring_gives_way_between_its_passes(
    engines: tuple[Engine, Engine], prompt: Prompt, examples: list[Pictured], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm.local.scoring.ROWS", 1)
    asked, given = [prompt.question(e.image) for e in examples[:3]], list[bool]()
    score_tree(engines[1], None, asked, build(prompt.choices, "constrained"), between=given.append)
    assert given == [False, False]


def test_scoring_and_sampling_in_bfloat16(
    engines: tuple[Engine, Engine], prompt: Prompt, examples: list[Pictured]
) -> None:
    asked = [prompt.question(e.image) for e in examples[:4]]
    trie = build(prompt.choices, "constrained")
    half, full = (score_tree(engine, None, asked, trie) for engine in engines)
    assert half == pytest.approx(full, abs=0.1, rel=0.05)  # log-probs down to -20, of 8 bits
    tuned = engines[0].snapshot(engines[0].start(LoraSpec(rank=4), seed=0).adapter)
    assert (score_tree(engines[0], tuned, asked, trie) == half).all()  # B is zero
    params = types.SamplingParams(max_tokens=4, temperature=0.0, stop=[])
    answers = sample(engines[0], None, [SamplingRequest(p, params, prompt_logprobs=True) for p in asked])
    assert [len(answer.sequences[0].tokens) for answer in answers] == [4] * 4
    assert answers[0].prompt_logprobs is not None


def _trained(
    device: str, state: Path, data: list[tinker.Datum], images: list[bytes], prompt: Prompt
) -> tuple[list[float], np.ndarray, Any, int]:
    """Losses of five steps, the scores of images and what is written of one, and images that the tower saw."""
    service = LocalServiceClient(state / device, device=device)
    try:
        client = service.create_lora_training_client(nano.NAME, rank=4, seed=1).result()
        losses = []
        for _ in range(5):
            losses.append(client.forward_backward(data, "cross_entropy").result().metrics["loss:sum"])
            client.optim_step(types.AdamParams(learning_rate=1e-3, eps=1e-8)).result()
        seen = client._engine.vision.forwards
        sampler = client.save_weights_and_get_sampling_client().result()
        scores = predict(sampler, images, prompt)
        greedy = types.SamplingParams(max_tokens=8, temperature=0.0)
        written = sampler.sample(prompt.question(images[0]), 1, greedy).result().sequences[0]
        return losses, scores, written, seen
    finally:
        service.close()


@pytest.mark.gpu
def test_a_gpu_gives_what_a_cpu_does(
    mixed: list[tinker.Datum], examples: list[Pictured], prompt: Prompt, tmp_path: Path
) -> None:
    images = [example.image for example in examples]
    cpu, gpu = (_trained(device, tmp_path, mixed, images, prompt) for device in ("cpu", "cuda"))
    assert gpu[0] == pytest.approx(cpu[0], rel=1e-4)
    np.testing.assert_allclose(gpu[1], cpu[1], atol=1e-3)
    assert gpu[2].tokens == cpu[2].tokens
    assert gpu[2].logprobs == pytest.approx(cpu[2].logprobs, abs=1e-3)
    assert gpu[3] == cpu[3]  # no image twice
