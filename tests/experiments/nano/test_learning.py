"""How both students learn: loss, schedule, what is trained by what, the teacher that they copy; that they learn, and
that an interruption changes nothing."""

import builtins
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from sklearn.decomposition import PCA
from torch import Tensor, nn

from experiments.pretrain import learning
from experiments.pretrain.checkpoints import Checkpoint, progress
from experiments.pretrain.learning import Described, Plan
from experiments.pretrain.muon import Muon, orthogonal
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
    assert isinstance(muon, Muon)
    assert [len(each.param_groups[0]["params"]) for each in (muon, adam)] == [2, 3]
    assert [each.param_groups[0]["lr"] for each in (muon, adam)] == [0.5 * learning.MUON, 0.5 * learning.ADAM]


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (24, 24)])
def test_muon_is_torchs_but_for_bfloat16(shape: tuple[int, int]) -> None:
    """Three steps: a bfloat16 product of numbers below 1 is right to about 1%."""
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=shape), rng.normal(size=(3, *shape))
    ours, theirs = (nn.Parameter(torch.tensor(start, dtype=torch.float32)) for _ in range(2))
    optimizers = Muon([ours], lr=0.1), torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0)
    for gradient in gradients:
        for weight, optimizer in zip((ours, theirs), optimizers, strict=True):
            weight.grad = torch.tensor(gradient, dtype=torch.float32)
            optimizer.step()
    moved, expected = (weight.detach() - torch.tensor(start, dtype=torch.float32) for weight in (ours, theirs))
    assert (moved - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_a_matrix_becomes_nearly_orthogonal(shape: tuple[int, int]) -> None:
    """The quintic leaves singular values between 0.68 and 1.13 (Jordan et al. 2024) and their vectors as they were."""
    matrix = np.random.default_rng(1).normal(size=shape)
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    inner = left.T @ orthogonal(torch.tensor(matrix)).numpy() @ right.T
    values = np.diag(inner)
    assert values.min() > 0.68
    assert values.max() < 1.14
    np.testing.assert_allclose(inner, np.diag(values), atol=1e-6)


def test_the_learning_rate_warms_up_stays_and_falls() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    tuned = torch.optim.SGD([weight], lr=2.0)
    kept = Checkpoint(None, [weight], [tuned], [])
    group = tuned.param_groups[0]
    rates = [group["lr"] for _ in learning.steps(Plan(steps=400, batch=1), kept, lambda _: None)]
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


def taught(seed: int, *, steps: int = 40, kept: Path | None = None, report: Callable = lambda _: None) -> Tensor:
    """The weights of a student of noise."""
    rng = torch.Generator().manual_seed(3)
    masks = (torch.rand(24, 64, 64, generator=rng) > 0.5).to(torch.uint8) * 255
    photographs = (torch.rand(20, 3, 96, 96, generator=rng) * 255).to(torch.uint8)
    drawings, photos = (
        Described(pictures, nn.functional.normalize(torch.randn(len(pictures), width, generator=rng), dim=1))
        for pictures, width in ((masks, 6), (photographs, 4))
    )
    student = Linear()
    with torch.random.fork_rng():
        plan = Plan(steps, batch=16, seed=seed, checkpoint=kept)
        learning.distil(student, 16, drawings, photos, plan, report)
    return student.blocks[0].weight.detach()


def test_a_student_learns_and_learns_the_same_from_the_same_seed() -> None:
    reports: list[str] = []
    weights = taught(0, report=reports.append)
    losses = [float(text.rsplit(" ", 1)[1]) for text in reports]
    assert min(losses) < losses[0] - 0.1
    assert torch.equal(weights, taught(0))
    assert not torch.equal(weights, taught(1))


def test_an_interrupted_student_goes_on_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stopped between two checkpoints, after the pictures became larger."""
    monkeypatch.setattr(learning, "KEEP", 3)
    kept, reports = tmp_path / "kept", list[str]()

    def stop(text: str) -> None:
        if text.startswith("step 11 of"):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        taught(0, steps=12, kept=kept, report=stop)
    assert progress(kept)[0] == 9
    assert progress(kept)[1] > 0
    weights = taught(0, steps=12, kept=kept, report=reports.append)
    assert reports[0].startswith("step 10 of 12")
    assert torch.equal(weights, taught(0, steps=12))


@pytest.mark.parametrize(("with_photographs", "counts"), [(True, [12, 4]), (False, [16])])
def test_a_quarter_of_the_pictures_are_photographs(
    monkeypatch: pytest.MonkeyPatch, with_photographs: bool, counts: list[int]
) -> None:
    """Each kind is compared with a queue of its own."""
    seen: list[tuple[int, int]] = []

    def similarity(made: Tensor, queue: Tensor) -> Tensor:
        seen.append((len(made), queue.shape[1]))
        return made.sum() * 0

    monkeypatch.setattr(learning, "similarity_loss", similarity)
    masks, described = torch.zeros(5, 64, 64, dtype=torch.uint8), torch.eye(5)
    photos = Described(torch.zeros(4, 3, 96, 96, dtype=torch.uint8), torch.eye(4)) if with_photographs else None
    learning.distil(Linear(), 16, Described(masks, described), photos, Plan(1, batch=16), lambda _: None)
    assert seen == list(zip(counts, (5, 4), strict=False))


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


def test_photographs_are_described_by_what_the_teacher_sees_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher of 20 features, all of whose directions are kept: they are as alike as its centred features."""
    rng = torch.Generator().manual_seed(1)
    teacher = nn.Conv2d(3, 20, 32, 32)
    with torch.no_grad():
        teacher.weight.copy_(torch.randn(teacher.weight.shape, generator=rng) / 50)
    teacher.extract_features = teacher.forward
    monkeypatch.setattr(learning, "_teacher", lambda: teacher)
    monkeypatch.setattr(learning, "MEANINGS", 20)
    pictures = (torch.rand(70, 3, 96, 96, generator=rng) * 255).to(torch.uint8)
    described = learning.describe_photographs(pictures).numpy()
    large = nn.functional.interpolate(pictures.float(), size=(128, 128), mode="bilinear")
    features = nn.functional.conv2d((large - 127) / 128, teacher.weight.detach(), stride=32).mean((2, 3)).numpy()
    centred = features - features.mean(0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    np.testing.assert_allclose(described @ described.T, unit @ unit.T, atol=1e-3)


def test_a_missing_teacher_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object, **more: object) -> object:
        if name.startswith("efficientnet"):
            raise ImportError(name=name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModelError, match=r"pip install 'kshot\[pretrain\]'"):
        learning.describe(torch.zeros(1, 64, 64, dtype=torch.uint8))
