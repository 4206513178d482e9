"""Builders of the SDK's types: what an image chunk holds, how many tokens it counts, and the next-token shift."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import tinker
from PIL import Image
from tinker import types

from kshot.errors import ImageError, ModelError, RequestError, UnknownNameError
from kshot.images import MAX_RATIO, open_header, open_image
from vlm import nano
from vlm.inputs import ImageRule, datum, image_chunk, model_input


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def picture(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    return encoded(picture(), "JPEG", exif=exif)


UNUSUAL = {
    "alpha": encoded(picture("RGBA").rotate(30)),
    "grey with alpha": encoded(picture("LA").rotate(30)),
    "palette": encoded(picture("P")),
    "palette with a clear colour": encoded(picture("P"), "PNG", transparency=3),
    "black and white": encoded(picture("1")),
    "16 bit": encoded(Image.fromarray(np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64))),
    "CMYK": encoded(picture("CMYK"), "JPEG"),
    "on its side": turned(),
    "WebP": encoded(picture(), "WEBP", lossless=True),
    "GIF": encoded(picture("P"), "GIF"),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_images_become_plain_ones_with_the_same_pixels(kind: str, rule: ImageRule) -> None:
    data = UNUSUAL[kind]
    chunk = image_chunk(data, rule)
    with Image.open(io.BytesIO(chunk.data)) as plain:
        assert plain.mode == "RGB"
        assert plain.format.lower() == chunk.format == "png"
        assert (np.asarray(plain) == np.asarray(open_image(data))).all()
        assert chunk.expected_tokens == rule.tokens(plain.height, plain.width)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(("format", "name"), [("PNG", "png"), ("JPEG", "jpeg")])
def test_plain_images_travel_as_they_are(format: str, name: str, mode: str, rule: ImageRule) -> None:
    data = encoded(picture(mode), format)
    chunk = image_chunk(data, rule)
    assert (chunk.data, chunk.format) == (data, name)


@pytest.mark.parametrize(
    ("width", "height"), [(224, 224), (400, 300), (480, 321), (64, 64), (30, 200), (1, 1), (1, 200), (2000, 10)]
)
def test_expected_tokens_equal_what_the_stock_processor_makes(width: int, height: int, rule: ImageRule) -> None:
    made = rule.processor(images=[Image.new("RGB", (width, height))], return_tensors="pt")
    assert rule.tokens(height, width) == int(made["image_grid_thw"].prod()) // 4


@pytest.fixture(scope="module")
def real() -> ImageRule:
    """The rule of the published Qwen3-VL models."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    size = {"shortest_edge": 65536, "longest_edge": 16777216}
    return ImageRule(Qwen2VLImageProcessor(patch_size=16, merge_size=2, temporal_patch_size=2, size=size))


@pytest.mark.parametrize("short", [1, 3, 10])
def test_what_is_opened_is_what_the_real_processor_takes(short: int, real: ImageRule) -> None:
    for size in ((MAX_RATIO * short, short), (short, MAX_RATIO * short), (short, short)):
        made = real.processor(images=[open_image(encoded(Image.new("RGB", size)))], return_tensors="pt")
        assert real.tokens(size[1], size[0]) == int(made["image_grid_thw"].prod()) // 4 > 0
    with pytest.raises(ValueError, match="aspect ratio must be smaller than 200"):
        real.processor(images=[Image.new("RGB", (MAX_RATIO * short + 1, short))], return_tensors="pt")
    with pytest.raises(ImageError, match=f"{MAX_RATIO * short + 1}x{short} pixels is too narrow"):
        open_header(encoded(Image.new("RGB", (MAX_RATIO * short + 1, short))))


def test_expected_tokens_of_the_real_processor_settings(real: ImageRule) -> None:
    assert (real.tokens(224, 224), real.tokens(300, 400)) == (64, 108)  # as the hosted service counts them


@pytest.mark.parametrize("cut", [20, 60, 200, -40])
def test_broken_chunks_are_an_image_error_where_it_shows(cut: int, rule: ImageRule) -> None:
    """A truncated JPEG may be found out only when it is decoded; no other error may come out of either."""
    for data in (encoded(picture())[:cut], encoded(picture("L"))[:cut], turned()[:cut]):
        with pytest.raises(ImageError):
            open_image(image_chunk(data, rule).data)


def test_an_extreme_aspect_ratio_is_an_image_error(rule: ImageRule) -> None:
    with pytest.raises(ImageError, match="900x2"):
        image_chunk(encoded(Image.new("RGB", (900, 2))), rule)


def test_the_rule_of_an_unknown_model_says_the_choices() -> None:
    with pytest.raises(UnknownNameError, match=nano.NAME):
        ImageRule.from_pretrained("kshot/nano-qwen3")
    with pytest.raises(ModelError, match="nobody/no-such-model"):
        ImageRule.from_pretrained("nobody/no-such-model")


def test_next_token_shift_and_weights(make_image: Callable[..., bytes], rule: ImageRule) -> None:
    image = image_chunk(make_image(0), rule)
    assert image.expected_tokens == 16
    made = datum(model_input([11, 12], image, [13]), [21, 22, 23])
    assert made.model_input.chunks == [
        types.EncodedTextChunk(tokens=[11, 12]),
        image,
        types.EncodedTextChunk(tokens=[13]),
        types.EncodedTextChunk(tokens=[21, 22]),
    ]
    # positions: 11 12 | 16 of the image | 13 → 21, 21 → 22, 22 → 23
    assert made.loss_fn_inputs["target_tokens"].tolist() == [0] * 18 + [21, 22, 23]
    assert made.loss_fn_inputs["weights"].tolist() == [0.0] * 18 + [1.0] * 3
    assert made.model_input.length == 21


def test_an_answer_of_one_token_adds_nothing_to_the_input() -> None:
    made = datum(model_input([5, 6]), [7])
    assert made.model_input == tinker.ModelInput.from_ints([5, 6])
    assert made.loss_fn_inputs["target_tokens"].tolist() == [0, 7]


def test_a_datum_needs_a_prompt_and_an_answer() -> None:
    for parts in (([], [1]), ([1], [])):
        with pytest.raises(RequestError):
            datum(model_input(parts[0]), parts[1])
