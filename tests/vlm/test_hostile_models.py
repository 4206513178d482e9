"""What a model's or an adapter's files ask for and do not get: kernels, files elsewhere, downloads."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import transformers.modeling_utils

from kshot.errors import ModelError
from tests.vlm.checkpoints import copied, with_config
from vlm import nano
from vlm.local.checkpoint import Checkpoint, base_of
from vlm.local.model.load import check, load
from vlm.local.model.lora import LoraSpec
from vlm.local.model.placement import INDEX, stored_tensors

KERNEL = "kernels-community/anything"


@pytest.mark.parametrize("part", ["", "text_config", "vision_config"])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_no_kernel_is_fetched_that_a_configuration_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, key: str
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        transformers.modeling_utils, "lazy_import_flash_attention", lambda name, **_: asked.append(name)
    )
    folder = copied(nano.folder(), tmp_path)
    written = json.loads((folder / "config.json").read_text())
    with_config(folder, **({part: {**written[part], key: KERNEL}} if part else {key: KERNEL}))
    check(str(folder))
    assert asked == []


def test_the_attention_is_the_same_whatever_is_named(tmp_path: Path) -> None:
    folder = copied(nano.folder(), tmp_path)
    with_config(folder, attn_implementation="eager")
    config = load(str(folder)).config
    assert {config._attn_implementation, config.text_config._attn_implementation} == {"sdpa"}


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_a_part_that_is_quantised(tmp_path: Path, part: str) -> None:
    folder = copied(nano.folder(), tmp_path)
    written = json.loads((folder / "config.json").read_text())
    with_config(folder, **{part: {**written[part], "quantization_config": {"quant_method": "gptq"}}})
    with pytest.raises(ModelError, match="is quantised"):
        check(str(folder))


def test_an_adapter_beside_a_model_is_not_put_into_it(tmp_path: Path) -> None:
    folder = copied(nano.folder(), tmp_path)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"has an adapter beside its weights \(adapter_config.json\); move it"):
        check(str(folder))


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "link.safetensors", ".."])
def test_an_index_names_files_of_its_own_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copyfile(nano.folder() / "model.safetensors", tmp_path / "model.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match=f"names {name!r}, which is no file of its folder; put its weights there"):
        stored_tensors("m", folder)


def test_an_adapter_downloads_nothing_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def snapshot(hub_id: str, *, local_files_only: bool = False, **_: object) -> str:
        asked.append(local_files_only)
        if hub_id != "o/cached":
            raise OSError("not in the cache")
        folder = tmp_path / "snapshots" / ("a" * 40)
        folder.mkdir(parents=True)
        (folder / "model.safetensors").touch()
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    adapter = Checkpoint("o/n", LoraSpec(4), {})
    with pytest.raises(ModelError, match=r"of the model o/n, which is not on this machine and is not fetched unasked"):
        base_of(tmp_path, adapter, None)
    assert base_of(tmp_path, Checkpoint("o/cached", LoraSpec(4), {}), None) == f"o/cached@{'a' * 40}"
    assert base_of(tmp_path, adapter, None, {"o/n"}) == "o/n"
    assert base_of(tmp_path, adapter, "o/n") == "o/n"
    assert asked == [True, True]
    with pytest.raises(ModelError, match=r"is of the model /none, which is not here; say with base_model"):
        base_of(tmp_path, Checkpoint("/none", LoraSpec(4), {}), None)
