"""The vision tower's own forward pass against the stock one's, of dense and mixture-of-experts models."""

import copy
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionConfig, Qwen3VLVisionModel
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeVisionConfig, Qwen3VLMoeVisionModel

from vlm.local.model import tower

SMALL: dict[str, Any] = {
    "depth": 4,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_heads": 3,
    "patch_size": 4,
    "num_position_embeddings": 25,
    "out_hidden_size": 40,
    "deepstack_visual_indexes": [0, 2],
}
GRID = (1, 6, 4)


@pytest.fixture(params=[(Qwen3VLVisionModel, Qwen3VLVisionConfig), (Qwen3VLMoeVisionModel, Qwen3VLMoeVisionConfig)])
def small(request: pytest.FixtureRequest) -> Any:
    """A tower of other sizes than nano's, with random weights: of a dense and of a mixture-of-experts model."""
    visual, config = request.param
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return visual(config(**SMALL)).eval().requires_grad_(False)


def noise(visual: Any, grid: tuple[int, int, int], count: int) -> Tensor:
    config = visual.config
    channels = 3 * config.temporal_patch_size * config.patch_size**2
    patches = count * grid[1] * grid[2]
    return torch.rand(patches, channels, generator=torch.Generator().manual_seed(1)) * 2 - 1


def stock_layers(visual: Any, patches: Tensor, grid: tuple[int, int, int], count: int) -> list[Tensor]:
    """The stock tower's embeds and deepstack layers, each (images x tokens, hidden)."""
    out = visual(patches, torch.tensor([grid] * count))
    return [out.pooler_output, *out.deepstack_features]


def tower_layers(visual: Any, patches: Tensor, grid: tuple[int, int, int], count: int) -> list[Tensor]:
    layers = tower.tower(visual, patches, tower.grid_tables(visual, grid), count)
    return [layer.flatten(0, 1) for layer in layers.unbind(1)]


def furthest(some: list[Tensor], others: list[Tensor]) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("grid", [GRID, (1, 2, 10)])
def test_the_tower_equals_the_stock_one(small: Any, grid: tuple[int, int, int], count: int) -> None:
    patches = noise(small, grid, count)
    expected = stock_layers(small, patches, grid, count)
    assert len(expected) == 3
    assert furthest(tower_layers(small, patches, grid, count), expected) <= 1e-5
    half = copy.deepcopy(small).bfloat16()
    expected = stock_layers(half, patches, grid, count)
    got = tower_layers(half, patches, grid, count)
    assert got[0].dtype == torch.bfloat16
    assert furthest(got, expected) <= 0.02


@pytest.mark.parametrize("count", [1, 3])
def test_the_tower_equals_the_stock_one_on_trained_weights(
    stock: Any, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Trained weights carry the last digit of a patch's sum a hundred times as far, in the stock tower too: the digits
    are the same where the stock tower takes patches as a product."""
    patches, visual = noise(stock.model.visual, GRID, count), copy.deepcopy(stock.model.visual)
    assert furthest(tower_layers(visual, patches, GRID, count), stock_layers(visual, patches, GRID, count)) <= 1e-3
    convolution = visual.patch_embed
    monkeypatch.setattr(convolution, "forward", lambda x: tower._patches(convolution.proj, x))
    assert furthest(tower_layers(visual, patches, GRID, count), stock_layers(visual, patches, GRID, count)) <= 1e-5


def test_gradients_of_lora_on_the_tower_equal_transformers_and_peft(small: Any) -> None:
    patches, count = noise(small, GRID, 2), 2
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["qkv", "proj", "linear_fc1", "linear_fc2"])
    config.exclude_modules = r".*patch_embed.*"
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        adapted = get_peft_model(copy.deepcopy(small), config)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # at zeros A has no gradient
                torch.nn.init.normal_(parameter, std=0.1)
    weigh = [torch.randn(12, 40, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    sum((w * x).sum() for w, x in zip(weigh, stock_layers(adapted, patches, GRID, count), strict=True)).backward()
    theirs = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    ours = {n: p.detach().clone().requires_grad_() for n, p in theirs.items()}

    def linear(name: str, layer: torch.nn.Module, x: Tensor) -> Tensor:
        a, b = (ours[f"base_model.model.{name}.lora_{side}.default.weight"] for side in "AB")
        return layer(x) + x @ a.T @ b.T * 4

    layers = tower.tower(small, patches, tower.grid_tables(small, GRID), count, linear)
    sum((w * x.flatten(0, 1)).sum() for w, x in zip(weigh, layers.unbind(1), strict=True)).backward()
    assert len(ours) == 2 * (4 * SMALL["depth"] + 2 * len(weigh))  # of the blocks and the mergers
    for name, parameter in theirs.items():
        reference = parameter.grad
        assert (ours[name].grad - reference).abs().max() <= 1e-5 * max(1.0, float(reference.abs().max())), name


def test_tables_of_an_inference_pass_serve_passes_with_gradients_too(small: Any) -> None:
    with torch.inference_mode():
        tables = tower.grid_tables(small, GRID)
    assert not any(table.is_inference() for table in tables)
