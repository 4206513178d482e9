"""FP8 and INT4 checkpoints, tiny: what is loaded is what was dequantised here, by other means."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kshot.errors import ModelError
from tests.vlm.checkpoints import copied, experts, text_model, with_config, with_weights
from vlm.inputs import datum, model_input
from vlm.local.exchange.export import export
from vlm.local.model import placement, quantised
from vlm.local.model.families import family_of
from vlm.local.model.load import Model, check, load
from vlm.local.model.quantised import Weights
from vlm.local.registry import LocalServiceClient

BLOCK, GROUP = (32, 16), 8  # neither 48 nor 24 rows are whole blocks
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [*BLOCK]}
INT4: dict[str, Any] = {  # as Kimi-K2-Thinking has it, but for the size of its groups
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "ignore": ["lm_head", "re:.*self_attn.*"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {
                **{"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP},
                **{"actorder": None, "block_structure": None, "dynamic": False, "observer": "minmax"},
                "observer_kwargs": {},
            },
        }
    },
}
Stored, Plain = dict[str, Tensor], Tensor


def blocks(weight: Tensor) -> list[tuple[int, int, tuple[slice, slice]]]:
    (rows, columns), (r, c) = weight.shape, BLOCK
    places = [(i, j) for i in range(-(-rows // r)) for j in range(-(-columns // c))]
    return [(i, j, (slice(i * r, i * r + r), slice(j * c, j * c + c))) for i, j in places]


def to_fp8(name: str, weight: Tensor, scales: torch.dtype = torch.float32) -> tuple[Stored, Plain]:
    """A matrix, or one after the other of experts: as it is stored, and what that means."""
    if weight.ndim == 3:
        parts = [to_fp8(name, each, scales) for each in weight]
        return {key: torch.stack([stored[key] for stored, _ in parts]) for key in parts[0][0]}, torch.stack(
            [plain for _, plain in parts]
        )
    (r, c), plain = BLOCK, torch.empty(weight.shape)
    scale = torch.empty(-(-weight.shape[0] // r), -(-weight.shape[1] // c), dtype=scales)
    numbers = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i, j, where in blocks(weight):
        scale[i, j] = weight[where].abs().max() / 448  # the largest number of the format
        numbers[where] = (weight[where] / scale[i, j].float()).clamp(-448, 448).to(numbers.dtype)
        plain[where] = numbers[where].float() * scale[i, j].float()
    return {name: numbers, f"{name}_scale_inv": scale}, plain


def to_int4(name: str, weight: Tensor) -> tuple[Stored, Plain]:
    """Eight numbers a word, the first in its lowest bits, each 8 more than it is."""
    rows, columns = weight.shape
    groups = weight.reshape(rows, -1, GROUP).numpy()
    scale = torch.from_numpy(np.abs(groups).max(2) / 7).bfloat16()
    exact = scale.float().numpy()[..., None]
    numbers = np.clip(np.rint(groups / exact), -8, 7)
    nibbles = (numbers + 8).astype(np.uint32).reshape(rows, -1, 8)
    words = sum(nibbles[..., n] << np.uint32(4 * n) for n in range(8)).astype(np.uint32).view(np.int32)
    stored = {"packed": torch.from_numpy(words), "scale": scale, "shape": torch.tensor([rows, columns])}
    return {f"{name}_{key}": tensor for key, tensor in stored.items()}, torch.from_numpy(
        (numbers * exact).astype(np.float32).reshape(rows, columns)
    )


def quantised_copy(
    folder: Path, to: Path, make: Callable[[str, Tensor], tuple[Stored, Plain]], config: dict[str, Any], names: str
) -> tuple[Path, Path]:
    """The checkpoint with the weights of these names quantised, and with what these become."""
    weights = load_file(folder / "model.safetensors")
    chosen = [name for name in weights if names in name and weights[name].ndim > 1]
    assert chosen
    parts = {name: make(name, weights[name]) for name in chosen}
    packed, plain = copied(folder, to / "quantised"), copied(folder, to / "plain")
    new = {key: tensor for stored, _ in parts.values() for key, tensor in stored.items()}
    with_weights(packed, {**dict.fromkeys(chosen), **new})
    with_config(packed, quantization_config=config)
    with_weights(plain, {name: tensor for name, (_, tensor) in parts.items()})
    return packed, plain


KINDS: dict[str, tuple[str, Callable[[str, Tensor], tuple[Stored, Plain]], dict[str, Any], str]] = {
    "llama-fp8": ("llama", to_fp8, FP8, "_proj.weight"),
    "moe-fp8": ("qwen3_moe", lambda name, weight: to_fp8(name, weight, torch.bfloat16), FP8, "_proj.weight"),
    "llama-int4": ("llama", to_int4, INT4, "mlp"),
    "deepseek-fp8": ("deepseek_v3", to_fp8, FP8, "_proj"),
    "deepseek-int4": ("deepseek_v3", to_int4, INT4, "mlp.experts."),
    "moe-int4": ("qwen3_moe", to_int4, INT4, "_proj.weight"),
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The original, the quantised one, and what was dequantised here."""
    kind, make, config, names = KINDS[request.param]
    if config is INT4:
        pytest.importorskip("compressed_tensors")
    original = text_model(tmp_path_factory.mktemp(request.param), kind)
    return original, *quantised_copy(original, tmp_path_factory.mktemp("copies"), make, config, names)


def test_it_is_what_was_dequantised_here(pair: tuple[Path, Path, Path]) -> None:
    original, packed, plain = pair
    model, expected, before = (load(str(folder)) for folder in (packed, plain, original))
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    theirs, first, changed = expected.state_dict(), before.state_dict(), list[str]()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
        off, size = (tensor - first[name]).abs(), first[name].abs().max()
        changed += [name] if off.max() else []
        assert off.max() <= size / 13  # half of a step: of 15 for INT4, of 16 for FP8, and of what scales round
    assert len(changed) >= 2


def test_log_probs_are_those_of_the_plain_model(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    original, packed, plain = pair
    service = LocalServiceClient(tmp_path)
    text = model_input(np.random.default_rng(0).integers(1, 4000, 40).tolist())
    found, expected, before = (
        np.array(service.create_sampling_client(base_model=str(f)).result().compute_logprobs(text).result()[1:])
        for f in (packed, plain, original)
    )
    assert found == pytest.approx(expected, abs=1e-6)
    assert np.abs(found - before).max() > 1e-3
    service.close()


def test_in_bfloat16_it_is_rounded_once(pair: tuple[Path, Path, Path]) -> None:
    _, packed, plain = pair
    theirs = load(str(plain)).state_dict()
    model = load(str(packed), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16  # a bias of a router may stay float32
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, theirs[name].to(tensor.dtype)), name


def test_its_memory_is_that_of_the_plain_model(pair: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, packed, plain = pair
    family = family_of(load(str(plain)))
    for dtype in (torch.bfloat16, torch.float32):
        sizes = [placement.sizes(Weights(str(each), each).tensors, 2, False, dtype, family) for each in (packed, plain)]
        assert sizes[0] == sizes[1]
    monkeypatch.setattr(placement, "free_bytes", lambda device: sum(sizes[1]) - 1)
    with pytest.raises(ModelError, match="for its weights in float32, but free are"):
        load(str(packed))


def test_no_tensor_is_read_twice_and_none_to_check(
    pair: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, names = Weights.read, list[str]()
    monkeypatch.setattr(Weights, "read", lambda self, name, dtype: names.append(name) or read(self, name, dtype))
    check(str(pair[1]))
    assert names == []
    load(str(pair[1]))
    assert len(names) == len({*names}) == len(load_file(pair[2] / "model.safetensors"))


def test_it_trains_and_is_merged(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """The merged model is plain: `export` proves it in stock transformers."""
    service = LocalServiceClient(tmp_path / "state")
    client = service.create_lora_training_client(str(pair[1]), rank=2, seed=0).result()
    data = [datum(model_input([5, 6, 7, 8]), [9, 10])]
    from tests.vlm.services import step
    from tests.vlm.test_text_models import ADAM

    losses = [step(client, data, ADAM) for _ in range(4)]
    assert losses[-1] < losses[0]
    path = client.save_state("x").result().path
    from kshot.checks import folder_of

    proof = export(folder_of(tmp_path / "state", path), tmp_path / "merged", "merged")
    assert proof.prompts == 3
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    service.close()


def test_experts_that_are_stored_together(tmp_path: Path) -> None:
    experts(tmp_path / "model")
    packed, plain = quantised_copy(tmp_path / "model", tmp_path, to_fp8, FP8, "mlp.experts.")
    assert any(len(tensor.shape) == 3 for tensor in Weights("m", packed).tensors.values())
    theirs = load(str(plain)).state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in load(str(packed)).state_dict().items())


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    original = text_model(tmp_path_factory.mktemp("llama"), "llama")
    return quantised_copy(original, tmp_path_factory.mktemp("copies"), to_fp8, FP8, "_proj.weight")[0]


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("compressed_tensors")
    original = text_model(tmp_path_factory.mktemp("llama"), "llama")
    return quantised_copy(original, tmp_path_factory.mktemp("copies"), to_int4, INT4, "mlp")[0]


def refusal(folder: Path, loads: Callable[[str], object] = check) -> str:
    with pytest.raises(ModelError, match=str(folder)) as caught:
        loads(str(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({f"{UP}_scale_inv": None}, f"lacks 1 tensors of its quantised weights, first {UP}_scale_inv; download"),
        ({f"{UP}_scale_inv": torch.ones(2, 2)}, f"has {UP} of [64, 48] and scales [2, 2] as F32, which do not go"),
        ({f"{UP}_scale_inv": torch.ones(2, 3).byte()}, "and scales [2, 3] as U8, which do not go together"),
        ({UP: torch.ones(64, 48).to(torch.float8_e5m2)}, f"has {UP} as F8_E5M2, not read here"),
        ({UP: torch.ones(64, 40).to(torch.float8_e4m3fn)}, "tensors of other shapes than the model's, first"),
        ({"model.norm.weight": torch.ones(48).to(torch.float8_e4m3fn)}, "lacks 1 tensors of its quantised weights"),
    ],
)
def test_a_broken_fp8_checkpoint(fp8: Path, tmp_path: Path, change: dict[str, Tensor | None], words: str) -> None:
    folder = copied(fp8, tmp_path)
    with_weights(folder, change)
    assert words in refusal(folder)
    assert words in refusal(folder, load)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({f"{UP}_scale": None}, f"lacks 1 tensors of its quantised weights, first {UP}_scale; download"),
        ({f"{UP}_shape": None}, f"lacks 1 tensors of its quantised weights, first {UP}_shape; download"),
        ({f"{UP}_scale": torch.ones(64, 5)}, f"has {UP} of [64, 6] and scales [64, 5] as F32, which do not go"),
        ({f"{UP}_shape": torch.tensor([1 << 40, 48])}, f"has {UP} of [64, 6] and scales [64, 6] as BF16, which do not"),
        ({f"{UP}_shape": torch.tensor([64, 47])}, f"has {UP} of [64, 6] and scales [64, 6] as BF16, which do not"),
        ({f"{UP}_shape": torch.tensor([64])}, f"has {UP} of [64, 6] and scales [64, 6] as BF16, which do not go"),
    ],
)
def test_a_broken_int4_checkpoint(int4: Path, tmp_path: Path, change: dict[str, Tensor | None], words: str) -> None:
    folder = copied(int4, tmp_path)
    with_weights(folder, change)
    assert words in refusal(folder)
    assert words in refusal(folder, load)


def of_weights(**change: object) -> dict[str, Any]:
    group = INT4["config_groups"]["group_0"]
    return {**INT4, "config_groups": {"group_0": {**group, "weights": {**group["weights"], **change}}}}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "is quantised by 'gptq', which is not read here"),
        ({"quant_method": "mxfp4"}, "is quantised by 'mxfp4', which is not read here (FP8 in blocks and"),
        ({"bits": 4}, "is quantised by None"),
        ("awq", "is quantised by 'awq'"),
        ({"quant_method": "fp8"}, "is quantised to FP8 without blocks (weight_block_size), not read here"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "is broken"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "is broken"),
        ({**INT4, "format": "float-quantized"}, "has weights of format 'float-quantized', not read here"),
        (of_weights(num_bits=8), "has weights of num_bits 8, not read here (INT4 in symmetric groups, packed, is)"),
        (of_weights(symmetric=False), "has weights of symmetric False"),
        (of_weights(strategy="channel"), "has weights of strategy 'channel'"),
        (of_weights(actorder="group"), "has weights of actorder 'group'"),
        (of_weights(group_size=None), "is broken"),
        ({**INT4, "config_groups": {}}, "is broken"),
        ({**INT4, "config_groups": INT4["config_groups"] | {"more": {}}}, "has weights of config_groups 2"),
        ({**INT4, "transform_config": {"config_groups": {"u": {}}}}, "has weights of transform_config"),
    ],
)
def test_what_is_not_read(fp8: Path, tmp_path: Path, config: object, words: str) -> None:
    folder = copied(fp8, tmp_path)
    with_config(folder, quantization_config=config)
    message = refusal(folder)
    assert words in message
    assert "give the model it was made from" in message or "download its config.json again" in message


def test_a_missing_package_is_named(int4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    assert refusal(int4).endswith("that is not installed; pip install 'kshot[int4]'")


def test_a_model_says_the_type_that_its_configuration_says(fp8: Path, tmp_path: Path) -> None:
    folder = copied(fp8, tmp_path)
    with_config(folder, dtype="bfloat16")
    assert Model(str(folder)).dtype == torch.bfloat16
    with_config(folder, dtype=None)
    assert Weights("m", folder).tensors[UP].dtype == "BF16"
