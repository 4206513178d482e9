"""Images as they come from the world: every mode, every orientation, and what is no image at all."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data.dataset import Example, content_key
from data.preparation import SpooledBytes, decode, prepare, prepare_all
from kshot.errors import ImageError, InputError
from kshot.images import open_image


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def scene(width: int = 40, height: int = 24) -> Image.Image:
    """No symmetry: red to the right, green downwards, one blue corner."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    pixels[: height // 3, : width // 3, 2] = 255
    return Image.fromarray(pixels)


def difference(one: Image.Image, other: Image.Image) -> float:
    assert one.size == other.size
    return float(np.abs(np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).mean())


def test_transparency_is_white() -> None:
    image = scene().convert("RGBA")
    image.putpixel((5, 5), (255, 0, 0, 0))
    image.putpixel((6, 5), (0, 0, 0, 128))
    opened = open_image(encode(image, "PNG"))
    assert opened.mode == "RGB"
    assert opened.getpixel((5, 5)) == (255, 255, 255)
    assert opened.getpixel((6, 5)) == (127, 127, 127)
    assert opened.getpixel((20, 20)) == scene().getpixel((20, 20))


@pytest.mark.parametrize("alpha", [0, bytes([0, 255, 255])], ids=["one index", "a table"])
def test_a_palette_with_transparency(alpha: object) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 10, 20, 1, 2, 3])
    image.putpixel((0, 0), 0)
    opened = open_image(encode(image, "PNG", transparency=alpha))
    assert (opened.getpixel((0, 0)), opened.getpixel((1, 1))) == ((255, 255, 255), (200, 10, 20))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P"])
def test_grey_and_palette(mode: str) -> None:
    image = scene().convert("L").convert(mode)
    assert difference(open_image(encode(image, "PNG")), image.convert("RGB")) == 0


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled_not_clipped(kind: str) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    opened = open_image(encode(Image.fromarray(ramp), kind))
    assert np.array_equal(np.asarray(opened)[..., 0].ravel(), np.arange(256))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind: str) -> None:
    opened = open_image(encode(scene(160, 96).convert("CMYK"), kind))
    assert difference(opened, scene(160, 96)) < 4


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    opened = open_image(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert opened.getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_comes_out_upright(orientation: int) -> None:
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # stored turned left, shown turned right
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = scene().transpose(turns[orientation]) if orientation in turns else scene()
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert difference(open_image(encode(stored, "PNG", exif=exif)), scene()) == 0
    jpeg = encode(stored, "JPEG", exif=exif, quality=95, subsampling=0)
    assert difference(Image.open(io.BytesIO(prepare(jpeg))), scene()) < 8
    assert 0x0112 not in Image.open(io.BytesIO(prepare(jpeg))).getexif()


def chunk(kind: bytes, body: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def bomb(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0" * 99)) + chunk(b"IEND", b"")
    )


def jpeg_bomb(width: int, height: int) -> bytes:
    """The header of a JPEG says so; there is nothing behind it."""
    small = encode(scene(40, 24), "JPEG")
    return small.replace(struct.pack(">HH", 24, 40), struct.pack(">HH", height, width), 1)


NO_IMAGES = {
    "empty": (b"", "file is empty"),
    "text": (b"a letter, not a picture", "not an image"),
    "short jpeg": (encode(scene(400, 300), "JPEG")[:3000], "broken image"),
    "short large jpeg": (encode(scene(4000, 3000), "JPEG")[:30_000], "broken image"),
    "short png": (encode(scene(400, 300), "PNG")[:900], "broken image"),
    "header": (encode(scene(), "JPEG")[:20], "not an image|broken image"),
    "large": (bomb(10_000, 10_000), "more than 89,478,485 pixels"),
    "bomb": (bomb(100_000, 100_000), "more than 89,478,485 pixels"),
    "jpeg bomb": (jpeg_bomb(30_000, 20_000), "more than 89,478,485 pixels"),
    "float": (encode(Image.new("F", (4, 4)), "TIFF"), "floating-point"),
    "strip": (encode(Image.new("RGB", (2001, 10)), "PNG"), "2001x10 pixels is too narrow"),
    "high strip": (encode(Image.new("RGB", (1, 201)), "JPEG"), "1x201 pixels is too narrow"),
}


@pytest.mark.parametrize("what", NO_IMAGES)
def test_what_is_no_image(what: str) -> None:
    data, reason = NO_IMAGES[what]
    with pytest.raises(ImageError, match=f"^cat/7.jpg: .*({reason})") as caught:
        prepare(data, name="cat/7.jpg")
    assert "\n" not in str(caught.value)


def test_our_limit_holds_where_pillow_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageError, match="100000x100000 is more than"):
        open_image(bomb(100_000, 100_000))


@given(st.binary(max_size=200), st.sampled_from([b"", encode(scene(), "PNG")[:60], encode(scene(), "GIF")[:30]]))
def test_no_bytes_raise_anything_else(data: bytes, head: bytes) -> None:
    try:
        opened = open_image(head + data)
    except ImageError:
        return
    assert opened.mode == "RGB"


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 60))
def test_the_longest_side(width: int, height: int, max_side: int) -> None:
    prepared = open_image(prepare(encode(scene(width, height), "PNG"), max_side=max_side))
    longest = max(width, height)
    if longest <= max_side:
        assert prepared.size == (width, height)
    else:
        assert prepared.size == tuple(max(1, side * max_side // longest) for side in (width, height))


@pytest.mark.parametrize(
    ("size", "prepared"),
    [
        ((1000, 6), (480, 3)),  # by the reference recipe 480x2, which Qwen does not take
        ((6, 1000), (3, 480)),
        ((2000, 10), (480, 3)),
        ((1000, 7), (480, 3)),  # by the reference recipe too
        ((1000, 9), (480, 4)),
        ((480, 3), (480, 3)),
        ((200, 1), (200, 1)),
        ((1, 1), (1, 1)),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_strip_is_not_made_too_narrow(size: tuple[int, int], prepared: tuple[int, int], kind: str) -> None:
    assert open_image(prepare(encode(Image.new("RGB", size), kind))).size == prepared


def test_prepare_is_the_reference_rule() -> None:
    photo = scene(1000, 707)
    expected = encode(photo.resize((480, 339), Image.Resampling.LANCZOS), "JPEG")
    assert prepare(encode(photo, "PNG")) == expected


UNUSUAL = {
    "cmyk jpeg": encode(scene(400, 240).convert("CMYK"), "JPEG"),
    "16 bits": encode(Image.fromarray(np.arange(60_000, dtype=np.uint16).reshape(200, 300)), "PNG"),
    "palette": encode(scene(200, 120).convert("P"), "PNG", transparency=3),
    "animated gif": encode(scene(), "GIF", save_all=True, append_images=[Image.new("RGB", (40, 24))]),
    "animated webp": encode(scene(), "WEBP", save_all=True, append_images=[Image.new("RGB", (40, 24))]),
    "animated png": encode(scene(), "PNG", save_all=True, append_images=[Image.new("RGB", (40, 24))]),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_images_are_prepared_as_they_are_opened(kind: str) -> None:
    opened = open_image(UNUSUAL[kind])
    size = (20, 20 * opened.height // opened.width)
    expected = encode(opened.resize(size, Image.Resampling.LANCZOS), "JPEG")
    assert prepare(UNUSUAL[kind], max_side=20) == expected


def photograph(name: str) -> Image.Image:
    """A natural photograph of 640x427 that scikit-learn brings along."""
    datasets = pytest.importorskip("sklearn.datasets")
    with Image.open(Path(datasets.__file__).parent / "images" / f"{name}.jpg") as image:
        return image.convert("RGB")


def plain(data: bytes, max_side: int) -> Image.Image:
    """The reference recipe: all of the image is decoded."""
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    size = tuple(side * max_side // max(upright.size) for side in upright.size)
    return upright.resize(size, Image.Resampling.LANCZOS)


def psnr(one: Image.Image, other: Image.Image) -> float:
    error = np.asarray(one, dtype=float) - np.asarray(other, dtype=float)
    return float(10 * np.log10(255**2 / (error**2).mean()))


@pytest.mark.parametrize("name", ["china", "flower"])
@pytest.mark.parametrize("max_side", [160, 92, 80, 40])  # decoded at 1/2, 1/2, 1/4 and 1/8
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=str)
def test_a_jpeg_decoded_small_is_close_to_the_reference(name: str, max_side: int, options: dict[str, object]) -> None:
    for size in ((640, 427), (643, 431)):  # the second in no way a multiple of 8
        data = encode(photograph(name).resize(size), "JPEG", quality=90, **options)
        small, full = decode(data, max_side=max_side), plain(data, max_side)
        assert 0 < difference(small, full) < 1.2
        assert psnr(small, full) > 43


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_decoded_small_is_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photograph("flower").crop((0, 0, 637, 421)), "JPEG", quality=90, exif=exif)
    assert 0 < difference(decode(data, max_side=80), plain(data, 80)) < 1


@pytest.mark.parametrize(("mode", "kind"), [("L", "JPEG"), ("RGB", "MPO")])
def test_grey_and_stereo_jpegs_are_decoded_small_too(mode: str, kind: str) -> None:
    image = photograph("flower").convert(mode)
    options = {"save_all": True, "append_images": [ImageOps.mirror(image)]} if kind == "MPO" else {}
    data = encode(image, kind, quality=90, **options)
    assert 0 < difference(decode(data, max_side=80), plain(data, 80)) < 1


@pytest.mark.parametrize(
    ("kind", "mode", "max_side"), [("JPEG", "RGB", 161), ("JPEG", "RGB", 480), ("JPEG", "CMYK", 40), ("PNG", "RGB", 40)]
)
def test_what_is_not_decoded_small_is_exact(kind: str, mode: str, max_side: int) -> None:
    data = encode(photograph("china").convert(mode), kind)
    assert prepare(data, max_side=max_side) == encode(plain(data, max_side), "JPEG")


def test_a_thin_jpeg() -> None:
    for height in range(10, 20):
        assert decode(encode(scene(2000, height), "JPEG"), max_side=100).size == (100, 1)


@pytest.mark.parametrize("hflip", [True, False])
def test_prepare_all(hflip: bool) -> None:
    images = [encode(scene(20 + i, 30), "PNG") for i in range(12)]
    examples = [Example(content_key(image), image, i % 3) for i, image in enumerate(images)]
    prepared = prepare_all(examples, max_side=24, hflip=hflip)
    assert [(e.key, e.label) for e in prepared] == [(e.key, e.label) for e in examples]
    for before, after in zip(examples, prepared, strict=True):
        assert isinstance(after.stored, SpooledBytes)
        assert isinstance(after.stored_mirrored, SpooledBytes if hflip else type(None))
        assert after.image == prepare(before.image, max_side=24)
        assert after.mirrored == (encode(ImageOps.mirror(plain(before.image, 24)), "JPEG") if hflip else None)


def test_prepare_all_names_the_broken_image() -> None:
    key = content_key(b"text")
    with pytest.raises(ImageError, match=f"image {key[:12]}"):
        prepare_all([Example(key, b"text", 0)], hflip=False)


def test_max_side_below_one() -> None:
    with pytest.raises(InputError, match="not 0"):
        prepare(encode(scene(), "PNG"), max_side=0)
