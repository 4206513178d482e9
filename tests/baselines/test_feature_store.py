"""Features that outlive their process: what is found again, what is kept apart, and what is made anew."""

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save, save_file
from small_dinov2 import nano_folder

from baselines import nano
from baselines.features import Encoder, FeatureStore
from kshot.errors import InputError
from kshot.untrusted import DAMAGED


def test_a_folder_keeps_features_for_others(images: list[bytes], tmp_path: Path) -> None:
    first, other = Encoder(nano.NAME, folder=tmp_path), Encoder(nano.NAME, folder=tmp_path)
    expected = Encoder(nano.NAME).features(images)
    np.testing.assert_array_equal(first.features(images), expected)
    np.testing.assert_array_equal(other.features([*images, images[0]]), expected[[0, 1, 2, 3, 0]])
    assert (first.forwards, other.forwards) == (4, 0)


def test_another_setting_is_another_feature(images: list[bytes], tmp_path: Path) -> None:
    Encoder(nano.NAME, folder=tmp_path).features(images)
    for setting in ({"readout": "last4"}, {"size": 32}):
        encoder = Encoder(nano.NAME, folder=tmp_path, **setting)
        np.testing.assert_array_equal(encoder.features(images), Encoder(nano.NAME, **setting).features(images))
        assert encoder.forwards == 4


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("baselines.features.FORMAT", 0),
        ("baselines.features.version", lambda name: f"{name} 0"),
        ("baselines.features.processor", lambda: "another"),
        ("torch.get_num_threads", lambda: 99),
        ("torch.backends.cpu.get_cpu_capability", lambda: "another"),
    ],
)
def test_what_rounds_otherwise_is_kept_apart(
    name: str, value: object, images: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Encoder(nano.NAME, folder=tmp_path).features(images[:1])
    monkeypatch.setattr(name, value)
    other = Encoder(nano.NAME, folder=tmp_path)
    other.features(images[:1])
    assert other.forwards == 1


@pytest.mark.parametrize("change", ["heads", "weights"])
def test_another_model_is_another_feature(change: str, images: list[bytes], tmp_path: Path) -> None:
    """Of the same name; and the same weights may be of another number of heads, which only config.json states."""
    heads = {"num_heads": 2} if change == "heads" else {}
    paths = [nano_folder(tmp_path / "one" / "model"), nano_folder(tmp_path / "other" / "model", **heads)]
    if change == "weights":
        tensors = load_file(paths[1] / "model.safetensors")
        save_file({**tensors, "norm.bias": tensors["norm.bias"] + 1}, paths[1] / "model.safetensors")
    first = Encoder(str(paths[0]), folder=tmp_path / "cache").features(images)
    other = Encoder(str(paths[1]), folder=tmp_path / "cache").features(images)
    np.testing.assert_array_equal(other, Encoder(str(paths[1])).features(images))
    assert np.abs(other - first).max() > 0.1


def test_what_a_gpu_is_fed_is_kept_too(images: list[bytes], tmp_path: Path) -> None:
    """The way of a GPU through the folder, on a CPU."""
    first, other = Encoder(nano.NAME, folder=tmp_path), Encoder(nano.NAME, folder=tmp_path)
    first._cpu = other._cpu = False
    expected = first.features(images[:2])
    np.testing.assert_array_equal(other.features(images)[:2], expected)
    assert (first.forwards, other.forwards) == (2, 2)


@pytest.mark.parametrize("damage", ["empty", "nonsense", "half", "a bit of a feature", "a bit of a key"])
def test_a_damaged_file_is_set_aside_and_made_again(
    images: list[bytes], tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = Encoder(nano.NAME, folder=tmp_path).features(images)
    paths = [*tmp_path.rglob("*.safetensors")]
    for path in paths:
        whole = path.read_bytes()
        tensors = load(whole)
        if damage.startswith("a bit"):
            tensor = tensors["features" if damage.endswith("feature") else "keys"]
            tensor.view(torch.uint8)[0, 1] ^= 1
        content = {"empty": b"", "nonsense": b"nonsense", "half": whole[:-8]}.get(damage, save(tensors))
        path.write_bytes(content)
    again = Encoder(nano.NAME, folder=tmp_path)
    np.testing.assert_array_equal(again.features(images), expected)
    assert again.forwards == 4
    for path in paths:
        assert path.with_name(f"{path.name}{DAMAGED}").is_file()
        assert f"{path} is damaged; set aside" in caplog.text
    np.testing.assert_array_equal(Encoder(nano.NAME, folder=tmp_path).features(images), expected)


def test_what_another_process_is_encoding_is_waited_for(images: list[bytes], tmp_path: Path) -> None:
    encoder = Encoder(nano.NAME, folder=tmp_path)
    key = hashlib.sha256(images[2]).digest()
    store = FeatureStore(tmp_path, next(tmp_path.iterdir()).name, encoder._backbone.dim)
    theirs = np.full(encoder._backbone.dim, 7, np.float32)
    with ThreadPoolExecutor(1) as pool:
        with store.lock(key[0], wait=True):
            running = pool.submit(encoder.features, images)
            while encoder.forwards < 3 and not running.done():
                time.sleep(0.01)
            store.write(key[0], {key: theirs})
        features = running.result()
    np.testing.assert_array_equal(features[2], theirs)
    assert encoder.forwards == 3


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file cannot be written .*KSHOT_CACHE"):
        Encoder(nano.NAME, folder=tmp_path / "file")


def test_a_folder_of_somebody_else_is_named(images: list[bytes], tmp_path: Path) -> None:
    """It is there, but no lock can be made in it."""
    encoder = Encoder(nano.NAME, folder=tmp_path)
    (place,) = tmp_path.iterdir()
    (place / f".{hashlib.sha256(images[0]).digest()[0]:02x}.lock").mkdir()
    with pytest.raises(InputError, match=r"feature folder .* cannot be written .*KSHOT_CACHE") as caught:
        encoder.features(images[:1])
    assert "\n" not in str(caught.value)
