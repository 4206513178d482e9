"""How both students learn: loss, schedule, what is trained by what, the teacher that they copy; and that they learn."""

import builtins

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from sklearn.decomposition import PCA
from torch import Tensor, nn

from experiments.pretrain import learning
from experiments.pretrain.learning import Plan
from kshot.errors import ModelError


def test_the_loss_is_the_cross_entropy_between_two_views_of_likeness() -> None:
    rng = np.random.default_rng(0)
    made, queue = rng.normal(size=(3, 5)), rng.normal(size=(8, 5))
    queue /= np.linalg.norm(queue, axis=1, keepdims=True)
    wanted = softmax(queue[:3] @ queue.T / learning.TEACHER_TEMPERATURE, axis=1)
    unit = made / np.linalg.norm(made, axis=1, keepdims=True)
    expected = -(wanted * log_softmax(unit @ queue.T / learning.TEMPERATURE, axis=1)).sum(1).mean()
    loss = learning.similarity_loss(torch.tensor(made), torch.tensor(queue))
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_matrices_of_blocks_go_to_muon_and_the_rest_to_adam() -> None:
    def parameter(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.zeros(shape))

    named = {
        "blocks.0.fc.weight": parameter(2, 2),
        "layers.1.fc.weight": parameter(2, 2),
        "blocks.0.fc.bias": parameter(2),
        "embed.weight": parameter(2, 2),
        "head": parameter(2, 2),
    }
    muon, adam = learning.make_optimizers(named.items(), scale=0.5)
    assert isinstance(muon, torch.optim.Muon)
    assert [len(each.param_groups[0]["params"]) for each in (muon, adam)] == [2, 3]
    assert [each.param_groups[0]["lr"] for each in (muon, adam)] == [0.5 * learning.MUON, 0.5 * learning.ADAM]


def test_the_learning_rate_warms_up_stays_and_falls() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    tuned = [torch.optim.SGD([weight], lr=2.0)]
    group = tuned[0].param_groups[0]
    rates = [group["lr"] for _ in learning.steps(Plan(steps=400, batch=1), tuned, lambda _: None)]
    steps = np.arange(400)
    expected = 2 * np.minimum(1, np.minimum((steps + 1) / 50, (1 - steps / 400) / 0.5))
    np.testing.assert_allclose(rates, expected)


def test_most_pictures_are_small_and_the_last_ones_full() -> None:
    sides = [learning.side_at(progress / 100) for progress in range(100)]
    assert sides == [48] * 80 + [64] * 20


class Linear(nn.Module):
    """The least of students."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(3 * 48 * 48, 16)])
        with torch.no_grad():
            rng = torch.Generator().manual_seed(0)
            self.blocks[0].weight.copy_(torch.randn(16, 3 * 48 * 48, generator=rng) * 0.01)
            self.blocks[0].bias.zero_()

    def forward(self, pictures: Tensor) -> Tensor:
        small = nn.functional.interpolate(pictures, size=(48, 48))
        return self.blocks[0](small.flatten(1))


def taught(seed: int) -> tuple[list[float], Tensor]:
    rng = torch.Generator().manual_seed(3)
    masks = (torch.rand(24, 64, 64, generator=rng) > 0.5).to(torch.uint8) * 255
    described = nn.functional.normalize(torch.randn(24, 6, generator=rng), dim=1)
    student, reports = Linear(), []
    with torch.random.fork_rng():
        learning.distil(student, 16, masks, described, Plan(80, batch=16, seed=seed), reports.append)
    return [float(text.rsplit(" ", 1)[1]) for text in reports], student.blocks[0].weight.detach()


def test_a_student_learns_and_learns_the_same_from_the_same_seed() -> None:
    losses, weights = taught(0)
    assert min(losses) < losses[0] - 0.1
    assert torch.equal(weights, taught(0)[1])
    assert not torch.equal(weights, taught(1)[1])


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
