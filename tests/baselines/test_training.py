"""Requests of a head's training run: what they accumulate, and what one that fails leaves behind; and saved heads:
loaded they predict the same, and what cannot be read is named."""

import json
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
from baselines.lora import LoraHeadClient, datum, load_head, save_head
from kshot.errors import ImageError, InputError, KshotError, ModelError, RequestError
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
    client.forward_backward(data, "cross_entropy").result()
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


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": float("inf")},
        {"weight_decay": float("nan")},
        {"grad_clip_norm": -1.0},
        {"beta1": 1.0},
        {"beta2": 1.5},
        {"eps": 0.0},
    ],
)
def test_a_step_out_of_range_is_named_and_changes_nothing(
    wrong: dict[str, float], client: LoraHeadClient, data: list[tinker.Datum]
) -> None:
    client.forward_backward(data, "cross_entropy").result()
    before, weights = gradients(client), trained(client)
    with pytest.raises(RequestError, match=f"{next(iter(wrong))} = "):
        client.optim_step(types.AdamParams(**wrong)).result()
    assert same(before, gradients(client))
    assert same(weights, trained(client))


def test_gradients_that_are_not_finite_are_cleared(client: LoraHeadClient, data: list[tinker.Datum]) -> None:
    before = trained(client)
    client.forward_backward(data[:1], "cross_entropy").result()
    next(iter(client.head.trainable_parameters().values())).grad.fill_(float("inf"))  # type: ignore[union-attr]
    with pytest.raises(RequestError, match="not finite"):
        client.optim_step(ADAM).result()
    assert same(before, trained(client))
    with pytest.raises(RequestError, match="forward_backward first"):
        client.optim_step(ADAM).result()


@pytest.mark.parametrize("done", [0, 1])
def test_a_pass_that_fails_leaves_no_part(
    done: int, client: LoraHeadClient, data: list[tinker.Datum], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two sizes are two passes; whichever fails, all that was accumulated goes."""
    client.forward_backward(data, "cross_entropy").result()

    def logits(pixels: Any, original: Any = client.head.logits) -> Any:
        for number, each in enumerate(original(pixels)):
            if number == done:
                raise MemoryError("out of memory")
            yield each

    with monkeypatch.context() as patch:
        patch.setattr(client.head, "logits", logits)
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


@pytest.fixture(scope="module")
def after_two_steps(make_image: Callable[..., bytes]) -> LoraHeadClient:
    client = LoraHeadClient(nano.NAME, 3, rank=4, seed=0)
    for _ in range(2):
        step(client, data_of([make_image(seed) for seed in range(4)], [0, 1, 2, 0]), ADAM)
    return client


def test_a_loaded_head_predicts_the_same(after_two_steps: LoraHeadClient, images: list[bytes], tmp_path: Path) -> None:
    """Only what is trained is stored."""
    head = after_two_steps.head
    save_head(tmp_path / "head", head)
    loaded = load_head(tmp_path / "head")
    assert loaded.config == head.config
    np.testing.assert_array_equal(loaded.class_log_probs(images), head.class_log_probs(images))
    assert {path.name for path in (tmp_path / "head").iterdir()} == {"head.safetensors", "kshot.json"}
    assert same(load_file(tmp_path / "head" / "head.safetensors"), trained(after_two_steps))
    record = {"model": nano.NAME, "n_classes": 3, "rank": 4, "readout": "cls", "size": None}
    assert json.loads((tmp_path / "head" / "kshot.json").read_text()) == record


def cut(file: Path) -> None:
    file.write_bytes(b"short")


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Of the tensors of a file, or of its record."""

    def edit(file: Path) -> None:
        content = json.loads(file.read_text()) if file.suffix == ".json" else load_file(file)
        change(content)
        file.write_text(json.dumps(content)) if file.suffix == ".json" else save_file(content, file)

    return edit


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("head.safetensors", Path.unlink, "no trained head"),
        ("head.safetensors", cut, "or a damaged one"),
        ("head.safetensors", edited(lambda tensors: tensors.pop(min(tensors))), "do not fit the head in 1 tensors"),
        (
            "head.safetensors",
            edited(lambda t: t.update({min(t): t[min(t)].half()})),
            "do not fit the head in 1 tensors",
        ),
        ("kshot.json", cut, "or a damaged one"),
        ("kshot.json", edited(lambda record: record.pop("model")), "or a damaged one .*model"),
        ("kshot.json", edited(lambda record: record.update(size="64")), "or a damaged one .*size"),
    ],
)
def test_what_is_damaged_is_named(
    name: str, damage: Callable[[Path], None], says: str, after_two_steps: LoraHeadClient, tmp_path: Path
) -> None:
    save_head(tmp_path / "head", after_two_steps.head)
    damage(tmp_path / "head" / name)
    with pytest.raises(ModelError, match=says) as caught:
        load_head(tmp_path / "head")
    assert "\n" not in str(caught.value)


def test_a_save_is_complete_or_not_there(
    after_two_steps: LoraHeadClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("baselines.lora.save_file", full)
        with pytest.raises(KshotError, match=r"cannot be written \(disk full\)"):
            save_head(tmp_path / "head", after_two_steps.head)
    assert list(tmp_path.iterdir()) == []
    save_head(tmp_path / "head", after_two_steps.head)
    with pytest.raises(InputError, match="exists; give another name"):
        save_head(tmp_path / "head", after_two_steps.head)
