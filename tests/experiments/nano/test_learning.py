"""How both students learn: the loss against numpy, the schedule, what is trained by what, and that learning happens."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from torch import Tensor, nn

from experiments.pretrain import learning
from experiments.pretrain.learning import Plan


def test_the_loss_is_the_cross_entropy_between_two_views_of_likeness() -> None:
    rng = np.random.default_rng(0)
    said, queue = rng.normal(size=(3, 5)), rng.normal(size=(8, 5))
    queue /= np.linalg.norm(queue, axis=1, keepdims=True)
    wanted = softmax(queue[:3] @ queue.T / learning.TEACHER_TEMPERATURE, axis=1)
    unit = said / np.linalg.norm(said, axis=1, keepdims=True)
    expected = -(wanted * log_softmax(unit @ queue.T / learning.TEMPERATURE, axis=1)).sum(1).mean()
    found = learning.similarity_loss(torch.tensor(said), torch.tensor(queue))
    assert float(found) == pytest.approx(expected, rel=1e-6)


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
    student, said = Linear(), []
    with torch.random.fork_rng():
        learning.distil(student, 16, masks, described, Plan(80, batch=16, seed=seed), said.append)
    return [float(text.rsplit(" ", 1)[1]) for text in said], student.blocks[0].weight.detach()


def test_a_student_learns_and_learns_the_same_from_the_same_seed() -> None:
    losses, weights = taught(0)
    assert min(losses) < losses[0] - 0.1
    assert torch.equal(weights, taught(0)[1])
    assert not torch.equal(weights, taught(1)[1])
