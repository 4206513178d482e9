"""DINOv2 from .onnx files as torch's exporter writes them, against the models that were exported."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from small_dinov2 import SIDE, SIZES, WIDTH, error_of, hub_model, pictures, randomised
from timm.models import VisionTransformer
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model, PreTrainedModel

from baselines.weights import vision_transformer
from kshot.errors import ModelError

BLOCK = "backbone.encoder.layer.1"


class Saliency(torch.nn.Module):
    """A backbone under a name of its own, with a decoder behind it."""

    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        self.backbone, self.decoder = backbone, torch.nn.Linear(WIDTH, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.backbone(pixel_values=images).last_hidden_state)


def exported(model: torch.nn.Module, path: Path, height: int, *, folded: bool = True) -> ModelProto:
    images = pictures(1, height, height)
    with warnings.catch_warnings(action="ignore"):  # of an exporter that traces, and is deprecated
        torch.onnx.export(
            model.eval(),
            (images,),
            path,
            dynamo=False,
            input_names=["images"],
            dynamic_axes={"images": {0: "batch"}},
            do_constant_folding=folded,
        )
    return onnx.load(path)


@pytest.fixture(scope="module")
def backbone() -> PreTrainedModel:
    return hub_model()


@pytest.fixture(scope="module")
def original(backbone: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> ModelProto:
    """An export for images of 70 pixels; the position embeddings are of 56."""
    return exported(Saliency(backbone), tmp_path_factory.mktemp("onnx") / "a.onnx", 70)


@pytest.fixture
def model(original: ModelProto) -> ModelProto:
    copied = ModelProto()
    copied.CopyFrom(original)
    return copied


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.onnx"


def stored(model: ModelProto) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def reader(model: ModelProto, name: str) -> NodeProto:
    (node,) = (node for node in model.graph.node if name in node.input)
    return node


def renamed(model: ModelProto, names: dict[str, str]) -> None:
    for tensor in model.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]


def assert_equal_outputs(path: Path, expected: Tensor) -> None:
    with torch.inference_mode():
        torch.testing.assert_close(
            vision_transformer(path).forward_features(pictures()), expected, rtol=1e-5, atol=1e-5
        )


def tokens_of(backbone: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        return backbone(pixel_values=pictures()).last_hidden_state


def test_weights_without_names_are_found(model: ModelProto, backbone: PreTrainedModel, path: Path) -> None:
    names = stored(model).keys()
    assert "backbone.embeddings.position_embeddings" not in names
    assert not [name for name in names if name.startswith("backbone.encoder") and name.endswith("_proj.weight")]
    assert "decoder.bias" in names
    onnx.save(model, path)
    assert_equal_outputs(path, tokens_of(backbone))
    assert vision_transformer(path).patch_embed.img_size == (SIDE, SIDE)


def test_the_two_halves_of_swiglu(path: Path) -> None:
    backbone = hub_model(gated=True)
    assert "encoder.layer.0.mlp.gate_proj.bias" in stored(exported(backbone, path, SIDE))
    assert_equal_outputs(path, tokens_of(backbone))


def test_an_export_that_keeps_all_names(backbone: PreTrainedModel, path: Path) -> None:
    assert "embeddings.position_embeddings" in stored(exported(backbone, path, SIDE, folded=False))
    assert_equal_outputs(path, tokens_of(backbone))


def test_tensors_that_are_stored_once(path: Path) -> None:
    """In a model as it is initialised, all norms, all biases and all layer scales are equal."""
    backbone = Dinov2Model(Dinov2Config(**SIZES, num_attention_heads=2)).eval()
    model = exported(backbone, path, SIDE)
    assert "layernorm.weight" in [
        name for node in model.graph.node if node.op_type == "Identity" for name in node.output
    ]
    expected = backbone.encoder.layer[1].attention.v_proj.weight
    loaded = vision_transformer(path)
    torch.testing.assert_close(loaded.blocks[1].attn.qkv.weight[2 * WIDTH :], expected)
    assert torch.equal(loaded.norm.weight, backbone.layernorm.weight)


@pytest.mark.parametrize("nameless", [False, True])
def test_registers_and_tokens_without_names(nameless: bool, path: Path) -> None:
    """Nameless as in exports of a fixed batch size: the tokens are expanded before, and the copies stored."""
    vit = VisionTransformer(
        SIDE, 14, num_classes=0, embed_dim=WIDTH, depth=2, num_heads=2, init_values=1.0, reg_tokens=3
    )
    vit.no_embed_class, vit.pos_embed = True, torch.nn.Parameter(torch.zeros(1, (SIDE // 14) ** 2, WIDTH))
    model = exported(randomised(vit), path, SIDE)
    tokens = {"cls_token": "expand", "reg_token": "expand_1", "pos_embed": "view_1"}
    if nameless:
        for name in ("cls_token", "reg_token"):
            expand = reader(model, name)
            reader(model, expand.output[0]).input[:] = [
                name if value == expand.output[0] else value for value in reader(model, expand.output[0]).input
            ]
            model.graph.node.remove(expand)
        renamed(model, tokens)
        onnx.save(model, path)
    assert not nameless or not tokens.keys() & stored(model).keys()
    with torch.inference_mode():
        assert_equal_outputs(path, vit.forward_features(pictures()))


def test_position_embeddings_stored_as_an_image(model: ModelProto, backbone: PreTrainedModel, path: Path) -> None:
    """As an exporter leaves them that also computes the reshape and the transpose beforehand."""
    grid = backbone.embeddings.position_embeddings[0, 1:].detach().reshape(SIDE // 14, SIDE // 14, WIDTH)
    (resize,) = (node for node in model.graph.node if node.op_type == "Resize")
    resize.input[0] = "image"
    model.graph.initializer.append(numpy_helper.from_array(grid.permute(2, 0, 1)[None].numpy(), "image"))
    onnx.save(model, path)
    assert_equal_outputs(path, tokens_of(backbone))


def test_half_precision(model: ModelProto, backbone: PreTrainedModel, path: Path) -> None:
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    onnx.save(model, path)
    weight = backbone.encoder.layer[0].mlp.fc1.weight
    assert torch.equal(vision_transformer(path).blocks[0].mlp.fc1.weight, weight.half().float())


def test_external_data_beside_the_file(model: ModelProto, backbone: PreTrainedModel, path: Path) -> None:
    onnx.save(model, path, save_as_external_data=True, location="a.data", size_threshold=0)
    assert_equal_outputs(path, tokens_of(backbone))


@pytest.mark.parametrize("absolute", [False, True])
def test_external_data_is_read_from_nowhere_else(absolute: bool, model: ModelProto, tmp_path: Path) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    onnx.save(model, folder / "a.onnx", save_as_external_data=True, location="a.data", size_threshold=0)
    outside = (folder / "a.data").rename(tmp_path / "a.data")
    leading = onnx.load(folder / "a.onnx", load_external_data=False)
    for tensor in leading.graph.initializer:
        (location,) = (entry for entry in tensor.external_data if entry.key == "location")
        location.value = str(outside) if absolute else "../a.data"
    (folder / "a.onnx").write_bytes(leading.SerializeToString())
    assert "cannot be read" in error_of(folder / "a.onnx")


def cut(model: ModelProto) -> None:
    """Without the bias of a query nothing tells which product is its."""
    bias = f"{BLOCK}.attention.q_proj.bias"
    model.graph.initializer.remove(stored(model)[bias])


def ambiguous(model: ModelProto) -> None:
    """Two products to which the same bias is added."""
    renamed(model, {f"{BLOCK}.attention.q_proj.bias": f"{BLOCK}.attention.k_proj.bias"})


def quantised(model: ModelProto) -> None:
    tensor = stored(model)[f"{BLOCK}.norm1.weight"]
    tensor.CopyFrom(numpy_helper.from_array(np.ones(WIDTH, dtype=np.int8), tensor.name))


def of_another_kind(model: ModelProto) -> None:
    renamed(model, {"backbone.embeddings.patch_embeddings.projection.weight": "conv1.weight"})


def endless(model: ModelProto) -> None:
    """Position embeddings that are computed from each other."""
    reshape = next(node for node in model.graph.node if node.op_type == "Resize")
    reshape.input[0] = reshape.output[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, rf"2 missing \({BLOCK}.attention.q_proj.bias, {BLOCK}.attention.q_proj.weight\)"),
        (ambiguous, rf"3 missing \({BLOCK}.attention.k_proj.weight, {BLOCK}.attention.q_proj.bias, "),
        (quantised, rf"has {BLOCK}.norm1.weight in INT8; give the model before it was quantised"),
        (of_another_kind, "has no tensors of a DINOv2 backbone"),
        (endless, "has no backbone.embeddings.position_embeddings"),
    ],
)
def test_what_cannot_be_found(
    change: Callable[[ModelProto], None], message: str, model: ModelProto, path: Path
) -> None:
    change(model)
    onnx.save(model, path)
    with pytest.raises(ModelError, match=message):
        vision_transformer(path)


def test_a_damaged_file(path: Path) -> None:
    path.write_bytes(b"not a model")
    assert "cannot be read" in error_of(path)


def test_without_onnx(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "needs the package onnx; run in kshot's checkout: pip install -e '.[onnx]'" in error_of(path)
