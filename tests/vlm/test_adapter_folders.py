"""An adapter folder that lies anywhere: read as it was saved, or refused by name."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
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

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def trained(service: LocalServiceClient, prompt: Prompt, examples: list[Pictured]) -> LocalTrainingClient:
    client = service.create_lora_training_client(nano.NAME, rank=4, seed=7).result()
    client.forward_backward([prompt.datum(e.image, e.label) for e in examples[:4]], "cross_entropy")
    client.optim_step(types.AdamParams(learning_rate=1e-2, eps=1e-8)).result()
    return client


@pytest.fixture(scope="module")
def saved(trained: LocalTrainingClient, service: LocalServiceClient) -> Path:
    """What a sampler's save writes."""
    return folder_of(service._registry.state, trained.save_weights_for_sampler("x").result().path)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, somewhere else."""
    return Path(shutil.copytree(saved, tmp_path / "an adapter"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServiceClient]:
    client = LocalServiceClient(tmp_path_factory.mktemp("no state"), cache_bytes=1 << 20)
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


def test_what_is_no_folder_is_named(folder: Path, other: LocalServiceClient) -> None:
    for missing in (folder / "nowhere", folder / "kshot.json"):
        with pytest.raises(ModelError, match="is no folder; give one that kshot train or PEFT wrote"):
            other.create_sampling_client_from_folder(missing).result()


Change = Callable[[Path], object]
DAMAGED = r"adapter .*an adapter is damaged \("


def record(text: str) -> Change:
    return lambda folder: (folder / "kshot.json").write_bytes(text.encode("utf-8", "surrogateescape"))


def of_lora(lora: object) -> Change:
    return record(json.dumps({"base_model": nano.NAME, "experts": False, "user_metadata": {}, "lora": lora}))


def cut(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 1)


def spoil_a_number(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, folder / WEIGHTS)


def pickle(folder: Path) -> None:
    """Which is never read."""
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def of_another_model(folder: Path) -> None:
    written = json.loads((folder / "kshot.json").read_text())
    (folder / "kshot.json").write_text(json.dumps(written | {"lora": written["lora"] | {"rank": 1000}}))


LORA = (1, [], {"rank": "4"}, {"rank": True}, {"rank": 4.0}, {"rank": 0}, {"rnk": 4}, {"train_mlp": 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *((record(text), DAMAGED) for text in ("", "[]", "[" * 100_000, "{}", '{"base_model": 1}', "\udcff")),
        *((of_lora(lora), DAMAGED) for lora in LORA),
        (cut, "is damaged"),
        (pickle, "is damaged"),
        (spoil_a_number, "not all of its numbers are finite"),
        (of_another_model, rf"does not belong to the model {nano.NAME}: .*does not fit"),
        (
            lambda folder: [(folder / name).unlink() for name in ("kshot.json", "adapter_config.json")],
            r"has neither kshot\.json nor adapter_config\.json; give a folder with an adapter",
        ),
    ],
)
def test_what_cannot_be_used_is_named(folder: Path, other: LocalServiceClient, change: Change, message: str) -> None:
    change(folder)
    with pytest.raises(ModelError, match=message) as raised:
        other.create_sampling_client_from_folder(folder).result()
    assert "\n" not in str(raised.value)
