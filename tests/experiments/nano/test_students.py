"""The students' own ways to compute, against the stock modules: the tower on a batch, the ViT's start and attention;
and how the whole nano Qwen3-VL is taught, against the stock model's own forward pass and its own words."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import log_softmax
from transformers import AutoImageProcessor, AutoTokenizer

from experiments.pretrain import learning, students
from experiments.pretrain.learning import FULL, Described, Plan
from experiments.pretrain.students import Tower, create_dinov2, wave_positions
from tests.experiments.nano.drawn import fresh
from vlm import nano
from vlm.inputs import ImageRule
from vlm.prompts import Prompt

NAMES = ("arrow", "letter a", "wheelbarrow")


def pictures(count: int, side: int) -> tuple[torch.Tensor, list[Image.Image]]:
    """The same pictures as numbers from 0 to 1 and as Pillow's images."""
    whole = np.random.default_rng(side).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return torch.from_numpy(whole).permute(0, 3, 1, 2) / 255, [Image.fromarray(each) for each in whole]


def processed(images: list[Image.Image]) -> dict[str, torch.Tensor]:
    """As the stock processor has it; small pictures are not enlarged here, as they are for a user."""
    processor = AutoImageProcessor.from_pretrained(nano.HERE, size={"shortest_edge": 256, "longest_edge": 16384})
    return processor(images=images, return_tensors="pt")


@pytest.mark.parametrize("side", [48, 64])
def test_the_tower_is_the_stock_one(side: int) -> None:
    numbers, images = pictures(3, side)
    stock, inputs = fresh().model.visual, processed(images)
    tower = Tower(fresh().model.visual)
    torch.testing.assert_close(tower.patches(numbers), inputs["pixel_values"])
    expected = stock(inputs["pixel_values"], inputs["image_grid_thw"])
    tokens, layers = tower.tokens(numbers)
    torch.testing.assert_close(tokens.flatten(0, 1), expected.pooler_output, rtol=1e-4, atol=2e-5)
    for ours, theirs in zip(layers, expected.deepstack_features, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(tower(numbers), expected.pooler_output.view(3, -1, 128).mean(1), rtol=1e-4, atol=2e-5)


def test_the_tower_has_the_stock_ones_gradients() -> None:
    numbers, images = pictures(2, 48)
    stock, inputs, tower = fresh().model.visual, processed(images), Tower(fresh().model.visual)
    stock(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output.square().sum().backward()
    tower.tokens(numbers)[0].square().sum().backward()
    theirs = {name: p.grad for name, p in stock.named_parameters() if p.grad is not None}
    ours = {name: p.grad for name, p in tower.visual.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-5, name


def test_the_start_of_the_vit_depends_on_the_seed_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = (create_dinov2(seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])


def test_positions_start_as_waves() -> None:
    positions = wave_positions(3, 8).numpy()
    frequency = np.array([1, 100**-0.5])
    for n, (row, column) in enumerate(np.ndindex(3, 3)):
        expected = [f(place * frequency) for place in (column, row) for f in (np.sin, np.cos)]
        np.testing.assert_allclose(positions[n], 0.5 * np.concatenate(expected), atol=1e-6)


def test_plain_attention_says_what_the_fused_one_says() -> None:
    plain, fused = create_dinov2(0).eval(), create_dinov2(0).eval()
    for block in fused.blocks:
        assert not block.attn.fused_attn
        block.attn.fused_attn = True
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(plain(x), fused(x), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def prompt() -> Prompt:
    return Prompt(AutoTokenizer.from_pretrained(nano.HERE), ImageRule.from_pretrained(str(nano.HERE)), NAMES)


@torch.no_grad()
def test_the_answers_are_those_of_the_stock_forward_pass(prompt: Prompt) -> None:
    shown, images = pictures(3, FULL)
    chosen = torch.tensor([2, 0, 1])
    ours, stock = fresh(), fresh()
    prompts = students.questions(ours, prompt, NAMES, FULL)
    hidden, targets = students.answer_states(ours, Tower(ours.model.visual), prompts, shown, chosen)
    ids, _ = prompts.batch(chosen)
    is_image = (ids == stock.config.image_token_id).int()
    logits = stock(input_ids=ids, mm_token_type_ids=is_image, **processed(images)).logits
    torch.testing.assert_close(ours.lm_head(hidden), logits[:, len(prompts.question) - 1 :], rtol=1e-4, atol=1e-4)
    for row, label in zip(targets.tolist(), chosen.tolist(), strict=True):
        assert tuple(token for token in row if token != students.IGNORED) == prompt.choices[label]


def test_the_question_is_the_products_own(prompt: Prompt, make_image) -> None:
    prompts = students.questions(fresh(), prompt, NAMES, FULL)
    before, image, after = prompt.question(make_image(0, FULL, FULL)).chunks
    assert prompts.question.tolist()[: before.length] == before.tokens
    assert prompts.question.tolist()[-after.length :] == after.tokens
    assert int(prompts.is_image.sum()) == image.expected_tokens == 16
    assert len(prompts.question) == before.length + 16 + after.length
    assert int(students.questions(fresh(), prompt, NAMES, 48).is_image.sum()) == 9


def test_interrupted_answers_go_on_as_if_they_had_not_been(
    prompt: Prompt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "KEEP", 2)
    monkeypatch.setattr(students, "COMMON", 1)
    rng = torch.Generator().manual_seed(0)
    masks = (torch.rand(6, 64, 64, generator=rng) > 0.5).to(torch.uint8) * 255
    drawings = Described(masks, torch.nn.functional.normalize(torch.randn(6, 5, generator=rng), dim=1))

    def answers(kept: Path | None, report: Callable[[str], None]) -> list[torch.Tensor]:
        model = fresh()
        students.train_answers(model, prompt, drawings, NAMES * 2, Plan(4, batch=4, checkpoint=kept), report)
        return list(model.state_dict().values())

    def stop(text: str) -> None:
        if text.startswith("step 3 of"):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        answers(tmp_path / "kept", stop)
    reports: list[str] = []
    again = answers(tmp_path / "kept", reports.append)
    assert reports[0].startswith("step 3 of 4")
    assert all(map(torch.equal, again, answers(None, lambda _: None)))


def test_the_loss_weighs_the_first_token_most() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 7))
    targets = np.array([[1, 4, 6], [2, 5, students.IGNORED]])
    log_probs = log_softmax(logits, axis=2)
    first = -log_probs[0, 0, 1] - log_probs[1, 0, 2]
    later = -log_probs[0, 1, 4] - log_probs[0, 2, 6] - log_probs[1, 1, 5]
    loss = students.answer_loss(torch.tensor(logits), torch.tensor(targets))
    assert float(loss) == pytest.approx((first + 0.3 * later) / 2)


def test_names_that_many_drawings_bear_are_shown_less_often_than_they_stand_there() -> None:
    shares = students.sampling_weights(["a", "a", "a", "a", "b"])
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.5, 0.5, 0.5, 1.0]))
    common = students.sampling_weights(["a", "a", "a", "a", "b"], least=4)
    torch.testing.assert_close(common, torch.tensor([0.5, 0.5, 0.5, 0.5, 0.0]))


def test_rare_names_are_shown_to_a_share_of_the_steps(prompt: Prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten steps the first six show both names, the last four the one that more drawings have."""
    monkeypatch.setattr(students, "COMMON", 4)
    asked: list[set[int]] = []
    stock = students.answer_states

    def states(model: Any, tower: Tower, prompts: Any, shown: torch.Tensor, chosen: torch.Tensor) -> Any:
        asked.append(set(chosen.tolist()))
        return stock(model, tower, prompts, shown, chosen)

    monkeypatch.setattr(students, "answer_states", states)
    drawings = Described(torch.zeros(5, 64, 64, dtype=torch.uint8), torch.eye(5))
    names = [NAMES[0]] * 4 + [NAMES[1]]
    students.train_answers(fresh(), prompt, drawings, names, Plan(10, batch=8), lambda _: None)
    assert 4 in set().union(*asked[:6])
    assert 4 not in set().union(*asked[6:])


def test_a_few_steps_make_the_names_likelier(prompt: Prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(students, "COMMON", 1)
    rng = torch.Generator().manual_seed(0)
    masks = (torch.rand(6, 64, 64, generator=rng) > 0.5).to(torch.uint8) * 255
    described = torch.nn.functional.normalize(torch.randn(6, 5, generator=rng), dim=1)
    model, reports = fresh(), []
    students.train_answers(model, prompt, Described(masks, described), NAMES * 2, Plan(20, batch=4), reports.append)
    losses = [float(text.rsplit(" ", 1)[1]) for text in reports]
    assert losses[-1] < losses[0]
    assert not model.training
