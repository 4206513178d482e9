"""Saved = loaded; files in PEFT's own layout; names that would lead out of the state folder are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
from tinker import types

from kshot.errors import ModelError, RequestError
from tests.vlm.helpers import Pictured
from vlm import nano
from vlm.classifier import predict
from vlm.local.clients import LocalTrainingClient
from vlm.local.registry import LocalServiceClient
from vlm.prompts import Prompt

ADAM = types.AdamParams(learning_rate=1e-2, eps=1e-8)


def step(client: LocalTrainingClient, data: list[tinker.Datum]) -> float:
    loss = client.forward_backward(data, "cross_entropy")
    client.optim_step(ADAM).result()
    return loss.result().metrics["loss:sum"]


@pytest.fixture
def trained(client: LocalTrainingClient, mixed: list[tinker.Datum]) -> LocalTrainingClient:
    for _ in range(2):
        step(client, mixed)
    return client


def log_probs(client: LocalTrainingClient, data: list[tinker.Datum]) -> list[np.ndarray]:
    outputs = client.forward(data, "cross_entropy").result().loss_fn_outputs
    return [output["logprobs"].to_numpy() for output in outputs]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all((a == b).all() for a, b in zip(one, other, strict=True))


def test_saved_equals_loaded(
    trained: LocalTrainingClient, service: LocalServiceClient, mixed: list[tinker.Datum]
) -> None:
    before = log_probs(trained, mixed)
    path = trained.save_state("step-2").result().path
    step(trained, mixed)
    assert not same(before, log_probs(trained, mixed))
    trained.load_state(path).result()
    assert same(before, log_probs(trained, mixed))
    other = service.create_training_client_from_state(path).result()
    assert same(before, log_probs(other, mixed))


def test_training_goes_on_bit_for_bit_with_the_optimizer(
    trained: LocalTrainingClient, service: LocalServiceClient, mixed: list[tinker.Datum]
) -> None:
    path = trained.save_state("resume").result().path
    uninterrupted = [step(trained, mixed) for _ in range(3)]
    resumed = service.create_training_client_from_state_with_optimizer(path).result()
    assert [step(resumed, mixed) for _ in range(3)] == uninterrupted
    fresh = service.create_training_client_from_state(path).result()
    assert [step(fresh, mixed) for _ in range(3)] != uninterrupted
    trained.load_state_with_optimizer(path).result()
    assert [step(trained, mixed) for _ in range(3)] == uninterrupted


def test_sampler_weights_equal_the_snapshot(
    trained: LocalTrainingClient, service: LocalServiceClient, prompt: Prompt, examples: list[Pictured]
) -> None:
    images = [e.image for e in examples[:4]]
    snapshot = trained.save_weights_and_get_sampling_client().result()
    path = trained.save_weights_for_sampler("final").result().path
    assert path == f"tinker://{trained.model_id}/sampler_weights/final"
    loaded = service.create_sampling_client(model_path=path).result()
    assert (predict(loaded, images, prompt) == predict(snapshot, images, prompt)).all()


def test_another_process_finds_the_checkpoint(
    trained: LocalTrainingClient, service: LocalServiceClient, mixed: list[tinker.Datum]
) -> None:
    path = trained.save_state("shared").result().path
    elsewhere = LocalServiceClient(service._registry.state)
    try:
        assert same(
            log_probs(trained, mixed), log_probs(elsewhere.create_training_client_from_state(path).result(), mixed)
        )
    finally:
        elsewhere.close()


def test_the_files_load_in_stock_peft_and_merged_too(
    trained: LocalTrainingClient, service: LocalServiceClient, mixed: list[tinker.Datum], tmp_path: Path
) -> None:
    import warnings

    import torch
    from peft import PeftModel
    from transformers import Qwen3VLForConditionalGeneration

    path = trained.save_state("peft").result().path
    folder = next(p for p in service._registry.state.rglob("peft") if p.is_dir())
    text = mixed[2]
    ids = torch.tensor([text.model_input.to_ints()])
    targets = text.loss_fn_inputs["target_tokens"].to_torch()
    expected = log_probs(trained, [text])[0]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        plain = PeftModel.from_pretrained(Qwen3VLForConditionalGeneration.from_pretrained(nano.folder()), folder)
        loaded = plain(input_ids=ids).logits[0].log_softmax(-1).gather(1, targets[:, None])[:, 0]
        base = Qwen3VLForConditionalGeneration.from_pretrained(nano.folder())
        base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.clone())  # a merge must not change the embeddings
        base.config.tie_word_embeddings = base.config.text_config.tie_word_embeddings = False
        merged = PeftModel.from_pretrained(base, folder).merge_and_unload()
        after = merged(input_ids=ids).logits[0].log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert path.startswith("tinker://")
    assert loaded.numpy() == pytest.approx(expected, abs=1e-4)
    assert after.numpy() == pytest.approx(expected, abs=1e-3)


def test_a_name_is_written_once_unless_told(trained: LocalTrainingClient) -> None:
    trained.save_state("once").result()
    with pytest.raises(RequestError, match="overwrite=True"):
        trained.save_state("once").result()
    trained.save_state("once", overwrite=True).result()


@pytest.mark.parametrize("name", ["", "..", "a/b", "../../etc", ".hidden", "a\\b", "a b", "x" * 129, "a\n"])
def test_names_that_are_no_folders_are_refused(client: LocalTrainingClient, name: str) -> None:
    with pytest.raises(RequestError, match="checkpoint name"):
        client.save_state(name)


@pytest.mark.parametrize(
    "path",
    [
        "weights/x",
        "tinker://run/weights/x",
        "tinker://../weights/x",
        "tinker://00000000-0000-0000-0000-000000000000:train:0/weights/../x",
        "tinker://00000000-0000-0000-0000-000000000000:train:0/other/x",
        "tinker://00000000-0000-0000-0000-000000000000:train:0/weights/x/y",
        "/etc/passwd",
    ],
)
def test_paths_that_are_none_are_refused(service: LocalServiceClient, path: str) -> None:
    with pytest.raises(RequestError, match="no checkpoint path"):
        service.create_training_client_from_state(path).result()


def test_missing_damaged_and_foreign_checkpoints_are_named(
    trained: LocalTrainingClient, service: LocalServiceClient
) -> None:
    missing = f"tinker://{trained.model_id}/weights/never-saved"
    with pytest.raises(ModelError, match="does not exist"):
        trained.load_state(missing).result()
    path = trained.save_state("damaged").result().path
    next(service._registry.state.rglob("damaged")).joinpath("adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(ModelError, match="is damaged"):
        trained.load_state(path).result()
    whole = trained.save_weights_for_sampler("weights-only").result().path
    with pytest.raises(RequestError, match="without optimizer"):
        trained.load_state_with_optimizer(whole).result()
    other = service.create_lora_training_client(nano.NAME, rank=2, seed=0).result()
    with pytest.raises(RequestError, match="create_training_client_from_state"):
        other.load_state(whole).result()


def test_a_checkpoint_that_lacks_tensors_changes_nothing(
    trained: LocalTrainingClient, service: LocalServiceClient, mixed: list[tinker.Datum], prompt: Prompt
) -> None:
    """Neither the run that loads it, nor a sampling client that shares its slot with the one that fails."""
    from safetensors.torch import load_file, save_file

    whole = trained.save_weights_for_sampler("whole").result().path
    sampler = service.create_sampling_client(model_path=whole).result()
    asked = mixed[2].model_input
    before, sampled = log_probs(trained, mixed), sampler.compute_logprobs(asked).result()
    for kind in ("sampler_weights", "weights"):
        saved = trained.save_weights_for_sampler if kind == "sampler_weights" else trained.save_state
        path = saved("lacking").result().path
        file = next(service._registry.state.rglob(f"{kind}/lacking")) / "adapter_model.safetensors"
        tensors = load_file(file)
        first, *rest = tensors
        save_file({**{name: tensors[name] for name in rest[3:]}, first: tensors[first][:1].contiguous()}, file)
        if kind == "weights":
            loading: Any = trained.load_state(path)
        else:
            loading = service.create_sampling_client(model_path=path)
        with pytest.raises(ModelError, match="does not fit the adapter in 4 tensors"):
            loading.result()
    assert same(before, log_probs(trained, mixed))
    assert sampler.compute_logprobs(asked).result() == sampled


def test_a_save_that_fails_leaves_the_old_checkpoint(
    trained: LocalTrainingClient, mixed: list[tinker.Datum], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = trained.save_state("kept").result().path
    before = log_probs(trained, mixed)
    step(trained, mixed)

    def full(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("vlm.local.checkpoint.save_file", full)
    with pytest.raises(OSError, match="disk full"):
        trained.save_state("kept", overwrite=True).result()
    trained.load_state(path).result()
    assert same(before, log_probs(trained, mixed))
