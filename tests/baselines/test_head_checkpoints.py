"""Saved heads: loaded they are the same, training goes on bit for bit, and what cannot be read is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from safetensors.torch import load_file, save_file
from tinker import types

from baselines import nano
from baselines.training import LoraHeadClient, load_sampler
from kshot.errors import KshotError, ModelError, RequestError
from tests.baselines.plain_lora import data_of, step, trained

ADAM = types.AdamParams(learning_rate=1e-2, eps=1e-8)


@pytest.fixture
def images(make_image: Callable[..., bytes]) -> list[bytes]:
    return [make_image(seed) for seed in range(4)]


@pytest.fixture
def data(images: list[bytes]) -> list[tinker.Datum]:
    return data_of(images, [0, 1, 2, 0])


def made(state: Path | None, seed: int = 0, **options: Any) -> LoraHeadClient:
    return LoraHeadClient(nano.NAME, **{"n_classes": 3, "rank": 4, **options}, seed=seed, state=state)


@pytest.fixture
def client(tmp_path: Path, data: list[tinker.Datum]) -> LoraHeadClient:
    """Of two steps."""
    client = made(tmp_path)
    for _ in range(2):
        step(client, data, ADAM)
    return client


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_training_goes_on_bit_for_bit_with_the_optimizer(
    client: LoraHeadClient, data: list[tinker.Datum], tmp_path: Path
) -> None:
    path = client.save_state("step-2").result().path
    assert path == f"tinker://{client.model_id}/weights/step-2"
    uninterrupted = [step(client, data, ADAM) for _ in range(3)]
    after = trained(client)
    resumed = made(tmp_path, seed=9)
    assert resumed.load_state_with_optimizer(path).result().path == path
    assert [step(resumed, data, ADAM) for _ in range(3)] == uninterrupted
    assert same(trained(resumed), after)
    client.load_state_with_optimizer(path).result()
    assert [step(client, data, ADAM) for _ in range(3)] == uninterrupted


def test_load_state_takes_the_weights_and_adam_starts_anew(client: LoraHeadClient, data: list[tinker.Datum]) -> None:
    """A first step of Adam is the gradient's sign times the learning rate, whatever was before: β's cancel at t = 1."""
    before, path = trained(client), client.save_state("kept").result().path
    step(client, data, ADAM)
    client.forward_backward(data, "cross_entropy").result()
    client.load_state(path).result()
    assert same(trained(client), before)
    with pytest.raises(RequestError, match="forward_backward first"):  # what was gathered is of other weights
        client.optim_step(ADAM).result()
    client.forward_backward(data, "cross_entropy").result()
    gradients = {name: gradient.clone() for name, gradient in client._run.gradients().items()}
    client.optim_step(ADAM).result()
    for name, value in trained(client).items():
        gradient = gradients[name]
        expected = before[name] - ADAM.learning_rate * gradient / (gradient.abs() + ADAM.eps)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_before_the_first_step_there_is_no_optimizer_to_resume(tmp_path: Path, data: list[tinker.Datum]) -> None:
    client = made(tmp_path)
    path = client.save_state("start").result().path
    uninterrupted = [step(client, data, ADAM) for _ in range(2)]
    client.load_state_with_optimizer(path).result()
    assert [step(client, data, ADAM) for _ in range(2)] == uninterrupted


def test_saved_sampler_weights_equal_the_snapshot(
    client: LoraHeadClient, images: list[bytes], data: list[tinker.Datum], tmp_path: Path
) -> None:
    snapshot = client.save_weights_and_get_sampling_client().result()
    path = client.save_weights_for_sampler("final").result().path
    assert path == f"tinker://{client.model_id}/sampler_weights/final"
    before = snapshot.class_log_probs(images)
    step(client, data, ADAM)
    np.testing.assert_array_equal(load_sampler(path, tmp_path).class_log_probs(images), before)
    np.testing.assert_array_equal(snapshot.class_log_probs(images), before)
    moved = client.save_weights_and_get_sampling_client().result().class_log_probs(images)
    assert not np.array_equal(moved, before)


def test_only_what_is_trained_is_stored(client: LoraHeadClient, tmp_path: Path) -> None:
    client.save_state("a").result()
    client.save_weights_for_sampler("b").result()
    weights, sampler = next(tmp_path.rglob("weights/a")), next(tmp_path.rglob("sampler_weights/b"))
    assert same(load_file(weights / "head.safetensors"), trained(client))
    assert {p.name for p in weights.iterdir()} == {"head.safetensors", "optimizer.safetensors", "kshot.json"}
    assert {p.name for p in sampler.iterdir()} == {"head.safetensors", "kshot.json"}
    assert json.loads((weights / "kshot.json").read_text()) == {
        "model": nano.NAME,
        "n_classes": 3,
        "rank": 4,
        "readout": "cls",
        "size": None,
    }


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": 5}, "rank 4 and not 5"),
        ({"n_classes": 2}, "n_classes 3 and not 2"),
        ({"readout": "cls+mean"}, r"readout 'cls' and not 'cls\+mean'"),
        ({"size": 64, "rank": 2}, "rank 4 and not 2, size None and not 64"),
    ],
)
def test_the_difference_of_another_run_is_told(
    options: dict[str, Any], says: str, client: LoraHeadClient, tmp_path: Path
) -> None:
    path, other = client.save_state("kept").result().path, made(tmp_path, **options)
    before = trained(other)
    with pytest.raises(RequestError, match=says):
        other.load_state(path).result()
    assert same(trained(other), before)


def test_a_name_is_written_once(client: LoraHeadClient, data: list[tinker.Datum]) -> None:
    before, path = trained(client), client.save_state("once").result().path
    step(client, data, ADAM)
    with pytest.raises(RequestError, match="exists; give another name"):
        client.save_state("once").result()
    client.load_state(path).result()
    assert same(trained(client), before)


@pytest.mark.parametrize("name", ["", "..", "a/b", "../../etc", ".hidden", "a\\b", "a b", "x" * 129, "a\n"])
def test_names_that_are_no_folders_are_refused(client: LoraHeadClient, name: str) -> None:
    for save in (client.save_state, client.save_weights_for_sampler):
        with pytest.raises(RequestError, match="checkpoint name"):
            save(name)


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
def test_paths_that_are_none_are_refused(client: LoraHeadClient, tmp_path: Path, path: str) -> None:
    with pytest.raises(RequestError, match="no checkpoint path"):
        client.load_state(path).result()
    with pytest.raises(RequestError, match="no checkpoint path"):
        load_sampler(path, tmp_path)


def test_without_a_folder_there_are_no_checkpoints() -> None:
    client = made(None)
    for call in (client.save_state, client.load_state, client.load_state_with_optimizer):
        with pytest.raises(RequestError, match="no folder for checkpoints"):
            call("name")
    with pytest.raises(RequestError, match="no folder for checkpoints"):
        client.save_weights_for_sampler("name")


def test_what_is_missing_is_named(client: LoraHeadClient) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        client.load_state(f"tinker://{client.model_id}/weights/never-saved").result()
    weights = client.save_weights_for_sampler("weights-only").result().path
    with pytest.raises(RequestError, match="without optimizer"):
        client.load_state_with_optimizer(weights).result()
    client.load_state(weights).result()


def cut(file: Path) -> None:
    file.write_bytes(b"short")


def drop_a_tensor(file: Path) -> None:
    tensors = load_file(file)
    del tensors[min(tensors)]
    save_file(tensors, file)


def halve_a_tensor(file: Path) -> None:
    tensors = load_file(file)
    save_file({**tensors, min(tensors): tensors[min(tensors)].half()}, file)


def forget_the_rank(file: Path) -> None:
    record = json.loads(file.read_text())
    del record["rank"]
    file.write_text(json.dumps(record))


def text_for_a_number(file: Path) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), "size": "64"}))


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("head.safetensors", cut, "is damaged"),
        ("head.safetensors", drop_a_tensor, "does not fit the head in 1 tensors"),
        ("head.safetensors", halve_a_tensor, "does not fit the head in 1 tensors"),
        ("optimizer.safetensors", drop_a_tensor, "does not fit the optimizer in 1 tensors"),
        ("kshot.json", cut, "is damaged"),
        ("kshot.json", forget_the_rank, "is damaged.*'rank'"),
        ("kshot.json", text_for_a_number, "is damaged.*size is '64'"),
    ],
)
def test_what_is_damaged_is_named_and_changes_nothing(
    name: str, damage: Callable[[Path], None], says: str, client: LoraHeadClient, data: list[tinker.Datum]
) -> None:
    state, path = client._state, client.save_state("broken").result().path
    assert state is not None
    damage(next(state.rglob(name)))
    step(client, data, ADAM)
    before, moments = trained(client), client._run.optimizer_tensors()
    with pytest.raises(ModelError, match=says):
        client.load_state_with_optimizer(path).result()
    assert same(trained(client), before)
    assert same(client._run.optimizer_tensors(), moments)


def test_a_save_that_fails_leaves_nothing(client: LoraHeadClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("baselines.training.save_file", full)
        with pytest.raises(KshotError, match=r"cannot be written to .* \(disk full\)"):
            client.save_state("kept").result()
    client.save_state("kept").result()
