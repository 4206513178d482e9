"""Saved heads: loaded they predict the same, and what cannot be read is named."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tinker import types

from baselines import nano
from baselines.lora import LoraHeadClient, load_head, save_head
from kshot.errors import InputError, KshotError, ModelError
from tests.baselines.plain_lora import data_of, same, step, trained


@pytest.fixture(scope="module")
def images(make_image: Callable[..., bytes]) -> list[bytes]:
    return [make_image(seed) for seed in range(4)]


@pytest.fixture(scope="module")
def client(images: list[bytes]) -> LoraHeadClient:
    """Of two steps."""
    client = LoraHeadClient(nano.NAME, 3, rank=4, seed=0)
    for _ in range(2):
        step(client, data_of(images, [0, 1, 2, 0]), types.AdamParams(learning_rate=1e-2, eps=1e-8))
    return client


def test_a_loaded_head_predicts_the_same(client: LoraHeadClient, images: list[bytes], tmp_path: Path) -> None:
    save_head(tmp_path / "head", client.head)
    loaded = load_head(tmp_path / "head")
    assert loaded.config == client.head.config
    np.testing.assert_array_equal(loaded.class_log_probs(images), client.head.class_log_probs(images))


def test_only_what_is_trained_is_stored(client: LoraHeadClient, tmp_path: Path) -> None:
    save_head(tmp_path / "head", client.head)
    assert {path.name for path in (tmp_path / "head").iterdir()} == {"head.safetensors", "kshot.json"}
    assert same(load_file(tmp_path / "head" / "head.safetensors"), trained(client))
    record = {"model": nano.NAME, "n_classes": 3, "rank": 4, "readout": "cls", "size": None}
    assert json.loads((tmp_path / "head" / "kshot.json").read_text()) == record


def cut(file: Path) -> None:
    file.write_bytes(b"short")


def drop_a_tensor(file: Path) -> None:
    tensors = load_file(file)
    del tensors[min(tensors)]
    save_file(tensors, file)


def halve_a_tensor(file: Path) -> None:
    tensors = load_file(file)
    save_file({**tensors, min(tensors): tensors[min(tensors)].half()}, file)


def forget_the_model(file: Path) -> None:
    record = json.loads(file.read_text())
    del record["model"]
    file.write_text(json.dumps(record))


def text_for_a_number(file: Path) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), "size": "64"}))


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("head.safetensors", Path.unlink, "no trained head"),
        ("head.safetensors", cut, "or a damaged one"),
        ("head.safetensors", drop_a_tensor, "do not fit the head in 1 tensors"),
        ("head.safetensors", halve_a_tensor, "do not fit the head in 1 tensors"),
        ("kshot.json", cut, "or a damaged one"),
        ("kshot.json", forget_the_model, "or a damaged one .*model"),
        ("kshot.json", text_for_a_number, "or a damaged one .*size"),
    ],
)
def test_what_is_damaged_is_named(
    name: str, damage: Callable[[Path], None], says: str, client: LoraHeadClient, tmp_path: Path
) -> None:
    save_head(tmp_path / "head", client.head)
    damage(tmp_path / "head" / name)
    with pytest.raises(ModelError, match=says) as caught:
        load_head(tmp_path / "head")
    assert "\n" not in str(caught.value)


def test_a_save_is_complete_or_not_there(
    client: LoraHeadClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("baselines.lora.save_file", full)
        with pytest.raises(KshotError, match=r"cannot be written \(disk full\)"):
            save_head(tmp_path / "head", client.head)
    assert list(tmp_path.iterdir()) == []
    save_head(tmp_path / "head", client.head)
    with pytest.raises(InputError, match="exists; give another name"):
        save_head(tmp_path / "head", client.head)
