"""LoRA adapters that PEFT, ms-swift and Unsloth write: the engine's logits are PEFT's, or it is refused by name."""

import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tinker
import torch
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from kshot.errors import ModelError
from tests.vlm.checkpoints import RandomModel
from tests.vlm.helpers import logits_of, stock_logits
from vlm import nano
from vlm.inputs import ImageRule
from vlm.local.registry import LocalServiceClient

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SWIFT = r"^(model\.language_model(?=\.).*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj))$"
UNSLOTH = (  # as its get_peft_regex joins words of towers, parts and layers
    r"(?:.*?(?:language|text|vision|visual).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    r".*?(?:q_proj|k_proj|v_proj|qkv|proj|linear_fc1|linear_fc2).*?)"
)
ADAPTERS: dict[str, dict[str, Any]] = {
    "list": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"},
    "all-linear": {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "lora_dropout": 0.1},
    "ms-swift": {"r": 8, "lora_alpha": 32, "target_modules": SWIFT, "use_rslora": True},
    "unsloth": {"r": 4, "lora_alpha": 4, "target_modules": UNSLOTH, "init_lora_weights": "gaussian"},
    "head": {"r": 4, "lora_alpha": 8, "target_modules": ["lm_head", "down_proj"], "layers_to_transform": None},
    "patterns": {
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj", "qkv"], "use_rslora": True},
        "rank_pattern": {"q_proj": 6, r".*layers\.1\.mlp\.up_proj": 2},
        "alpha_pattern": {"layers.2.self_attn.q_proj": 40, r"model\.visual\.blocks\.0\.attn\.qkv": 3},
    },
}
EXPERTS = "mlp.experts."
ON_EXPERTS: dict[str, dict[str, Any]] = {
    "both": {
        "target_parameters": [f"{EXPERTS}down_proj", f"{EXPERTS}gate_up_proj"],
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"experts.gate_up_proj": 20},
    },
    "gate_up_proj": {"target_parameters": [f"{EXPERTS}gate_up_proj"]},
    "down_proj": {"target_parameters": [f"{EXPERTS}down_proj"]},
}


def peft_adapter(base: Path, folder: Path, config: PeftConfig) -> Any:
    """Save a random adapter of PEFT's; the model with it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForImageTextToText.from_pretrained(base), config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServiceClient]:
    client = LocalServiceClient(tmp_path_factory.mktemp("no state"), cache_bytes=1 << 20)
    yield client
    client.close()


Compare = Callable[[Any, Path], None]


@pytest.fixture
def equal(other: LocalServiceClient, prompts: list[tinker.ModelInput], rule: ImageRule) -> Compare:
    """The engine's logits with a folder are those of a model of PEFT's, with images and without."""

    def check(model: Any, folder: Path) -> None:
        client = other.create_sampling_client_from_folder(folder).result()
        for asked in prompts:
            expected = stock_logits(model, asked, rule)
            assert (logits_of(client, asked) - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max()))

    return check


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_peft_saves_gives_pefts_logits(name: str, tmp_path: Path, equal: Compare) -> None:
    equal(peft_adapter(nano.folder(), tmp_path, LoraConfig(**ADAPTERS[name])), tmp_path)


@pytest.mark.parametrize("name", ON_EXPERTS)
def test_experts(name: str, tmp_path: Path, equal: Compare, random_model: RandomModel) -> None:
    base = random_model("sparse", tied=False)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], **ON_EXPERTS[name])
    equal(peft_adapter(base, tmp_path, config), tmp_path)


RENAMED = {
    "without PEFT's prefix": (r"^base_model\.model\.", ""),
    "with the adapter's name": (r"\.lora_([AB])\.", r".lora_\1.default."),
    "of the text model alone": (r"^base_model\.model\.model\.language_model\.", "base_model.model.model."),
    "of an older class": (r"^base_model\.model\.model\.language_model\.", "base_model.model.language_model.model."),
}


@pytest.mark.parametrize("way", RENAMED)
def test_other_names_of_the_same_layers(way: str, tmp_path: Path, equal: Compare) -> None:
    model = peft_adapter(nano.folder(), tmp_path, LoraConfig(**ADAPTERS["ms-swift"]))
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({re.sub(*RENAMED[way], name): tensor for name, tensor in tensors.items()}, tmp_path / WEIGHTS)
    equal(model, tmp_path)


def change(folder: Path, **settings: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_the_base_model_under_another_name(
    tmp_path: Path, other: LocalServiceClient, random_model: RandomModel
) -> None:
    peft_adapter(nano.folder(), tmp_path, LoraConfig(**ADAPTERS["list"]))
    for name, message in (
        ("/root/cache/Qwen3-VL", "is not here"),
        ("", "does not say of which model"),
        (None, "not say"),
    ):
        change(tmp_path, base_model_name_or_path=name)
        with pytest.raises(ModelError, match=rf"{message}.*say with base_model \(--model\) where it is"):
            other.create_sampling_client_from_folder(tmp_path).result()
    assert other.create_sampling_client_from_folder(tmp_path, nano.NAME).result().get_base_model() == nano.NAME
    change(tmp_path, base_model_name_or_path=str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl", "quantization_config": {"bits": 4}}')
    with pytest.raises(ModelError, match=r"is quantised.*say with base_model"):
        other.create_sampling_client_from_folder(tmp_path).result()


def test_a_head_that_was_trained_or_resized_is_named(tmp_path: Path, other: LocalServiceClient) -> None:
    peft_adapter(nano.folder(), tmp_path, LoraConfig(**ADAPTERS["head"]))
    tensors = load_file(tmp_path / WEIGHTS)
    (name,) = (name for name in tensors if name.endswith("lm_head.base_layer.weight"))  # PEFT saves it beside
    for changed in (tensors[name] + 1, tensors[name][:-1]):
        save_file(tensors | {name: changed}, tmp_path / WEIGHTS)
        with pytest.raises(ModelError, match=r"it brings another lm_head\.weight than the model's; merge it"):
            other.create_sampling_client_from_folder(tmp_path).result()


LISTED = {"r": 2, "target_modules": ["q_proj"]}
REFUSED: list[tuple[PeftConfig, str]] = [
    (LoraConfig(use_dora=True, **LISTED), "has DoRA"),
    (LoraConfig(modules_to_save=["lm_head"], **LISTED), r"has whole layers \(modules_to_save: \['lm_head'\]\)"),
    (LoraConfig(bias="lora_only", **LISTED), "has bias = 'lora_only'"),
    (LoraConfig(lora_bias=True, **LISTED), "has a bias of LoRA"),
    (LoraConfig(init_lora_weights="pissa", **LISTED), "changes its model's own weights .*'pissa'"),
    (LoraConfig(r=2, target_modules=["embed_tokens"]), r"has LoRA on embeddings \(.*embed_tokens"),
    (LoraConfig(trainable_token_indices=[1], **LISTED), "has single embeddings"),
    (LoKrConfig(**LISTED), "is of the kind LOKR"),
    (LoHaConfig(**LISTED), "is of the kind LOHA"),
    (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "is of the kind IA3"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=lambda value: getattr(value, "peft_type", value))
def test_what_is_not_lora_alone_is_named(
    config: PeftConfig, message: str, tmp_path: Path, other: LocalServiceClient
) -> None:
    peft_adapter(nano.folder(), tmp_path, config)
    with pytest.raises(ModelError, match=rf"{message}.*; merge it into its model with what made it") as raised:
        other.create_sampling_client_from_folder(tmp_path, nano.NAME).result()
    assert "\n" not in str(raised.value)


def of_names(*names: str) -> Callable[[Path], None]:
    return lambda folder: save_file({name: torch.zeros(2, 2) for name in names}, folder / WEIGHTS)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


LAYER = "base_model.model.model.language_model.layers.0."
DAMAGED: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: change(folder, new_thing={"a": 1}), r"has new_thing = \{'a': 1\}, not LoRA alone"),
    (lambda folder: change(folder, r=0), "is damaged .*0 is no rank from 1 to 1024"),
    (lambda folder: change(folder, r="2"), "is damaged .*'2' is no rank"),
    (lambda folder: change(folder, lora_alpha=None), "is damaged .*None is no alpha"),
    (lambda folder: change(folder, rank_pattern=[1]), "is damaged"),
    (lambda folder: change(folder, rank_pattern={"q_proj": 3}), "is damaged: .*the rank is 3"),
    (lambda folder: change(folder, rank_pattern={"(": 3}), "is damaged"),
    (lambda folder: (folder / CONFIG).write_text("[" * 100_000), "is damaged"),
    (lambda folder: (folder / CONFIG).write_bytes(b" " * (1 << 21)), "is damaged .*more than"),
    (lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 9), "is damaged"),
    (lambda folder: (folder / WEIGHTS).unlink(), "has no adapter_model.safetensors; load it with PEFT"),
    (pickled, r"has pickled weights \(adapter_model.bin\), but only safetensors are read"),
    (lambda folder: save_file({}, folder / WEIGHTS), "covers no layer"),
    (of_names(f"{LAYER}self_attn.q_proj.lora_A.weight"), "one of A and B alone"),
    (of_names(f"{LAYER}mlp.gate.lora_A.weight"), "covers .*mlp.gate, a layer on which kshot computes no LoRA"),
    (of_names(f"{LAYER}mlp.experts.3.up_proj.lora_A.weight"), "covers .*experts.3.up_proj, a layer on which"),
    (of_names("base_model.model.model.visual.patch_embed.proj.lora_A.weight"), "covers .*patch_embed.proj"),
    (of_names(f"{LAYER}self_attn.q_proj.weight"), r"has whole layers \(modules_to_save\)"),
    (of_names(*(f"{LAYER}self_attn.q_proj.lora_{side}.weight" for side in "AB")), "of another size"),
    (of_names(*(f"{LAYER.replace('.0.', '.9.')}self_attn.q_proj.lora_{side}.weight" for side in "AB")), "has no layer"),
]


@pytest.mark.parametrize(("spoil", "message"), DAMAGED, ids=[message for _, message in DAMAGED])
def test_what_is_damaged_is_named(
    spoil: Callable[[Path], object], message: str, tmp_path: Path, other: LocalServiceClient
) -> None:
    peft_adapter(nano.folder(), tmp_path, LoraConfig(**LISTED))
    spoil(tmp_path)
    with pytest.raises(ModelError, match=message) as raised:
        other.create_sampling_client_from_folder(tmp_path, nano.NAME).result()
    assert "\n" not in str(raised.value)
