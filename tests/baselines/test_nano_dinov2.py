"""The nano DINOv2 as it is shipped: small, safe to open, loadable by timm alone, and what its module says it is."""

import hashlib
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open

from baselines import nano
from baselines.backbone import load
from kshot.errors import ModelError


def test_the_weights_in_the_file_are_those_that_timm_computes_with() -> None:
    vit = timm.create_model(f"local-dir:{nano.HERE}", pretrained=True)
    assert vit.forward_features(torch.zeros(1, 3, 64, 64)).shape == (1, 1 + 64, 128)
    with safe_open(nano.HERE / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    assert stored.keys() == vit.state_dict().keys()
    assert all(torch.equal(vit.state_dict()[name], tensor) for name, tensor in stored.items())


def test_revision_and_size() -> None:
    weights = (nano.HERE / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest()[:12] == nano.REVISION
    assert len(weights) <= 8 * 2**20


def test_missing_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nano, "HERE", tmp_path)
    with pytest.raises(ModelError, match=r"has no config\.json; install kshot again"):
        load(nano.NAME)
