"""An adapter for other programs: what is written has, in plain transformers and PEFT, the logits of the adapter as PEFT
itself computes it unmerged; and what PEFT's bare merge makes of a tied model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tinker
import torch
from peft import AutoPeftModel, LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from kshot.checks import folder_of
from kshot.errors import InputError, KshotError, ModelError
from tests.vlm.checkpoints import RandomModel
from tests.vlm.helpers import disturb, stock_logits
from vlm import nano
from vlm.inputs import ImageRule
from vlm.local.exchange import export as exporting
from vlm.local.exchange.export import export
from vlm.local.registry import LocalServiceClient

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT, of tied heads and of what it calls in transformers
BASES = [(kind, tied) for kind in ("dense", "sparse") for tied in (True, False)]
KINDS = pytest.mark.parametrize(("kind", "tied"), BASES)
Saved = Callable[..., Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The folder of an adapter with random numbers that a service saved."""

    def make(base: Path, *, vision: bool = False, **options: Any) -> Path:
        state = tmp_path_factory.mktemp("state")
        service = LocalServiceClient(state, train_vision=vision)
        client = service.create_lora_training_client(str(base), **{"rank": 4, "seed": 3} | options).result()
        disturb(client)
        path = client.save_weights_for_sampler("x").result().path
        service.close()
        return folder_of(state, path)

    return make


def loaded(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


def with_peft(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(loaded(base), adapter)


Gap = Callable[[Any, Any], float]


@pytest.fixture
def gap(prompts: list[tinker.ModelInput], rule: ImageRule) -> Gap:
    """How far the logits of two models of transformers are apart, over prompts with images and without."""

    def largest(one: Any, expected: Any) -> float:
        pairs = ((stock_logits(one, asked, rule), stock_logits(expected, asked, rule)) for asked in prompts)
        return max(float((a - b).abs().max()) for a, b in pairs)

    return largest


@KINDS
def test_merged(kind: str, tied: bool, random_model: RandomModel, saved: Saved, gap: Gap, tmp_path: Path) -> None:
    base = random_model(kind, tied=tied)
    adapter = saved(base)
    proof = export(adapter, tmp_path / "out", "merged")
    assert (proof.prompts, proof.use) == (8, "")
    assert proof.gap < 1e-4 < proof.reach
    plain = loaded(tmp_path / "out")
    assert gap(plain, with_peft(base, adapter)) < 1e-4
    assert plain.lm_head.weight is not plain.get_input_embeddings().weight
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert not config["tie_word_embeddings"]
    assert not config["text_config"]["tie_word_embeddings"]
    assert {path.name for path in base.iterdir()} <= {path.name for path in (tmp_path / "out").iterdir()}


@KINDS
def test_for_peft(kind: str, tied: bool, random_model: RandomModel, saved: Saved, gap: Gap, tmp_path: Path) -> None:
    """It is loaded and merged as a user would, and the merged model saved and loaded again."""
    base = random_model(kind, tied=tied)
    adapter, out = saved(base), tmp_path / "out"
    export(adapter, out, "peft")
    expected = with_peft(base, adapter)
    assert gap(with_peft(base, out), expected) < 1e-4
    whole = AutoPeftModel.from_pretrained(out).merge_and_unload()
    assert gap(whole, expected) < 1e-4
    whole.save_pretrained(tmp_path / "again")
    assert gap(loaded(tmp_path / "again"), expected) < 1e-4


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_a_bare_merge_of_a_tied_model_is_another_model_and_peft_says_so(
    kind: str, random_model: RandomModel, saved: Saved, gap: Gap
) -> None:
    base = random_model(kind, tied=True)
    adapter = saved(base)
    with pytest.warns(UserWarning, match="tie_word_embeddings=True"):
        model = PeftModel.from_pretrained(loaded(base), adapter)
    with pytest.warns(UserWarning, match="tie_word_embeddings=True"):
        bare = model.merge_and_unload()
    assert gap(bare, with_peft(base, adapter)) > 1
    note = json.loads((adapter / "kshot.json").read_text())["note"]
    assert "merge_and_unload() of this adapter changes the embeddings too" in note
    assert "kshot export FOLDER --merged OUT" in note


def test_pefts_ensure_weight_tying_is_no_way_out(random_model: RandomModel, saved: Saved, gap: Gap) -> None:
    """It puts the adapter on the embeddings too: neither loaded nor merged it is the model that was trained."""
    base = random_model("dense", tied=True)
    adapter = saved(base)
    expected = with_peft(base, adapter)
    config = LoraConfig.from_pretrained(str(adapter))
    config = LoraConfig(r=4, lora_alpha=32, target_modules=config.target_modules, ensure_weight_tying=True)
    tying = PeftModel.from_pretrained(loaded(base), adapter, config=config)
    assert gap(tying, expected) > 1


def test_an_adapter_without_the_head_merges_right_in_any_case(
    random_model: RandomModel, saved: Saved, gap: Gap, tmp_path: Path
) -> None:
    base = random_model("dense", tied=True)
    adapter = saved(base, train_unembed=False, vision=True)
    expected = with_peft(base, adapter)
    assert gap(with_peft(base, adapter).merge_and_unload(), expected) < 1e-4
    assert "note" not in json.loads((adapter / "kshot.json").read_text())
    export(adapter, tmp_path / "out", "merged")
    assert gap(loaded(tmp_path / "out"), expected) < 1e-4
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"]
    only_head = saved(base, train_attn=False, train_mlp=False)
    with pytest.raises(ModelError, match="PEFT cannot merge an adapter of a tied head alone; use --merged"):
        export(only_head, tmp_path / "head", "peft")
    assert not (tmp_path / "head").exists()


def test_autopeft_loads_a_saved_adapter(random_model: RandomModel, saved: Saved, gap: Gap) -> None:
    for base in (random_model("sparse", tied=False), nano.folder()):
        adapter = saved(base)
        assert gap(AutoPeftModel.from_pretrained(adapter), with_peft(base, adapter)) == 0


def test_large_models_are_written_in_files_and_half_precision_stays(
    random_model: RandomModel, saved: Saved, gap: Gap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, half = random_model("sparse", tied=True), tmp_path / "half"
    loaded(base).to(torch.bfloat16).save_pretrained(half, max_shard_size="1MB")
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (half / name).write_bytes((base / name).read_bytes())
    monkeypatch.setattr(exporting, "SHARD", 2_000_000)
    adapter = saved(half)
    proof = export(adapter, tmp_path / "out", "merged")
    assert 0 < proof.gap < proof.reach
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert sorted(set(index.values())) == files
    assert files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    assert len(files) > 2
    for file in files:
        with safe_open(tmp_path / "out" / file, "pt") as tensors:
            assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.bfloat16}  # noqa: SIM118
    # the change itself is added in float32, and rounded once
    layer = "model.language_model.layers.0.self_attn.q_proj.weight"
    weights = load_file(adapter / "adapter_model.safetensors")
    a, b = (weights[f"base_model.model.{layer.replace('.weight', f'.lora_{side}.weight')}"] for side in "AB")
    before = loaded(half).state_dict()[layer]
    with safe_open(tmp_path / "out" / index[layer], "pt") as tensors:
        assert tensors.get_tensor(layer).equal((before.float() + 8 * b @ a).to(torch.bfloat16))


def test_experts_in_the_order_of_transformers_own(
    random_model: RandomModel, saved: Saved, gap: Gap, tmp_path: Path
) -> None:
    """The hub's files have an expert's weights the other way round; transformers reads both."""
    base, other = random_model("sparse", tied=False), tmp_path / "other"
    other.mkdir()
    for path in base.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tensors = load_file(base / "model.safetensors")
    save_file(
        {n: t.mT.contiguous() if ".experts." in n else t for n, t in tensors.items()}, other / "model.safetensors"
    )
    adapter = saved(base)
    export(adapter, tmp_path / "out", "merged", str(other))
    assert gap(loaded(tmp_path / "out"), with_peft(base, adapter)) < 1e-4


# vLLM 0.33, Apache-2.0: hf_to_vllm_mapper and packed_modules_mapping of Qwen3VLForConditionalGeneration in
# vllm/model_executor/models/qwen3_vl.py, embedding_modules of Qwen3ForCausalLM in qwen3.py; the rule of names in
# vllm/lora/utils.py (parse_fine_tuned_lora_name) and lora_model.py (check_unexpected_modules)
VLLM_PREFIXES = {
    "model.visual.": "visual.",
    "lm_head.": "language_model.lm_head.",
    "model.language_model.": "language_model.model.",
}
VLLM_LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head", "embed_tokens"}
VLLM_EXPERTS = {"experts", "experts.base_layer"}  # is_3d_moe_weight: down_proj, and gate_up_proj inside it


def vllm_name(name: str) -> str:
    """The layer of vLLM's that a tensor belongs to."""
    assert name.startswith("base_model.model.")
    name = name.replace("base_model.model.", "")
    old, new = next((old, new) for old, new in VLLM_PREFIXES.items() if name.startswith(old))
    *layer, side, last = (new + name.removeprefix(old)).split(".")
    assert (side in ("lora_A", "lora_B"), last) == (True, "weight")
    return ".".join(layer)


@KINDS
def test_vllm_finds_every_layer(
    kind: str, tied: bool, random_model: RandomModel, saved: Saved, gap: Gap, tmp_path: Path
) -> None:
    base = random_model(kind, tied=tied)
    adapter, out = saved(base), tmp_path / "my adapter"
    proof = export(adapter, out, "vllm")
    assert proof.use == f"vllm serve {base} --enable-lora --max-lora-rank 8 --lora-modules 'my adapter={out}'"
    assert gap(with_peft(base, out), with_peft(base, adapter)) < 1e-4
    layers = {vllm_name(name) for name in load_file(out / "adapter_model.safetensors")}
    assert "language_model.lm_head" in layers
    for layer in layers:
        assert layer.startswith("language_model.")
        expert = layer.partition(".mlp.experts")[1:]
        assert (
            "".join(expert).removeprefix(".mlp.") in VLLM_EXPERTS if expert[0] else layer.split(".")[-1] in VLLM_LAYERS
        )
    config = json.loads((out / "adapter_config.json").read_text())
    assert set(config["target_modules"]) <= VLLM_LAYERS
    assert (config["r"], config["lora_alpha"], config["bias"], config["modules_to_save"]) == (4, 32, "none", None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vision": True}, "covers the vision tower, which vLLM leaves out silently"),
        ({"rank": 513}, "has rank 513, beyond vLLM's 512"),
    ],
)
def test_what_vllm_does_not_take_is_named(
    options: dict[str, Any], message: str, random_model: RandomModel, saved: Saved, tmp_path: Path
) -> None:
    adapter = saved(random_model("dense", tied=True), **options)
    with pytest.raises(ModelError, match=rf"{message}.*; use --merged"):
        export(adapter, tmp_path / "out", "vllm")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["merged", "peft", "vllm"])
def test_what_is_another_model_is_not_kept(
    form: str, random_model: RandomModel, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = saved(random_model("dense", tied=True))
    monkeypatch.setattr(exporting, "_plain", lambda adapter: {n: t + 0.1 for n, t in adapter.named().items()})
    monkeypatch.setattr(exporting, "_to_linear", lambda pair, scale: lambda weight: weight.add_(0.1))
    with pytest.raises(
        KshotError, match=rf"the {form} form .* gives another model: on 8 prompts .*nothing was written"
    ):
        export(adapter, tmp_path / "out", form)
    assert not list(tmp_path.iterdir())


def test_only_a_new_or_empty_folder_is_written_to(random_model: RandomModel, saved: Saved, tmp_path: Path) -> None:
    base = random_model("dense", tied=True)
    (tmp_path / "mine").write_text("x")
    for target in (tmp_path, tmp_path / "mine"):
        with pytest.raises(InputError, match="is there; give a new or empty folder"):
            export(saved(base), target, "merged")
    with pytest.raises(ModelError, match=r"does not belong to the model .*: checkpoint does not fit the adapter"):
        export(saved(base), tmp_path / "out", "merged", str(random_model("sparse", tied=True)))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
