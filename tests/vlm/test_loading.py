"""Loading checkpoints in hub layout, dense and mixture-of-experts, whole and broken; and where their weights go: sizes,
free memory, devices and the map of layers, for which no GPU is needed."""

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
from tests.vlm.checkpoints import copied, experts, random_model, sharded, with_config, with_weights
from vlm import nano
from vlm.local.model import placement
from vlm.local.model.families import HEAD, QWEN3_VL, family_of
from vlm.local.model.load import Model, load
from vlm.local.model.lora import LoraSpec
from vlm.local.model.placement import StoredTensor, stored_tensors
from vlm.models import source

EMBEDDINGS = "model.language_model.embed_tokens.weight"
EXPERTS = "model.language_model.layers.0.mlp.experts.down_proj"
GPUS = [torch.device("cuda", n) for n in range(3)]
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


def test_the_dtype_asked_for_is_that_of_every_weight(parts: Path) -> None:
    assert {p.dtype for p in load(str(parts), dtype=BF16).parameters()} == {BF16}


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
    # Clients that other tests left behind may say that their servers are gone.
    own = [each for each in caplog.records if not each.name.startswith("tinker.")]
    assert not [record for record in own if record.levelno >= logging.WARNING]
    assert (theirs.get_verbosity(), theirs.is_progress_bar_enabled()) == before


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", ["JSONDecodeError"]),
        ("[]", ["cannot be loaded"]),
        ({"model_type": "bert"}, ["'bert'", "no decoder"]),
        ({"model_type": None, "auto_map": {"AutoConfig": "code.Config"}}, ["type None", "its own code"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantised", "the model it was made from"]),
        ({"text_config": {"hidden_size": "large"}}, ["cannot be loaded", "hidden_size"]),
    ],
)
def test_other_models_are_refused(tmp_path: Path, config: dict[str, Any] | str, words: list[str]) -> None:
    folder = copied(nano.folder(), tmp_path)
    if isinstance(config, str):
        (folder / "config.json").write_text(config)
    else:
        with_config(folder, **config)
    (folder / "code.py").write_text("raise SystemExit('a script was run')")
    message = refusal(folder)
    assert all(word in message for word in [str(folder), *words]), message


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


NORM, LAYER = "model.language_model.norm.weight", "model.language_model.layers.{}.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"lm_head.weight": None}, "lacks 1 of the model's tensors, first lm_head.weight"),  # which is not tied
        ({LAYER.format(0): None, LAYER.format(1): None}, f"lacks 2 of the model's tensors, first {LAYER.format(0)}"),
        ({LAYER.format(2): torch.ones(32)}, f"has 1 tensors that the model does not know, first {LAYER.format(2)}"),
        ({NORM: torch.ones(7)}, f"has 1 tensors of other shapes than the model's, first {NORM} ([7], not [32])"),
        ({EXPERTS: torch.ones(3, 5, 7)}, f"first {EXPERTS} ([3, 7, 5], not [4, 32, 24])"),
        ({EXPERTS: torch.ones(3)}, "cannot be loaded"),
    ],
)
def test_tensors_that_are_not_the_models_are_refused(
    moe: tuple[Path, Any], tmp_path: Path, change: dict[str, torch.Tensor | None], problem: str
) -> None:
    folder = copied(moe[0], tmp_path)
    with_weights(folder, change)
    assert problem in refusal(folder)


def test_stored_tensors_say_dtype_and_shape(moe: tuple[Path, Any]) -> None:
    tensors = stored_tensors("moe", moe[0])
    assert tensors["lm_head.weight"] == StoredTensor("F32", (128, 32), "model.safetensors")
    assert tensors["lm_head.weight"].elements == 128 * 32


def test_sizes_are_those_in_the_dtype_and_count_a_tied_head_once(parts: Path, stock: Any) -> None:
    tensors = stored_tensors("nano", parts)
    here = sum(p.numel() for p in stock.parameters())
    assert sum(placement.sizes(tensors, 4, True, F32, QWEN3_VL)) == 4 * here
    both = {**tensors, "lm_head.weight": tensors[EMBEDDINGS]}
    assert sum(placement.sizes(both, 4, True, BF16, QWEN3_VL)) == 2 * here
    untied = placement.sizes(both, 4, False, BF16, QWEN3_VL)
    assert sum(untied) == 2 * (here + 4096 * 128)
    assert untied[-1] == 2 * (4096 * 128 + 128)
    layer = sum(p.numel() for p in stock.model.language_model.layers[0].parameters())
    assert untied[1:-1] == [2 * layer] * 4


def test_too_little_memory_is_said_before_any_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "free_bytes", lambda device: 12_000_000)
    message = refusal(nano.NAME)
    assert message.startswith(f"model {nano.NAME} needs 0.0 GB for its weights in float32, but free are 0.0 GB on cpu;")
    assert message.endswith("use a smaller model, or bfloat16")
    load(nano.NAME, dtype=BF16)  # half of it fits


def test_too_little_memory_on_one_gpu_points_at_the_others() -> None:
    size = [2 * 10**9, *[10**9] * 10, 2 * 10**9]
    with pytest.raises(ModelError) as caught:
        placement.device_map("m", BF16, size, False, GPUS[:1], [13 * 10**9], QWEN3_VL)
    message = "needs 14.0 GB for its weights in bfloat16, but free are 13.0 GB on cuda:0"
    assert message in str(caught.value)
    assert str(caught.value).endswith("use a smaller model, or `auto` to spread it over several GPUs")
    assert placement.device_map("m", BF16, size, False, GPUS[:1], [14 * 10**9], QWEN3_VL) == {"": GPUS[0]}
    with pytest.raises(ModelError, match=r"5\.0 GB on cuda:0, 4\.0 GB on cuda:1, 4\.9 GB on cuda:2; use a smaller"):
        placement.device_map("m", F32, size, False, GPUS, [5 * 10**9, 4 * 10**9, 49 * 10**8], QWEN3_VL)


def layers_of(places: dict[str, Any]) -> list[int]:
    return [device for name, device in places.items() if name.startswith(QWEN3_VL.layers)]


@pytest.mark.parametrize(
    ("size", "tied", "free", "layers"),
    [
        ([3, *[1] * 10, 2], False, [100, 100, 100], [0, 0, 1, 1, 1, 1, 1, 2, 2, 2]),  # evenly
        ([2, *[1] * 10, 0], True, [40, 10, 70], [0, 0, 1, 2, 2, 2, 2, 2, 2, 2]),  # less on a GPU in use
    ],
)
def test_layers_go_over_the_gpus_in_order(size: list[int], tied: bool, free: list[int], layers: list[int]) -> None:
    """A tied head stays with the embeddings."""
    places = placement.device_map("m", BF16, size, tied, GPUS, free, QWEN3_VL)
    assert layers_of(places) == layers
    assert {places[name] for name in QWEN3_VL.first} == {0}
    assert (places[QWEN3_VL.norm], places[HEAD]) == (2, 0 if tied else 2)


def test_every_free_byte_may_be_used_but_no_more() -> None:
    size = [4, 3, 3, 3, 3]
    assert layers_of(placement.device_map("m", BF16, size, False, GPUS, [7, 6, 3], QWEN3_VL)) == [0, 1, 1]
    with pytest.raises(ModelError):
        placement.device_map("m", BF16, size, False, GPUS, [6, 6, 3], QWEN3_VL)


def test_an_adapter_in_training_counts_where_layers_go(caplog: pytest.LogCaptureFixture) -> None:
    size, training = [4, 3, 3, 3, 3], [0, 3, 3, 3, 1]
    places = placement.device_map("m", BF16, size, False, GPUS, [12, 12, 8], QWEN3_VL, training)
    assert layers_of(places) == [0, 1, 1]  # by weights alone all would be evenly on them
    assert layers_of(placement.device_map("m", BF16, size, False, GPUS, [12, 12, 8], QWEN3_VL)) == [0, 1, 1]
    assert caplog.messages == []
    assert layers_of(placement.device_map("m", BF16, size, False, GPUS, [7, 6, 3], QWEN3_VL, training)) == [0, 1, 1]
    assert "an adapter in training and its largest pass (4096 positions) may not fit" in caplog.messages[0]
    with pytest.raises(ModelError):
        placement.device_map("m", BF16, size, False, GPUS, [6, 6, 3], QWEN3_VL, training)


def test_what_training_takes_is_the_adapter_and_the_pass(tmp_path: Path) -> None:
    """Against the layout of an adapter on the loaded model, dense and with experts."""
    for path in (Path(source(nano.NAME)), random_model(tmp_path, "sparse", tied=True)):
        model = Model(str(path), dtype=BF16)
        config = model.stock.config
        tensors = placement.stored_tensors("m", path)
        made = placement.training_sizes(tensors, config, BF16, family_of(model.stock), 8)
        exact = placement.reserve(model.stock, model.layout(LoraSpec(8)).run_bytes(BF16), BF16)
        assert exact <= sum(made) <= 1.02 * exact  # routers have none, and are counted


def test_the_map_covers_every_weight_of_both_kinds(stock: Any, moe: tuple[Path, Any]) -> None:
    for model in (stock, moe[1]):
        layers = model.config.text_config.num_hidden_layers
        places = placement.device_map("m", BF16, [1] * (layers + 2), False, GPUS, [9, 9, 9], QWEN3_VL)
        names = [n for n, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())]
        assert all(any(name.startswith(f"{module}.") for module in places) for name in names)


@pytest.mark.parametrize(
    ("device", "count", "expected"),
    [
        ("cpu", 2, ["cpu"]),
        ("cuda", 2, ["cuda:0"]),
        ("cuda:1", 2, ["cuda:1"]),
        ("auto", 0, ["cpu"]),
        ("auto", 1, ["cuda:0"]),
        ("auto", 2, ["cuda:0", "cuda:1"]),
    ],
)
def test_devices_by_name(device: str, count: int, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert [str(place) for place in placement.devices(device)] == expected


@pytest.mark.parametrize(
    ("device", "why"),
    [
        ("gpu", "unknown device 'gpu'"),
        ("cuda:2", "torch sees 2 CUDA devices"),
        ("mps", "no MPS device"),
        ("meta", "not supported"),
    ],
)
def test_devices_that_are_not_here_are_refused(device: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    message = refusal(nano.NAME, device=device)
    assert why in message
    assert "choose cpu, cuda" in message


def write_group(folder: Path, limit: str, used: int, cached: int, version: int) -> None:
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in zip((names[0], names[1], "memory.stat"), (limit, used, f"{names[2]} {cached}"), strict=True):
        (folder / name).write_text(f"{content}\n")


@pytest.mark.parametrize("version", [1, 2])
def test_the_limits_of_control_groups_count(tmp_path: Path, version: int) -> None:
    own, root = tmp_path / "own", tmp_path / "cgroup"
    top = root / "memory" if version == 1 else root
    own.write_text("4:memory:/a/b\n0::/\n" if version == 1 else "0::/a/b\n")
    assert placement.group_free_bytes(root, own) == float("inf")
    write_group(top / "a/b", "max" if version == 2 else str(2**63 - 4096), 10, 5, version)
    assert placement.group_free_bytes(root, own) > 2**62
    write_group(top / "a", "1000", 700, 500, version)
    assert placement.group_free_bytes(root, own) == 800
    write_group(top / "a/b", "100", 300, 0, version)
    assert placement.group_free_bytes(root, own) == 0
    own.unlink()
    assert placement.group_free_bytes(root, own) == float("inf")


def test_free_memory_of_this_machine_is_a_number() -> None:
    assert placement.free_bytes(torch.device("cpu")) > 0


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
