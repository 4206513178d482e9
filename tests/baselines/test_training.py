"""Requests of a head's training run: what they accumulate, and what one that fails leaves behind; and saved heads:
complete or not there."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import tinker
import torch
from safetensors.torch import load_file, save_file
from tinker import types

from baselines import nano
from baselines.lora import LoraHeadClient, datum
from kshot.errors import ImageError, InputError, ModelError, NotFiniteError, RequestError
from tests.baselines.plain_lora import data_of, gradients, same, step, trained
from vlm.classifier import steps

ADAM = types.AdamParams(learning_rate=1e-2, eps=1e-8)


@pytest.fixture
def data(make_image: Callable[..., bytes]) -> list[tinker.Datum]:
    """Eight images of two sizes, of three classes."""
    images = [make_image(seed, *((96, 48) if seed in (1, 5) else (64, 64))) for seed in range(8)]
    return data_of(images, [0, 1, 2, 0, 1, 2, 0, 1])


@pytest.fixture
def client() -> LoraHeadClient:
    return LoraHeadClient(nano.NAME, 3, rank=4, seed=0)


def test_one_batch_equals_its_halves_accumulated(data: list[tinker.Datum]) -> None:
    whole, halves = (LoraHeadClient(nano.NAME, 3, rank=4, seed=0) for _ in range(2))
    for each in (whole, halves, whole, halves):  # after two steps neither head nor B is zero
        step(each, data, ADAM)
    whole.forward_backward(data, "cross_entropy").result()
    halves.forward_backward(data[:3], "cross_entropy").result()
    halves.forward_backward(data[3:], "cross_entropy").result()
    for name, gradient in gradients(whole).items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradients(halves)[name], gradient, rtol=1e-4, atol=1e-4, msg=name)


def test_a_step_clears_the_gradients(client: LoraHeadClient, data: list[tinker.Datum]) -> None:
    step(client, data, ADAM)
    assert all(not gradient.any() for gradient in gradients(client).values())
    with pytest.raises(RequestError, match="forward_backward first"):
        client.optim_step(ADAM).result()


def number(value: Any, dtype: type = np.float32) -> tinker.TensorData:
    return tinker.TensorData.from_numpy(np.array(value, dtype))


BAD: dict[str, tuple[dict[str, Any], str]] = {  # what is changed in a good datum, and what the error must say
    "no targets": ({"target_tokens": None}, r"one class index \(int64\), got \[\]"),
    "a class too many": ({"target_tokens": number([3], np.int64)}, "target 3 is not one of 3 classes"),
    "a class below": ({"target_tokens": number([-100], np.int64)}, "target -100 is not one of 3 classes"),
    "no index": ({"target_tokens": number([1.0])}, "one class index"),
    "two targets": ({"target_tokens": number([1, 1], np.int64)}, "one class index"),
    "weights": ({"weights": number([1])}, r"got \['target_tokens', 'weights'\]"),
    "text": ({"chunks": [types.EncodedTextChunk(tokens=[1])]}, "exactly one ImageChunk, got EncodedTextChunk"),
    "nothing": ({"chunks": []}, "got nothing"),
    "two images": ({"chunks": "twice"}, "got ImageChunk, ImageChunk"),
}


def spoiled(good: tinker.Datum, change: dict[str, Any]) -> tinker.Datum:
    change = dict(change)
    (chunk,) = good.model_input.chunks
    chunks = change.pop("chunks", [chunk])
    fields = {name: value for name, value in {**good.loss_fn_inputs, **change}.items() if value is not None}
    chunks = [chunk, chunk] if chunks == "twice" else chunks
    return tinker.Datum(model_input=tinker.ModelInput(chunks=chunks), loss_fn_inputs=fields)


@pytest.mark.parametrize("kind", BAD)
def test_data_that_do_not_fit_are_named_and_change_nothing(
    kind: str, client: LoraHeadClient, data: list[tinker.Datum]
) -> None:
    change, says = BAD[kind]
    client.forward_backward(data[:2], "cross_entropy").result()
    before = gradients(client)
    with pytest.raises(RequestError, match=rf"datum 2: .*{says}"):
        client.forward_backward([*data[:2], spoiled(data[2], change)], "cross_entropy").result()
    assert same(before, gradients(client))
    client.optim_step(ADAM).result()


@pytest.mark.parametrize("image", [b"x", b"\xff\xd8\xff broken", b"\x89PNG\r\n\x1a\n broken"])
def test_an_image_that_is_none_is_named_and_changes_nothing(
    image: bytes, client: LoraHeadClient, data: list[tinker.Datum]
) -> None:
    client.forward_backward(data[:2], "cross_entropy").result()
    before = gradients(client)
    chunk = types.ImageChunk(data=image, format="png" if image.startswith(b"\x89") else "jpeg", expected_tokens=1)
    broken = tinker.Datum(tinker.ModelInput(chunks=[chunk]), data[0].loss_fn_inputs)
    with pytest.raises(ImageError, match="datum 1: "):
        client.forward_backward([data[0], broken], "cross_entropy").result()
    assert same(before, gradients(client))


def test_requests_that_do_not_fit_are_named(client: LoraHeadClient, data: list[tinker.Datum]) -> None:
    with pytest.raises(RequestError, match="no data"):
        client.forward_backward([], "cross_entropy").result()
    with pytest.raises(RequestError, match="loss 'ppo' with no configuration; use 'cross_entropy'"):
        client.forward_backward(data, "ppo").result()
    with pytest.raises(RequestError, match=r"with \{'beta'"):
        client.forward_backward(data, "cross_entropy", {"beta": 0.1}).result()
    with pytest.raises(ImageError, match="neither JPEG nor PNG"):
        datum(b"GIF89a", 0)


def test_a_step_out_of_range_is_named_and_changes_nothing(client: LoraHeadClient, data: list[tinker.Datum]) -> None:
    client.forward_backward(data, "cross_entropy").result()
    before, weights = gradients(client), trained(client)
    wrong = {"learning_rate": float("inf"), "weight_decay": float("nan"), "grad_clip_norm": -1.0}
    for name, value in {**wrong, "beta1": 1.0, "beta2": 1.5, "eps": 0.0}.items():
        with pytest.raises(RequestError, match=f"{name} = "):
            client.optim_step(types.AdamParams(**{name: value})).result()
    assert same(before, gradients(client))
    assert same(weights, trained(client))


def test_gradients_that_are_not_finite_are_cleared(client: LoraHeadClient, data: list[tinker.Datum]) -> None:
    before = trained(client)
    client.forward_backward(data[:1], "cross_entropy").result()
    next(iter(client.parameters.values())).grad.fill_(float("inf"))  # type: ignore[union-attr]
    with pytest.raises(RequestError, match="not finite"):
        client.optim_step(ADAM).result()
    assert same(before, trained(client))
    with pytest.raises(RequestError, match="forward_backward first"):
        client.optim_step(ADAM).result()


def test_a_rate_that_is_too_high_is_said(client: LoraHeadClient, data: list[tinker.Datum]) -> None:
    with torch.no_grad():
        client.parameters["head.weight"].fill_(float("inf"))
    with pytest.raises(NotFiniteError, match=r"log-probabilities .*; a learning rate was too high, or weights are"):
        client.forward_backward(data, "cross_entropy").result()
    with pytest.raises(NotFiniteError, match=r"scores .*: train with a lower one, or restore them"):
        client.class_log_probs([data[0].model_input.chunks[0].data])  # type: ignore[union-attr]


@pytest.mark.parametrize("done", [0, 1])
def test_a_pass_that_fails_leaves_no_part(
    done: int, client: LoraHeadClient, data: list[tinker.Datum], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two sizes are two passes; whichever fails, all that was accumulated goes."""
    client.forward_backward(data, "cross_entropy").result()

    def logits(*asked: Any, original: Any = client._logits) -> Any:
        for number, each in enumerate(original(*asked)):
            if number == done:
                raise MemoryError("out of memory")
            yield each

    with monkeypatch.context() as patch:
        patch.setattr(client, "_logits", logits)
        with pytest.raises(MemoryError):
            client.forward_backward(data, "cross_entropy").result()
    assert all(not gradient.any() for gradient in gradients(client).values())
    with pytest.raises(RequestError, match="forward_backward first"):
        client.optim_step(ADAM).result()


def test_the_loop_of_the_language_model_trains_a_head(client: LoraHeadClient, data: list[tinker.Datum]) -> None:
    other = LoraHeadClient(nano.NAME, 3, rank=4, seed=0)
    answers = list(steps(cast(Any, client), (data for _ in range(3)), "cross_entropy", ADAM))
    assert [out.metrics["loss:sum"] for out, _ in answers] == [step(other, data, ADAM) for _ in range(3)]
    assert same(trained(client), trained(other))


def test_a_datum_is_one_image_and_one_class(make_image: Callable[..., bytes]) -> None:
    for format in ("png", "jpeg"):
        image = make_image(0, format=format.upper())
        made = datum(image, 2)
        (chunk,) = made.model_input.chunks
        assert isinstance(chunk, types.ImageChunk)
        assert (chunk.data, chunk.format, made.model_input.length) == (image, format, 1)
        assert made.loss_fn_inputs["target_tokens"].dtype == "int64"
        assert made.loss_fn_inputs["target_tokens"].tolist() == [2]


def test_a_saved_head_predicts_the_same(
    client: LoraHeadClient, data: list[tinker.Datum], make_image: Callable[..., bytes], tmp_path: Path
) -> None:
    """Only what is trained is stored."""
    for _ in range(2):
        step(client, data, ADAM)
    client.save(tmp_path / "head")
    images = [make_image(seed) for seed in range(20, 23)]
    loaded = LoraHeadClient.load(tmp_path / "head")
    np.testing.assert_array_equal(loaded.class_log_probs(images), client.class_log_probs(images))
    assert same(load_file(tmp_path / "head" / "head.safetensors"), trained(client))
    record = {"model": nano.NAME, "n_classes": 3, "rank": 4, "readout": "cls", "size": None}
    assert json.loads((tmp_path / "head" / "kshot.json").read_text()) == record
    with pytest.raises(InputError, match="exists; give another name"):
        client.save(tmp_path / "head")


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Change the tensors of a saved head."""

    def edit(folder: Path) -> None:
        stored = load_file(folder / "head.safetensors")
        change(stored)
        save_file(stored, folder / "head.safetensors")

    return edit


def recorded(name: str, value: object) -> Callable[[Path], object]:
    """Change a value of a saved head's record."""

    def edit(folder: Path) -> None:
        path = folder / "kshot.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))

    return edit


def pipe(folder: Path) -> None:
    (folder / "head.safetensors").unlink()
    os.mkfifo(folder / "head.safetensors")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "damaged one .*not a regular file": pipe,
    r"damaged one \(model in kshot.json is 5\)": recorded("model", 5),
    r"damaged one \(rank in kshot.json is '4'\)": recorded("rank", "4"),
    r"damaged one \(size in kshot.json is \[56\]\)": recorded("size", [56]),
    r"damaged one \(kshot.json holds no record\)": lambda folder: (folder / "kshot.json").write_text("[]"),
    "head.bias has numbers that are not finite": tensors(lambda s: s["head.bias"][0].fill_(torch.nan)),
    "no trained head": lambda folder: (folder / "head.safetensors").unlink(),
    "damaged one .*header": lambda folder: (folder / "head.safetensors").write_bytes(b"short"),
    "1 tensors do not fit, first 'blocks": tensors(lambda stored: stored.pop(min(stored))),
    "1 tensors do not fit, first 'head.bias'": tensors(lambda s: s.update({"head.bias": s["head.bias"].half()})),
    "damaged one .*char 0": lambda folder: (folder / "kshot.json").write_bytes(b"short"),
    "damaged one .*'model'": lambda folder: (folder / "kshot.json").write_text('{"n_classes": 3}'),
}


@pytest.mark.parametrize("says", DAMAGE)
def test_a_damaged_head_is_named(says: str, client: LoraHeadClient, tmp_path: Path) -> None:
    client.save(tmp_path / "head")
    DAMAGE[says](tmp_path / "head")
    with pytest.raises(ModelError, match=says) as caught:
        LoraHeadClient.load(tmp_path / "head")
    assert "\n" not in str(caught.value)


def test_a_save_is_complete_or_not_there(
    client: LoraHeadClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("baselines.lora.save_file", full)
    with pytest.raises(OSError, match="disk full"):
        client.save(tmp_path / "head")
    assert list(tmp_path.iterdir()) == []
