"""What the students copy: principal directions as scikit-learn finds them, and descriptions that know mirror images."""

import builtins

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from experiments.pretrain import learning
from kshot.errors import ModelError


def test_principal_is_principal_component_analysis() -> None:
    rows = torch.randn(60, 9, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 10)
    ours = learning.principal(rows, 4).numpy()
    theirs = PCA(4).fit_transform(rows.numpy())
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs), atol=1e-4)


def test_descriptions_are_unit_vectors_and_differ_from_their_mirrors_in_strokes_alone() -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="the teacher's packages are not installed")
    rng = torch.Generator().manual_seed(1)
    blocks = torch.rand(140, 1, 8, 8, generator=rng)
    masks = (torch.nn.functional.interpolate(blocks, size=64)[:, 0] > 0.6).to(torch.uint8) * 255
    described = learning.describe(masks)
    assert described.shape == (280, learning.STROKES + learning.MEANINGS)
    torch.testing.assert_close(described.norm(dim=1), torch.ones(280))
    one, mirror = described[:140], described[140:]
    torch.testing.assert_close(one[:, learning.STROKES :], mirror[:, learning.STROKES :])
    assert (one[:, : learning.STROKES] - mirror[:, : learning.STROKES]).abs().max() > 0.1


def test_a_missing_teacher_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object, **more: object) -> object:
        if name.startswith("efficientnet"):
            raise ImportError(name=name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModelError, match=r"pip install 'kshot\[pretrain\]'"):
        learning.describe(torch.zeros(1, 64, 64, dtype=torch.uint8))
