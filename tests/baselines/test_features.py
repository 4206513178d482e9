"""The encoder against timm itself, the names it takes, the nano model as it is shipped, and the pixels it sees."""

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from small_dinov2 import nano_folder, timm_folder
from timm.models import VisionTransformer
from torchvision.transforms.functional import normalize, to_tensor

from baselines import nano
from baselines.backbone import READOUTS, _module, _source, check, load
from baselines.features import Encoder, PixelCache, resized, size_batches, whole_patches
from kshot.errors import ImageError, InputError, ModelError, UnknownNameError
from kshot.images import open_image


def test_features_are_timms_cls_tokens(images: list[bytes]) -> None:
    vit = timm.create_model(f"local-dir:{nano.HERE}", pretrained=True, dynamic_img_size=True).eval()
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
    assert first.shape == (3, encoder._backbone.dim)
    assert encoder.features([]).shape == (0, encoder._backbone.dim)
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
    assert [tuple(shape)[2:] for shape in seen] == [(64, 64), (64, 64), (48, 96), (80, 32), (32, 32), (32, 32)]
    with pytest.raises(InputError, match=r"size 44 is no multiple of 8"):
        Encoder(nano.NAME, size=44)


def blocks_by_hook(vit: VisionTransformer, pixels: torch.Tensor) -> list[torch.Tensor]:
    """(1, tokens, D) what each block gives, after the final norm."""
    outputs: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda *args: outputs.append(args[-1])) for block in vit.blocks]
    with torch.inference_mode():
        vit(pixels)
        normed = [vit.norm(output) for output in outputs]
    for hook in hooks:
        hook.remove()
    return normed


@pytest.mark.parametrize("readout", READOUTS)
def test_readouts_are_the_tokens_that_they_name(readout: str, images: list[bytes]) -> None:
    encoder, backbone = Encoder(nano.NAME, readout=readout), load(nano.NAME)
    for image, feature in zip(images, encoder.features(images), strict=True):
        states = blocks_by_hook(backbone.module, backbone.normalised([resized(image, 8)]))
        cls, mean = [state[0, 0] for state in states], states[-1][0, 1:].mean(dim=0)
        expected = {
            "cls": cls[-1:],
            "cls+mean": [cls[-1], mean],
            "last4": cls[-4:],
            "last4+mean": [*cls[-4:], mean],
        }[readout]
        assert feature.shape == (encoder._backbone.dim,)
        np.testing.assert_allclose(feature, torch.cat(expected).numpy(), rtol=1e-5, atol=1e-5)


def test_a_convolutional_network_has_timms_pooled_feature(images: list[bytes], tmp_path: Path) -> None:
    model, module = timm_folder(tmp_path, "resnet18", channels=(8, 8, 16, 16))
    encoder = Encoder(model, readout="pooled")
    features = encoder.features(images)
    assert features.shape == (4, encoder._backbone.dim)
    for image, feature in zip(images, features, strict=True):
        pixels = load(model, readout="pooled").normalised([resized(image, 32)])  # whole strides
        with torch.inference_mode():
            np.testing.assert_allclose(feature, module(pixels)[0].numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match="no CLS token after a final norm; use a DINOv2 model or readout pooled"):
        Encoder(model)


def test_a_model_with_registers_reads_behind_them(images: list[bytes], tmp_path: Path) -> None:
    shape = {"img_size": 56, "patch_size": 14, "embed_dim": 32, "depth": 4, "num_heads": 2, "reg_tokens": 4}
    model, module = timm_folder(tmp_path, "vit_small_patch14_reg4_dinov2", **shape)
    feature = Encoder(model, readout="cls+mean", size=56).features(images[:1])[0]
    with torch.inference_mode():
        tokens = module.forward_features(load(model).normalised([resized(images[0], 14, 56)]))[0]
    np.testing.assert_allclose(feature, torch.cat([tokens[0], tokens[5:].mean(dim=0)]).numpy(), rtol=1e-4, atol=1e-5)


def test_a_fixed_position_embedding_takes_its_own_size_alone(images: list[bytes], tmp_path: Path) -> None:
    model, _ = timm_folder(tmp_path, "beit_base_patch16_224", embed_dim=32, depth=1, num_heads=2)
    assert Encoder(model, readout="pooled", size=224).features(images[:1]).shape == (1, 32)
    with pytest.raises(InputError, match=r"fixed position embedding and takes 224x224 .* 448 pixels .* image size 224"):
        Encoder(model, readout="pooled", size=448)
    with pytest.raises(InputError, match=r"images of their own sizes were asked for; give image size 224"):
        Encoder(model, readout="pooled")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("vit_smal_patch14_dinov2",), "did you mean"),
        (("beit_base_patch16_224", "pooled", 518), "takes 224x224 pixels alone"),
        (("resnet18",), "no CLS token"),
        (("vit_small_patch14_dinov2.lvd142m", "cls", 512), "no multiple of 14"),
        (("nowhere.pth",), "nowhere.pth"),
        (("beit3_giant_patch14_224",), "no weights of model 'beit3_giant"),
    ],
)
def test_what_can_be_known_before_a_start(given: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check(*given)


@pytest.mark.parametrize(
    ("config", "readout", "message"),
    [
        ("{", "cls", "must be of one architecture"),
        ("[]", "cls", "must be of one architecture"),
        ('{"architecture": "vit_giant_patch15"}', "cls", "must be of one architecture"),
        ({"no": 1}, "cls", "must be of one architecture"),
        ({"depth": 3}, "last4", "has 3 blocks, readout last4 takes 4"),
    ],
)
def test_a_folder_that_cannot_be_used_is_found_before_a_start(
    config: str | dict[str, int], readout: str, message: str, tmp_path: Path
) -> None:
    """config: the text of config.json, or arguments of a DINOv2."""
    known = {"architecture": "vit_small_patch14_dinov2", "model_args": config, "pretrained_cfg": {}}
    shutil.copy(nano.HERE / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(known))
    with pytest.raises(ModelError, match=message) as caught:
        check(str(tmp_path), readout)
    assert "\n" not in str(caught.value)


def test_what_can_be_used_is_found_without_weights() -> None:
    for name, readout, size in (
        ("vit_base_patch14_dinov2.lvd142m", "last4", 518),
        ("vit_base_patch14_dinov2", "cls", None),
        ("swin_tiny_patch4_window7_224", "pooled", 224),
        (nano.NAME, "cls+mean", 64),
        ("hf-hub:somebody/something", "cls", 1),  # only the hub knows
    ):
        check(name, readout, size)


def test_pixels_decoded_ahead_come_in_order(images: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU is fed, with windows of two images, on a CPU."""
    expected = Encoder(nano.NAME).features(images * 2)
    encoder = Encoder(nano.NAME)
    monkeypatch.setattr("baselines.features.GPU_BATCH", 2)
    monkeypatch.setattr("baselines.features.WINDOW", 1)
    encoder._cpu = False
    np.testing.assert_allclose(encoder.features(images * 2), expected, rtol=1e-4, atol=1e-5)


def test_loading_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    _module.__wrapped__(_source(nano.NAME), "cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_folder_loads_with_and_without_prefix() -> None:
    assert load(str(nano.HERE)).module is load(f"local-dir:{nano.HERE}").module is load(nano.NAME).module


def test_unknown_name_lists_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean 'vit_small_patch14_dinov2\.lvd142m'") as caught:
        Encoder("vit_smal_patch14_dinov2.lvd142m")
    assert len(str(caught.value)) < 400
    with pytest.raises(UnknownNameError, match=nano.NAME):
        Encoder("kshot/nano-dino")
    with pytest.raises(UnknownNameError, match="resnet18"):
        Encoder("resnet-18")
    with pytest.raises(UnknownNameError, match="dinov2"):
        Encoder("???")
    with pytest.raises(UnknownNameError, match=r"readout 'last3'.*did you mean 'last4'"):
        Encoder(nano.NAME, readout="last3")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_incomplete_folder(missing: str, tmp_path: Path) -> None:
    folder = nano_folder(tmp_path / "model")
    (folder / missing).unlink()
    with pytest.raises(ModelError, match=f"has no {missing}"):
        Encoder(f"local-dir:{folder}")


def test_weights_of_another_architecture(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"must be of one architecture") as caught:
        Encoder(str(nano_folder(tmp_path / "model", embed_dim=64)))
    assert "\n" not in str(caught.value)


def test_a_model_without_cls_token_is_refused(tmp_path: Path) -> None:
    shape = {"img_size": 56, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model, _ = timm_folder(tmp_path, "vit_small_patch14_dinov2", global_pool="avg", fc_norm=True, **shape)
    with pytest.raises(ModelError, match="no CLS token after a final norm"):
        Encoder(model)


def test_offline_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"vit_small_patch14_dinov2.*go online once, or give a local folder") as caught:
        Encoder("vit_small_patch14_dinov2.lvd142m")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "gpu", "cpu:0", "cuda:99"])
def test_missing_device(device: str) -> None:
    with pytest.raises(InputError, match="use device 'cpu'"):
        Encoder(nano.NAME, device=device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_agrees_with_cpu(images: list[bytes]) -> None:
    on_gpu = Encoder(nano.NAME, device="cuda").features(images)
    # its convolutions are in TF32 unless told otherwise
    np.testing.assert_allclose(on_gpu, Encoder(nano.NAME).features(images), rtol=5e-3, atol=5e-3)


def test_the_weights_in_the_file_are_those_that_timm_computes_with() -> None:
    vit = timm.create_model(f"local-dir:{nano.HERE}", pretrained=True)
    assert vit.forward_features(torch.zeros(1, 3, 64, 64)).shape == (1, 1 + 64, 128)
    with safe_open(nano.HERE / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    assert stored.keys() == vit.state_dict().keys()
    assert all(torch.equal(vit.state_dict()[name], tensor) for name, tensor in stored.items())


def test_the_nano_models_revision_and_size() -> None:
    weights = (nano.HERE / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest()[:12] == nano.REVISION
    assert len(weights) <= 8 * 2**20


def test_missing_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nano, "HERE", tmp_path)
    with pytest.raises(ModelError, match=r"has no config\.json; install kshot again"):
        load(nano.NAME)


@pytest.mark.parametrize(
    ("side", "patch", "expected"), [(64, 14, 70), (60, 14, 56), (63, 14, 70), (62, 14, 56), (3, 14, 14), (518, 14, 518)]
)
def test_whole_patches(side: int, patch: int, expected: int) -> None:
    assert whole_patches(side, patch) == expected


def test_the_whole_image_is_seen(make_image: Callable[..., bytes]) -> None:
    """The far edges survive: a crop would lose the marks there."""
    picture = np.zeros((50, 90, 3), np.uint8)
    picture[:, :6], picture[:, -6:], picture[:6], picture[-6:] = 255, 255, 255, 255
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    pixels = resized(stream.getvalue(), 16)
    assert pixels.shape == (48, 96, 3)
    assert min(pixels[:, 0].min(), pixels[:, -1].min(), pixels[0].min(), pixels[-1].min()) > 250
    assert resized(stream.getvalue(), 16, 64).shape == (64, 64, 3)


def test_an_image_of_whole_patches_is_not_resampled(make_image: Callable[..., bytes]) -> None:
    image = make_image(0, 48, 64)
    np.testing.assert_array_equal(resized(image, 16), np.asarray(open_image(image)))


@pytest.mark.parametrize("cut", [0, 7, 300])
def test_broken_bytes(cut: int, make_image: Callable[..., bytes]) -> None:
    with pytest.raises(ImageError, match=r"^image: "):
        resized(make_image(0)[:cut], 16)


def test_size_batches() -> None:
    shapes = [(2, 3), (3, 2), (2, 3)]
    arrays = [np.empty(shape) for shape in shapes]
    assert size_batches(arrays, 2) == [[0, 2], [1]]
    assert size_batches(arrays, 1) == [[0], [2], [1]]


def test_cache_keeps_until_full(make_image: Callable[..., bytes]) -> None:
    first, second = make_image(0), make_image(1)
    cache = PixelCache(16, limit=64 * 64 * 3)
    assert cache(first) is cache(first)
    assert cache(second) is not cache(second)
    np.testing.assert_array_equal(cache(second), resized(second, 16))
