"""Where a model goes: sizes, free memory, devices and the map of layers; no GPU is needed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kshot.errors import ModelError
from tests.vlm.checkpoints import experts, sharded
from vlm import nano
from vlm.local.model import placement
from vlm.local.model.load import load
from vlm.local.model.placement import Sizes, stored_tensors

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


def refusal(name: object, **options: Any) -> str:
    """The one line that `load` refuses with."""
    with pytest.raises(ModelError) as caught:
        load(str(name), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_sizes_are_those_in_the_dtype_and_count_a_tied_head_once(parts: Path, stock: Any) -> None:
    tensors = stored_tensors("nano", parts)
    here = sum(p.numel() for p in stock.parameters())
    assert placement.sizes(tensors, 4, True, F32).total == 4 * here
    both = {**tensors, "lm_head.weight": tensors[EMBEDDINGS]}
    assert placement.sizes(both, 4, True, BF16).total == 2 * here
    untied = placement.sizes(both, 4, False, BF16)
    assert untied.total == 2 * (here + 4096 * 128)
    assert untied.last == 2 * (4096 * 128 + 128)
    layer = sum(p.numel() for p in stock.model.language_model.layers[0].parameters())
    assert untied.layers == (2 * layer,) * 4


def test_too_little_memory_is_said_before_any_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "free_bytes", lambda device: 12_000_000)
    message = refusal(nano.NAME)
    assert message.startswith(f"model {nano.NAME} needs 0.0 GB for its weights in float32, but free are 0.0 GB on cpu;")
    assert message.endswith("use a smaller model, or bfloat16")
    load(nano.NAME, dtype=BF16)  # half of it fits


def test_too_little_memory_on_one_gpu_points_at_the_others() -> None:
    size = Sizes(2 * 10**9, (10**9,) * 10, 2 * 10**9)
    with pytest.raises(ModelError) as caught:
        placement.device_map("m", BF16, size, False, GPUS[:1], [13 * 10**9])
    message = "needs 14.0 GB for its weights in bfloat16, but free are 13.0 GB on cuda:0"
    assert message in str(caught.value)
    assert str(caught.value).endswith("use a smaller model, or `auto` to spread it over several GPUs")
    assert placement.device_map("m", BF16, size, False, GPUS[:1], [14 * 10**9]) == {"": GPUS[0]}
    with pytest.raises(ModelError, match=r"5\.0 GB on cuda:0, 4\.0 GB on cuda:1, 4\.9 GB on cuda:2; use a smaller"):
        placement.device_map("m", F32, size, False, GPUS, [5 * 10**9, 4 * 10**9, 49 * 10**8])


def layers_of(places: dict[str, Any]) -> list[int]:
    return [device for name, device in places.items() if name.startswith(placement.LAYERS)]


def test_layers_go_over_the_gpus_in_order_and_evenly() -> None:
    places = placement.device_map("m", BF16, Sizes(3, (1,) * 10, 2), False, GPUS, [100, 100, 100])
    assert layers_of(places) == [0, 0, 1, 1, 1, 1, 1, 2, 2, 2]
    assert {places[name] for name in placement.FIRST} == {0}
    assert places[placement.NORM] == places[placement.HEAD] == 2


def test_a_gpu_in_use_takes_fewer_layers_and_a_tied_head_stays_with_the_embeddings() -> None:
    places = placement.device_map("m", BF16, Sizes(2, (1,) * 10, 0), True, GPUS, [40, 10, 70])
    assert layers_of(places) == [0, 0, 1, 2, 2, 2, 2, 2, 2, 2]
    assert (places[placement.NORM], places[placement.HEAD]) == (2, 0)


def test_every_free_byte_may_be_used_but_no_more() -> None:
    size = Sizes(4, (3, 3, 3), 3)
    assert layers_of(placement.device_map("m", BF16, size, False, GPUS, [7, 6, 3])) == [0, 1, 1]
    with pytest.raises(ModelError):
        placement.device_map("m", BF16, size, False, GPUS, [6, 6, 3])


def test_the_map_covers_every_weight_of_both_kinds(stock: Any, moe: tuple[Path, Any]) -> None:
    for model in (stock, moe[1]):
        layers = model.config.text_config.num_hidden_layers
        places = placement.device_map("m", BF16, Sizes(1, (1,) * layers, 1), False, GPUS, [9, 9, 9])
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
    assert placement.free_bytes(CPU[0]) > 0
