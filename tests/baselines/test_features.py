"""The encoder against timm itself, and the names it takes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import VisionTransformer
from torchvision.transforms.functional import normalize, to_tensor

from baselines import nano
from baselines.backbone import _load, load
from baselines.features import Encoder
from kshot_errors import ImageError, InputError, ModelError, UnknownNameError
from kshot_images import open_image


@pytest.fixture
def images(make_image: Callable[..., bytes]) -> list[bytes]:
    return [make_image(seed, *size) for seed, size in enumerate([(64, 64), (96, 48), (64, 64), (32, 80)])]


def test_features_are_timms_cls_tokens(images: list[bytes]) -> None:
    vit = timm.create_model(f"local-dir:{nano.folder()}", pretrained=True, dynamic_img_size=True).eval()
    features = Encoder(nano.NAME).features(images)
    for image, feature in zip(images, features, strict=True):
        pixels = normalize(to_tensor(open_image(image)), vit.pretrained_cfg["mean"], vit.pretrained_cfg["std"])
        with torch.inference_mode():
            expected = vit.forward_features(pixels[None])[0, 0].numpy()
        np.testing.assert_allclose(feature, expected, rtol=1e-5, atol=1e-5)


def test_features_depend_on_the_image_alone(images: list[bytes]) -> None:
    together = Encoder(nano.NAME).features(images)
    for image, feature in zip(images, together, strict=True):
        np.testing.assert_array_equal(Encoder(nano.NAME).features([image])[0], feature)


def test_shapes_and_memory(images: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(nano.NAME)
    first = encoder.features([images[0], images[1], images[0]])
    assert first.dtype == np.float32
    assert first.shape == (3, encoder.dim)
    assert encoder.features([]).shape == (0, encoder.dim)
    monkeypatch.setattr("baselines.features.resized", None)
    np.testing.assert_array_equal(encoder.features(images[:2]), first[:2])


def test_size_makes_squares(images: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = VisionTransformer.forward_features
    monkeypatch.setattr(
        VisionTransformer, "forward_features", lambda self, x, **more: seen.append(x.shape) or original(self, x, **more)
    )
    Encoder(nano.NAME).features(images)
    Encoder(nano.NAME, size=32).features(images[:2])
    assert [tuple(shape)[2:] for shape in seen] == [(64, 64), (48, 96), (64, 64), (80, 32), (32, 32), (32, 32)]
    with pytest.raises(InputError, match=r"size 44 .* multiple of 8"):
        Encoder(nano.NAME, size=44)


def test_broken_image_is_named() -> None:
    with pytest.raises(ImageError):
        Encoder(nano.NAME).features([b"no image"])


def test_loading_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    _load.__wrapped__(f"local-dir:{nano.folder()}", "cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_folder_loads_with_and_without_prefix() -> None:
    assert load(str(nano.folder())) is load(f"local-dir:{nano.folder()}") is load(nano.NAME)


def test_unknown_name_lists_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean 'vit_small_patch14_dinov2\.lvd142m'") as caught:
        Encoder("vit_smal_patch14_dinov2.lvd142m")
    assert len(str(caught.value)) < 400
    with pytest.raises(UnknownNameError, match=nano.NAME):
        Encoder("kshot/nano-dino")
    with pytest.raises(UnknownNameError, match="dinov2"):
        Encoder("resnet18")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_incomplete_folder(missing: str, tmp_path: Path) -> None:
    folder = shutil.copytree(nano.folder(), tmp_path / "model")
    (folder / missing).unlink()
    with pytest.raises(ModelError, match=f"has no {missing}"):
        Encoder(f"local-dir:{folder}")


def test_weights_of_another_architecture(tmp_path: Path) -> None:
    folder = shutil.copytree(nano.folder(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["embed_dim"] = 64
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"must be of one architecture") as caught:
        Encoder(str(folder))
    assert "\n" not in str(caught.value)


def test_a_model_without_cls_token_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(nano.folder(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["model_args"] |= {"global_pool": "avg", "fc_norm": True}
    vit = timm.create_model(config["architecture"], num_classes=0, **config["model_args"])
    (folder / "config.json").write_text(json.dumps(config))
    save_file(vit.state_dict(), folder / "model.safetensors")
    with pytest.raises(ModelError, match="no CLS token after a final norm"):
        Encoder(str(folder))


def test_offline_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"vit_small_patch14_dinov2.*go online once, or give a local folder") as caught:
        Encoder("vit_small_patch14_dinov2.lvd142m")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "gpu"])
def test_missing_device(device: str) -> None:
    with pytest.raises(InputError, match="use device 'cpu'"):
        Encoder(nano.NAME, device=device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_agrees_with_cpu(images: list[bytes]) -> None:
    on_gpu = Encoder(nano.NAME, device="cuda").features(images)
    np.testing.assert_allclose(on_gpu, Encoder(nano.NAME).features(images), rtol=1e-3, atol=1e-3)
