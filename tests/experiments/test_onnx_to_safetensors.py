"""The example that converts a DINOv2 from .onnx, against the models that torch exported."""

import warnings
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model, PreTrainedModel

from baselines.weights import vision_transformer
from experiments.examples.onnx_to_safetensors import convert
from tests.baselines.small_dinov2 import SIDE, SIZES, WIDTH, hub_model, pictures


class Saliency(torch.nn.Module):
    """A backbone under a name of its own, with a decoder behind it."""

    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        self.backbone, self.decoder = backbone, torch.nn.Linear(WIDTH, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.backbone(pixel_values=images).last_hidden_state)


def converted(model: torch.nn.Module, folder: Path, side: int, *, folded: bool = True) -> Path:
    with warnings.catch_warnings(action="ignore"):  # of an exporter that traces, and is deprecated
        torch.onnx.export(
            model.eval(),
            (pictures(1, side, side),),
            folder / "a.onnx",
            dynamo=False,
            input_names=["images"],
            dynamic_axes={"images": {0: "batch"}},
            do_constant_folding=folded,
        )
    convert(str(folder / "a.onnx"), str(folder / "a.safetensors"))
    return folder / "a.safetensors"


@pytest.mark.parametrize(
    ("wrapped", "side", "gated", "folded"),
    [(True, 70, False, True), (False, SIDE, True, True), (False, SIDE, False, False)],
    ids=["nameless weights and positions", "the two halves of SwiGLU", "all names kept"],
)
def test_converted_weights_compute_the_same(
    wrapped: bool, side: int, gated: bool, folded: bool, tmp_path: Path
) -> None:
    backbone = hub_model(gated=gated)
    path = converted(Saliency(backbone) if wrapped else backbone, tmp_path, side, folded=folded)
    names = {tensor.name for tensor in onnx.load(tmp_path / "a.onnx").graph.initializer}
    assert folded != any(name.endswith("embeddings.position_embeddings") for name in names)
    with torch.inference_mode():
        expected = backbone(pixel_values=pictures()).last_hidden_state
        ours = vision_transformer(path).forward_features(pictures())
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_tensors_that_are_stored_once(tmp_path: Path) -> None:
    """In a model as it is initialised, all norms, all biases and all layer scales are equal."""
    backbone = Dinov2Model(Dinov2Config(**SIZES, num_attention_heads=2)).eval()
    loaded = vision_transformer(converted(backbone, tmp_path, SIDE))
    expected = backbone.encoder.layer[1].attention.v_proj.weight
    torch.testing.assert_close(loaded.blocks[1].attn.qkv.weight[2 * WIDTH :], expected)
    assert torch.equal(loaded.norm.weight, backbone.layernorm.weight)
