"""Loading checkpoints in hub layout: dense and mixture-of-experts, whole and broken, from folders."""

import json
import logging
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from kshot.errors import ModelError
from tests.vlm.checkpoints import copied, experts, sharded, with_config, with_weights
from vlm import nano
from vlm.local.model.load import load
from vlm.local.model.placement import StoredTensor, stored_tensors

EMBEDDINGS = "model.language_model.embed_tokens.weight"
EXPERTS = "model.language_model.layers.0.mlp.experts.down_proj"
CPU, GPUS = [torch.device("cpu")], [torch.device("cuda", n) for n in range(3)]
F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sharded(tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("moe")
    return folder, experts(folder)


def same(one: Any, other: Any) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def refusal(name: object, **options: Any) -> str:
    """The one line that `load` refuses with."""
    with pytest.raises(ModelError) as caught:
        load(str(name), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_stock_model_comes_ready_for_reading(stock: Any) -> None:
    model = load(nano.NAME)
    assert type(model) is type(stock)
    assert same(model, stock)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert (model.dtype, model.device.type) == (F32, "cpu")


def test_weights_in_several_files_are_one_model(parts: Path, stock: Any) -> None:
    assert len(list(parts.glob("*.safetensors"))) == 4
    assert same(load(str(parts)), stock)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_the_dtype_asked_for_is_that_of_every_weight(parts: Path, dtype: torch.dtype) -> None:
    assert {p.dtype for p in load(str(parts), dtype=dtype).parameters()} == {dtype}


def test_without_one_the_configuration_says_the_dtype_else_the_weights_do(tmp_path: Path) -> None:
    folder = copied(nano.folder(), tmp_path)
    with_config(folder, dtype="bfloat16")
    assert load(str(folder)).dtype == BF16
    written = json.loads((folder / "config.json").read_text())
    with_config(folder, dtype=None, text_config={**written["text_config"], "dtype": "bfloat16"})  # as on the hub
    assert load(str(folder)).dtype == BF16
    with_config(folder, text_config=written["text_config"])
    assert load(str(folder)).dtype == F32
    load(str(folder), dtype=BF16).save_pretrained(folder)
    with_config(folder, dtype=None, text_config=written["text_config"], vision_config=written["vision_config"])
    assert load(str(folder)).dtype == BF16


def test_a_mixture_of_experts_is_loaded_as_saved(moe: tuple[Path, Any]) -> None:
    folder, saved = moe
    model = load(str(folder))
    assert type(model).__name__ == "Qwen3VLMoeForConditionalGeneration"
    assert same(model, saved)
    assert load(str(folder), dtype=BF16).dtype == BF16


def test_a_mixture_of_experts_is_loaded_as_the_hub_has_it(moe: tuple[Path, Any], tmp_path: Path) -> None:
    folder, saved = copied(moe[0], tmp_path), moe[1]
    stacked = {name: p for name, p in saved.state_dict().items() if ".experts." in name}
    assert len(stacked) == 4
    with_weights(folder, {name: p.transpose(1, 2) for name, p in stacked.items()})
    assert same(load(str(folder)), saved)


def test_a_tied_head_may_be_stored_too(tmp_path: Path, stock: Any) -> None:
    folder = copied(nano.folder(), tmp_path)
    with_weights(folder, {"lm_head.weight": stock.lm_head.weight.detach().clone()})
    model = load(str(folder))
    assert same(model, stock)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_loading_says_nothing(
    parts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    from transformers.utils import logging as theirs

    before = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    load(str(parts))
    folder = copied(nano.folder(), tmp_path)
    with_weights(folder, {EMBEDDINGS: None})
    refusal(folder)
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert (theirs.get_verbosity(), theirs.is_progress_bar_enabled()) == before


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "bert"}, ["'bert'", "qwen3_vl and qwen3_vl_moe"]),
        ({"model_type": None, "auto_map": {"AutoConfig": "code.Config"}}, ["type None"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantised", "the model it was made from"]),
        ({"text_config": {"hidden_size": "large"}}, ["cannot be loaded", "hidden_size"]),
    ],
)
def test_other_models_are_refused(tmp_path: Path, config: dict[str, Any], words: list[str]) -> None:
    folder = copied(nano.folder(), tmp_path)
    with_config(folder, **config)
    (folder / "code.py").write_text("raise SystemExit('a script was run')")
    message = refusal(folder)
    assert all(word in message for word in [str(folder), *words]), message


def test_a_configuration_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert "JSONDecodeError" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "cannot be loaded" in refusal(tmp_path)


def test_missing_weight_files_are_counted_before_any_is_read(parts: Path, tmp_path: Path) -> None:
    folder = copied(parts, tmp_path)
    for n in (2, 4):
        (folder / f"model-0000{n}-of-00004.safetensors").unlink()
    missing = "2 of 4 weight files are missing, first model-00002-of-00004.safetensors; download it again"
    assert refusal(folder) == f"checkpoint {folder} is incomplete: {missing}"


@pytest.mark.parametrize("keep", [100, 0, 4, 1_000_000])
def test_a_file_that_is_cut_short_is_named(parts: Path, tmp_path: Path, keep: int) -> None:
    folder = copied(parts, tmp_path)
    file = folder / "model-00003-of-00004.safetensors"
    whole = file.stat().st_size
    os.truncate(file, keep)
    message = refusal(folder)
    assert f"delete {file} and download it again" in message
    assert str(folder) in message
    if keep > 100:
        assert f"is cut short: {file.name} has 1,000,000 of {whole:,} bytes" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", ["Git LFS pointer", "git lfs pull"]),
        (b"<html>not found</html>", ["no safetensors file"]),
        (struct.pack("<Q", 2) + b"[]", ["no safetensors file"]),
        (struct.pack("<Q", 14) + b'{"a": {"b":1}}', ["no safetensors file"]),
        (struct.pack("<Q", 2) + b"{} and more", ["is broken", "has 19 of 10 bytes"]),
    ],
)
def test_what_is_no_safetensors_file_is_said(tmp_path: Path, content: bytes, words: list[str]) -> None:
    folder = copied(nano.folder(), tmp_path)
    (folder / "model.safetensors").write_bytes(content)
    message = refusal(folder)
    assert all(word in message for word in ["model.safetensors", str(folder), *words]), message


def test_a_broken_index_is_said(parts: Path, tmp_path: Path) -> None:
    folder = copied(parts, tmp_path)
    for text in ("{", "[]", "{}", '{"weight_map": []}'):
        (folder / "model.safetensors.index.json").write_text(text)
        assert "model.safetensors.index.json" in refusal(folder)


def test_pickles_are_never_read(tmp_path: Path) -> None:
    shutil.copyfile(nano.folder() / "config.json", tmp_path / "config.json")
    assert "cannot be loaded: it has no weights as safetensors" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"c__builtin__\neval\n(S'1/0'\ntR.")
    assert "pickled weights (pytorch_model.bin), but only safetensors are read" in refusal(tmp_path)


def test_tensors_that_are_missing_or_too_many_are_refused(tmp_path: Path) -> None:
    folder, norm = copied(nano.folder(), tmp_path), "model.language_model.layers.{}.input_layernorm.weight"
    with_weights(folder, {norm.format(1): None, norm.format(3): None})
    assert f"lacks 2 of the model's tensors, first {norm.format(1)}" in refusal(folder)
    with_weights(folder, {norm.format(n): torch.ones(128) for n in (1, 3, 4)})
    assert f"has 1 tensors that the model does not know, first {norm.format(4)}" in refusal(folder)


def test_an_untied_head_must_be_there(moe: tuple[Path, Any], tmp_path: Path) -> None:
    folder = copied(moe[0], tmp_path)
    with_weights(folder, {"lm_head.weight": None})
    assert "lacks 1 of the model's tensors, first lm_head.weight" in refusal(folder)


def test_tensors_of_another_shape_are_refused(moe: tuple[Path, Any], tmp_path: Path) -> None:
    folder, name = copied(moe[0], tmp_path), "model.language_model.norm.weight"
    with_weights(folder, {name: torch.ones(7)})
    assert f"has 1 tensors of other shapes than the model's, first {name} ([7], not [32])" in refusal(folder)
    with_weights(folder, {name: torch.ones(32), EXPERTS: torch.ones(3, 5, 7)})
    assert f"first {EXPERTS} ([3, 7, 5], not [4, 32, 24])" in refusal(folder)
    with_weights(folder, {EXPERTS: torch.ones(3)})
    assert "cannot be loaded" in refusal(folder)


def test_stored_tensors_say_dtype_and_shape(moe: tuple[Path, Any]) -> None:
    tensors = stored_tensors("moe", moe[0])
    assert tensors["lm_head.weight"] == StoredTensor("F32", (128, 32))
    assert tensors["lm_head.weight"].elements == 128 * 32


@pytest.mark.gpu
def test_weights_go_straight_to_the_gpu(stock: Any) -> None:
    model = load(nano.NAME, device="cuda", dtype=BF16)
    assert {(p.device, p.dtype) for p in model.parameters()} == {(torch.device("cuda", 0), BF16)}
    assert same(model.float().cpu(), stock.bfloat16().float())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_auto_spreads_the_layers_over_the_gpus(parts: Path, stock: Any) -> None:
    model = load(str(parts), device="auto")
    devices = {p.device for p in model.parameters()}
    assert len(devices) > 1
    tokens = torch.arange(20).reshape(1, 20)
    torch.testing.assert_close(model(tokens.to(model.device)).logits.cpu(), stock(tokens).logits)
