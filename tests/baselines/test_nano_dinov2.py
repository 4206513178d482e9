"""The nano model: made once, the same everywhere, loadable by timm alone."""

import hashlib
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import timm
import torch

from baselines import nano
from kshot_errors import ModelError


def weights_hash(cache: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KSHOT_CACHE", cache)
        return hashlib.sha256((nano.folder() / "model.safetensors").read_bytes()).hexdigest()


def test_timm_loads_the_folder() -> None:
    vit = timm.create_model(f"local-dir:{nano.folder()}", pretrained=True)
    assert vit.forward_features(torch.zeros(1, 3, 64, 64)).shape == (1, 17, 128)


def test_layout_and_fixed_weights(tmp_path: Path) -> None:
    assert sorted(file.name for file in nano.folder().iterdir()) == ["config.json", "model.safetensors"]
    assert weights_hash(str(tmp_path / "a")) == weights_hash(str(tmp_path / "b"))


def test_folder_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    weights_hash(str(tmp_path))
    assert torch.equal(torch.get_rng_state(), before)


def test_two_processes_may_write_at_once(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        assert len(set(pool.map(weights_hash, [str(tmp_path)] * 2))) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KSHOT_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="set KSHOT_CACHE"):
        nano.folder()


def test_importing_the_package_brings_no_torch() -> None:
    code = "import sys, baselines, baselines.nano; sys.exit(bool({'torch', 'timm', 'sklearn'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
