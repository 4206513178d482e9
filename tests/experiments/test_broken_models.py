"""Models that cannot be loaded are refused before anything begins; those that compute NaN fail by name, and no others.

Every command, one line each: kshot serve, predict, train, sweep and zero-shot.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from trained import TINY

from baselines import nano as nano_dinov2
from experiments.sweep.cells import Job
from tests.vlm.checkpoints import copied, text_model, with_config, with_weights
from vlm import nano
from vlm.local.model import placement

NORM = "model.language_model.norm.weight"


def _cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 100_000)


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _other_processor(**change: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        file = folder / "preprocessor_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))

    return make


KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "another type": (lambda folder: with_config(folder, model_type="bert"), "is of type 'bert'"),
    "cut short": (_cut, "is cut short"),
    "no weights": (_without("model.safetensors"), "no weights as safetensors"),
    "a tensor is missing": (
        lambda folder: with_weights(folder, {NORM: None}),
        f"lacks 1 of the model's tensors, first {NORM}",
    ),
    "another shape": (lambda folder: with_weights(folder, {NORM: torch.ones(3)}), "of other shapes"),
    "no tokenizer": (_without("tokenizer.json"), "tokenizer"),
    "no processor": (_without("preprocessor_config.json"), "image processor"),
    "another model's processor": (_other_processor(patch_size=7), "patch_size"),
    "another kind of processor": (_other_processor(image_processor_type="CLIPImageProcessor"), "image processor"),
}


@pytest.fixture(params=KINDS)
def broken(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A copy of the nano model that cannot be loaded, and what must be said of it."""
    (tmp_path / "model").mkdir()
    folder = copied(nano.folder(), tmp_path / "model")
    damage, named = KINDS[request.param]
    damage(folder)
    return folder, named


@pytest.mark.usefixtures("never")
def test_no_command_begins(
    broken: tuple[Path, str], photos: Path, refused: Any, ran: list[Job], images: Path, tmp_path: Path
) -> None:
    (folder, named), out = broken, tmp_path / "out"
    data = ("--dataset", f"folder:{photos}", "--model", folder, "--out", out)
    for words in (
        ("serve", "--port", "0", "--state", out, "--model", nano.NAME, "--model", f"mine={folder}"),
        ("predict", images / "a.png", "--model", folder, "--class", "a", "--class", "b"),
        ("sweep", *data, "--method", "pixel-knn", "--method", "vlm-zero-shot", "--shots", "1", "--seeds", "0"),
        ("zero-shot", *data),
        ("train", *data, "--shots", "1", *TINY),
    ):
        assert str(folder) in refused(*words, parts=[named]), words
        assert not out.exists(), words
    assert not ran


@pytest.mark.usefixtures("never")
def test_a_text_model_classifies_no_images(photos: Path, refused: Any, images: Path, tmp_path: Path) -> None:
    folder, out = text_model(tmp_path / "text", "llama"), tmp_path / "out"
    data = ("--dataset", f"folder:{photos}", "--model", folder, "--out", out)
    for words in (
        ("predict", images / "a.png", "--model", folder, "--class", "a", "--class", "b"),
        ("sweep", *data, "--method", "vlm-zero-shot", "--shots", "1", "--seeds", "0"),
        ("zero-shot", *data),
        ("train", *data, "--shots", "1", *TINY),
    ):
        assert str(folder) in refused(*words, parts=["is a text model and takes no images; give a Qwen3-VL"]), words
        assert not out.exists(), words


@pytest.mark.usefixtures("never")
def test_what_is_no_text_model_is_not_served(refused: Any, tmp_path: Path) -> None:
    other, gguf = text_model(tmp_path / "text", "llama"), tmp_path / "model.gguf"
    with_config(other, eos_token_id=7)
    gguf.write_bytes(b"GGUF")
    serve = ("serve", "--port", "0", "--state", tmp_path / "state", "--model")
    refused(*serve, other, parts=[str(other), "has another model's tokenizer beside its weights"])
    refused(*serve, f"mine={gguf}", parts=[str(gguf), "is a GGUF file", "safetensors in hub layout"])
    assert not (tmp_path / "state").exists()


@pytest.mark.usefixtures("never")
def test_a_model_too_large_for_the_memory_is_not_served(
    refused: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(placement, "free_bytes", lambda _: 1000)
    refused("serve", "--port", "0", "--state", tmp_path / "state", parts=["needs 0.0 GB", "use a smaller model"])
    assert not (tmp_path / "state").exists()


@pytest.fixture
def nan(tmp_path: Path) -> Path:
    """A model that loads, and computes NaN."""
    (tmp_path / "nan").mkdir()
    folder = copied(nano.folder(), tmp_path / "nan")
    with_weights(folder, {NORM: torch.full((128,), torch.nan)})
    return folder


@pytest.mark.parametrize("options", [[], ["--json"], ["--method", "likelihood"]])
def test_predict_answers_nothing_of_nan(nan: Path, images: Path, refused: Any, options: list[str]) -> None:
    words = "predict", images, "--model", nan, "--class", "a cat", "--class", "a dog", *options
    refused(*words, parts=[f"model {nan} gives scores that are not finite (NaN or Inf)"])


def test_train_writes_no_adapter_of_nan(nan: Path, photos: Path, refused: Any, tmp_path: Path) -> None:
    words = "train", "--dataset", f"folder:{photos}", "--model", nan, "--shots", "1", *TINY, "--out", tmp_path / "out"
    refused(*words, parts=[f"model {nan} with run ", " gives log-probabilities that are not finite"])
    assert not (tmp_path / "out").exists()


def test_cells_of_nan_fail_by_name_and_others_go_on(
    nan: Path, photos: Path, kshot: Any, ran: list[Job], tmp_path: Path
) -> None:
    backbone = tmp_path / "backbone"
    shutil.copytree(nano_dinov2.HERE, backbone, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    tensors = load_file(backbone / "model.safetensors")
    tensors["norm.weight"][0] = torch.nan
    save_file(tensors, backbone / "model.safetensors")
    methods = "vlm-zero-shot", "vlm-lora", "vlm-vision-linear", "dinov2-logreg", "dinov2-lora", "pixel-knn"
    options = [word for method in methods for word in ("--method", method)]
    options += ["--model", nan, "--backbone", backbone, "--shots", "1", "--seeds", "0", *TINY]
    ended = kshot(
        "sweep", "--dataset", f"folder:{photos}", *options, "--vlm-features", "hidden", "--out", tmp_path / "out"
    )
    assert ended.status == 2
    assert "Traceback" not in ended.err
    failed = {}
    for path in (tmp_path / "out/failed").glob("*.json"):
        noted = json.loads(path.read_text())
        failed[noted["method"]] = noted["error"]
        assert (noted["trace"], noted["exit_status"]) == ("", 2)
    assert {*failed} == {*methods} - {"pixel-knn"}
    for method, error in failed.items():
        whose = f"model {backbone if 'dinov2' in method else nan}"
        assert (f"{whose} with run " if method == "vlm-lora" else f"{whose} gives") in error
    assert [json.loads(path.read_text())["method"] for path in (tmp_path / "out/cells").glob("*.json")] == ["pixel-knn"]


def test_a_damaged_backbone_is_refused_before_the_first_cell(
    photos: Path, refused: Any, ran: list[Job], tmp_path: Path
) -> None:
    backbone = tmp_path / "backbone"
    shutil.copytree(nano_dinov2.HERE, backbone, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    os.truncate(backbone / "model.safetensors", 100_000)
    words = (
        "--method",
        "dinov2-logreg",
        "--backbone",
        backbone,
        "--shots",
        "1",
        "--seeds",
        "0",
        "--out",
        tmp_path / "out",
    )
    refused("sweep", "--dataset", f"folder:{photos}", *words, parts=[str(backbone)])
    assert not ran
    assert not (tmp_path / "out").exists()
