"""Checkpoints: training goes on bit for bit; damage is named; no name leads out of the state folder."""

import os
from pathlib import Path

import pytest
import tinker
from safetensors.torch import load_file, save_file
from tinker import types

from kshot.checks import folder_of, path_of
from kshot.errors import ModelError, RequestError
from tests.vlm.services import close, log_probs, step
from vlm.local.checkpoint import OPTIMIZER
from vlm.local.clients import LocalTrainingClient
from vlm.local.registry import LocalServiceClient

ADAM = types.AdamParams(learning_rate=1e-2, eps=1e-8)
RUN = "00000000-0000-0000-0000-000000000000:train:0"


@pytest.mark.parametrize("name", ["", "..", "a/b", "../../etc", ".hidden", "a\\b", "a b", "x" * 129, "a\n"])
def test_names_that_are_no_folders_are_refused(name: str) -> None:
    with pytest.raises(RequestError, match="checkpoint name"):
        path_of(RUN, "weights", name)


@pytest.mark.parametrize(
    "path",
    [
        "weights/x",
        "tinker://run/weights/x",
        "tinker://../weights/x",
        f"tinker://{RUN}/weights/../x",
        f"tinker://{RUN}/other/x",
        f"tinker://{RUN}/weights/x/y",
        "/etc/passwd",
    ],
)
def test_paths_that_are_none_are_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no checkpoint path"):
        folder_of(tmp_path, path)


@pytest.fixture
def trained(client: LocalTrainingClient, mixed: list[tinker.Datum]) -> LocalTrainingClient:
    for _ in range(2):
        step(client, mixed, ADAM)
    return client


def test_training_goes_on_bit_for_bit_with_the_optimizer(
    trained: LocalTrainingClient, service: LocalServiceClient, mixed: list[tinker.Datum]
) -> None:
    """In another process's service."""
    path = trained.save_state("resume").result().path
    uninterrupted = [step(trained, mixed, ADAM) for _ in range(3)]
    elsewhere = LocalServiceClient(service._registry.state)
    resumed = elsewhere.create_training_client_from_state_with_optimizer(path).result()
    assert [step(resumed, mixed, ADAM) for _ in range(3)] == uninterrupted
    elsewhere.close()


def test_a_checkpoint_that_lacks_tensors_or_is_damaged_is_named_and_changes_nothing(
    trained: LocalTrainingClient, service: LocalServiceClient, mixed: list[tinker.Datum]
) -> None:
    """Neither the run that loads it, nor a sampling client that shares its slot with the one that fails."""
    whole = trained.save_weights_for_sampler("whole").result().path
    sampler = service.create_sampling_client(model_path=whole).result()
    asked = mixed[2].model_input
    before, sampled = log_probs(trained, mixed), sampler.compute_logprobs(asked).result()
    for save, load in (
        (trained.save_weights_for_sampler, lambda path: service.create_sampling_client(model_path=path)),
        (trained.save_state, trained.load_state),
    ):
        path = save("lacking").result().path
        file = folder_of(service._registry.state, path) / "adapter_model.safetensors"
        tensors = load_file(file)
        first, *rest = tensors
        save_file({**{name: tensors[name] for name in rest[3:]}, first: tensors[first][:1].contiguous()}, file)
        with pytest.raises(ModelError, match="does not fit the adapter in 4 tensors"):
            load(path).result()
        file.write_bytes(b"short")
        with pytest.raises(ModelError, match="is damaged"):
            load(path).result()
    assert close(before, log_probs(trained, mixed), 0)
    assert sampler.compute_logprobs(asked).result() == sampled


def test_an_optimizer_that_is_a_pipe_is_not_waited_for(
    trained: LocalTrainingClient, service: LocalServiceClient
) -> None:
    path = trained.save_state("piped").result().path
    file = folder_of(service._registry.state, path) / OPTIMIZER
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ModelError, match=r"is damaged .*not a regular file"):
        trained.load_state_with_optimizer(path).result()


def test_a_save_that_fails_leaves_the_old_checkpoint(
    trained: LocalTrainingClient, mixed: list[tinker.Datum], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = trained.save_state("kept").result().path
    before = log_probs(trained, mixed)
    step(trained, mixed, ADAM)

    def full(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("vlm.local.checkpoint.save_file", full)
    with pytest.raises(OSError, match="disk full"):
        trained.save_state("kept", overwrite=True).result()
    trained.load_state(path).result()
    assert close(before, log_probs(trained, mixed), 0)
