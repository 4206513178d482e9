"""`kshot export`, and `kshot predict` with what it writes and with an adapter of PEFT's."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stored import CLASSES

from experiments.adapters.folder import FILES

NAMES = [word for name in CLASSES for word in ("--class", name)]


def top(printed: str) -> list[dict[str, Any]]:
    return [json.loads(line)["top3"] for line in printed.splitlines()]


def test_the_merged_model_and_the_bare_adapter_predict_what_the_adapter_does(
    kshot: Callable[..., Any], adapter: Path, photos: Path, tmp_path: Path
) -> None:
    image, out, record = (
        photos / CLASSES[1] / "0.png",
        tmp_path / "merged",
        json.loads((adapter / "classifier.json").read_text()),
    )
    ended = kshot("export", adapter, "--merged", out)
    first, second = ended.out.splitlines()
    assert (ended.status, first) == (0, f"wrote {out}"), ended.err
    assert second.startswith("on 8 prompts a logit differs by ")
    options = (image, "--json", "--top", 3)
    expected = top(kshot("predict", *options, "--adapter", adapter).out)
    bare = tmp_path / "bare"  # as PEFT would save it
    bare.mkdir()
    for name in FILES["adapter"] - {"classifier.json", "kshot.json", "README.md"}:
        shutil.copyfile(adapter / name, bare / name)
    asked = (*options, *NAMES, "--prompt", record["prompt"], "--max-side", record["max_side"])
    for source in (("--model", out), ("--adapter", bare)):
        ended = kshot("predict", *asked, *source)
        assert ended.status == 0, ended.err
        for ours, theirs in zip(top(ended.out), expected, strict=True):
            assert [each["label"] for each in ours] == [each["label"] for each in theirs]
            assert [each["probability"] for each in ours] == pytest.approx([e["probability"] for e in theirs], abs=1e-5)


def test_for_vllm_the_command_is_printed(kshot: Callable[..., Any], adapter: Path, tmp_path: Path) -> None:
    ended = kshot("export", adapter, "--vllm", tmp_path / "out")
    assert ended.status == 0, ended.err
    assert ended.out.splitlines()[-1].startswith("vllm serve ")
    assert (tmp_path / "out/adapter_config.json").is_file()


def test_what_is_refused(refused: Callable[..., str], adapter: Path, tmp_path: Path) -> None:
    refused("export", adapter, parts=("give one of --merged OUT, --peft OUT and --vllm OUT",))
    refused("export", adapter, "--merged", tmp_path / "a", "--peft", tmp_path / "b", parts=("give one of",))
    refused("export", tmp_path / "nowhere", "--merged", tmp_path / "a", parts=("nowhere is no folder",))
    refused("export", adapter, "--merged", adapter, parts=("is there; give a new or empty folder",))
    refused("export", adapter, "--peft", tmp_path / "a", "--model", "nowhere", parts=("unknown model 'nowhere'",))
    assert not list(tmp_path.iterdir())


def test_foreign_adapters_without_class_names(
    refused: Callable[..., str], adapter: Path, photos: Path, tmp_path: Path
) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(adapter / name, tmp_path / name)
    refused(
        "predict", photos / CLASSES[0] / "0.png", "--adapter", tmp_path, parts=("has no classifier.json", "--class")
    )
