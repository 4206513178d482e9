"""The students' own ways to compute, against the stock modules: the tower on a batch, the ViT's start and attention."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from experiments.pretrain.students import Tower, create_dinov2, wave_positions
from tests.experiments.nano.drawn import fresh
from vlm import nano


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
