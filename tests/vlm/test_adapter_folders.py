"""An adapter folder that lies anywhere: read as it was saved, or refused by name."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tinker
import torch
from safetensors.torch import load_file, save_file
from tinker import types

from kshot.checks import folder_of
from kshot.errors import ModelError, UnknownNameError
from tests.vlm.checkpoints import sharded
from tests.vlm.helpers import Pictured
from vlm import nano
from vlm.classifier import predict
from vlm.local.clients import LocalTrainingClient
from vlm.local.registry import LocalServiceClient
from vlm.prompts import Prompt


@pytest.fixture
def trained(client: LocalTrainingClient, mixed: list[tinker.Datum]) -> LocalTrainingClient:
    client.forward_backward(mixed, "cross_entropy")
    client.optim_step(types.AdamParams(learning_rate=1e-2, eps=1e-8)).result()
    return client


@pytest.fixture
def folder(trained: LocalTrainingClient, service: LocalServiceClient, tmp_path: Path) -> Path:
    """A copy, somewhere else, of what a sampler's save writes."""
    path = trained.save_weights_for_sampler("x").result().path
    return Path(shutil.copytree(folder_of(service._registry.state, path), tmp_path / "an adapter"))


@pytest.fixture
def other(tmp_path: Path) -> Iterator[LocalServiceClient]:
    client = LocalServiceClient(tmp_path / "no state", cache_bytes=1 << 20)
    yield client
    client.close()


def test_it_answers_as_the_run_did(
    trained: LocalTrainingClient, folder: Path, other: LocalServiceClient, prompt: Prompt, examples: list[Pictured]
) -> None:
    images = [e.image for e in examples[:4]]
    snapshot = trained.save_weights_and_get_sampling_client().result()
    loaded = other.create_sampling_client_from_folder(folder).result()
    assert (predict(loaded, images, prompt) == predict(snapshot, images, prompt)).all()
    assert loaded.get_base_model() == nano.NAME
    base = other.create_sampling_client(base_model=nano.NAME).result()
    assert (predict(base, images, prompt) != predict(loaded, images, prompt)).any()


def test_a_model_that_has_moved(
    folder: Path, other: LocalServiceClient, prompt: Prompt, examples: list[Pictured], tmp_path: Path
) -> None:
    images = [e.image for e in examples[:2]]
    expected = predict(other.create_sampling_client_from_folder(folder).result(), images, prompt)
    record = json.loads((folder / "kshot.json").read_text())
    (folder / "kshot.json").write_text(json.dumps(record | {"base_model": "/gone/model"}))
    with pytest.raises(ModelError, match=r"is of the model /gone/model, which is not here; say with base_model"):
        other.create_sampling_client_from_folder(folder).result()
    (tmp_path / "moved").mkdir()
    moved = str(sharded(tmp_path / "moved"))
    loaded = other.create_sampling_client_from_folder(folder, moved).result()
    assert loaded.get_base_model() == moved
    assert predict(loaded, images, prompt) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(UnknownNameError, match="unknown model 'nowhere'"):
        other.create_sampling_client_from_folder(folder, "nowhere").result()


def test_what_is_no_adapter_is_named(folder: Path, other: LocalServiceClient) -> None:
    (folder / "kshot.json").rename(folder / "kept")
    with pytest.raises(ModelError, match=r"has no kshot\.json; only adapters that kshot wrote can be read"):
        other.create_sampling_client_from_folder(folder).result()
    for missing in (folder / "nowhere", folder / "kept"):
        with pytest.raises(ModelError, match="is no folder; give one that kshot train wrote"):
            other.create_sampling_client_from_folder(missing).result()


@pytest.mark.parametrize(
    "record",
    [
        "",
        "[]",
        "[" * 100_000,
        "{}",
        '{"base_model": 1}',
        *(
            json.dumps({"base_model": nano.NAME, "experts": False, "user_metadata": {}, "lora": lora})
            for lora in (1, [], {"rank": "4"}, {"rank": True}, {"rank": 4.0}, {"rank": 0}, {"rnk": 4}, {"train_mlp": 1})
        ),
        "\udcff",
    ],
)
def test_a_damaged_record_is_named(folder: Path, other: LocalServiceClient, record: str) -> None:
    (folder / "kshot.json").write_bytes(record.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match=r"adapter .*an adapter is damaged \(") as raised:
        other.create_sampling_client_from_folder(folder).result()
    assert "\n" not in str(raised.value)


def test_damaged_weights_are_named(folder: Path, other: LocalServiceClient) -> None:
    file = folder / "adapter_model.safetensors"
    whole, tensors = file.read_bytes(), load_file(file)
    file.write_bytes(whole[:-1])
    with pytest.raises(ModelError, match="is damaged"):
        other.create_sampling_client_from_folder(folder).result()
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(ModelError, match="not all of its numbers are finite"):
        other.create_sampling_client_from_folder(folder).result()
    file.unlink()
    with pytest.raises(ModelError, match="is damaged"):
        other.create_sampling_client_from_folder(folder).result()


def test_an_adapter_of_another_model_is_named(folder: Path, other: LocalServiceClient) -> None:
    record = json.loads((folder / "kshot.json").read_text())
    (folder / "kshot.json").write_text(json.dumps(record | {"lora": record["lora"] | {"rank": 1000}}))
    with pytest.raises(ModelError, match=rf"does not belong to the model {nano.NAME}: .*does not fit"):
        other.create_sampling_client_from_folder(folder).result()


def test_pickles_are_never_read(folder: Path, other: LocalServiceClient) -> None:
    torch.save({}, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="is damaged"):
        other.create_sampling_client_from_folder(folder).result()
