"""What an image file holds beside its pixels: its orientation is read, the rest harms nothing and says nothing."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from data.preparation import prepare
from kshot.images import open_image
from tests.data.test_image_preparation import chunk, difference, encode, plain, scene
from tests.traced import traced

PIXELS = encode(scene(), "PNG")
STORED = scene().transpose(Image.Transpose.ROTATE_90)  # by a camera on its side: orientation 6
TURNED = encode(STORED, "PNG")
ORIENTATION = (0x0112, 3, 1, struct.pack("<HH", 6, 0))
LONG = zlib.compress(bytes(2 << 20))
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def with_chunk(added: bytes, image: bytes = PIXELS, *, last: bool = False) -> bytes:
    """A PNG with a chunk before or behind its pixels."""
    place = len(image) - 12 if last else 33
    return image[:place] + added + image[place:]


def with_segment(marker: int, body: bytes, image: bytes) -> bytes:
    """A JPEG with one more segment, the first."""
    return image[:2] + struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body + image[2:]


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """(tag, type, count, value or its place in four bytes) each, in the order given."""
    packed = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3][:4].ljust(4, b"\0") for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + struct.pack("<Iii", 0, -1, 0)


def jpeg(image: Image.Image, **options: object) -> bytes:
    return encode(image, "JPEG", quality=95, subsampling=0, **options)


HEX = b"\nexif\n44\n" + exif(ORIENTATION).hex().encode()

BAD_CHUNKS = {
    "zTXt": chunk(b"zTXt", b"workflow\0\0" + LONG),
    "iTXt": chunk(b"iTXt", b"workflow\0\1\0\0\0" + LONG),
    "XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG),
    "iCCP": chunk(b"iCCP", b"profile\0\0" + LONG),
    "many texts": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(1 << 20))) * 70,
    "unknown compression": chunk(b"zTXt", b"workflow\0\7..."),
    "wrong checksum": chunk(b"tEXt", b"a\0b")[:-4] + bytes(4),
    "too short": chunk(b"gAMA", b"\0") + chunk(b"pHYs", b"\0") + chunk(b"acTL", b"\0"),
    "no animation": chunk(b"acTL", bytes(8)),
}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", BAD_CHUNKS)
def test_metadata_of_a_png_harms_no_image(kind: str, last: bool) -> None:
    assert difference(open_image(with_chunk(BAD_CHUNKS[kind], last=last)), scene()) == 0


@pytest.mark.parametrize("name", [b"XML:com.adobe.xmp", b"Raw profile type exif", b"other"])
def test_no_text_is_inflated_without_bound(name: bytes) -> None:
    data = with_chunk(chunk(b"zTXt", name + b"\0\0" + zlib.compress(bytes(64 << 20))) * 20)
    with traced(8 << 20):
        open_image(data)


ORIENTED = {
    "eXIf": with_chunk(chunk(b"eXIf", exif(ORIENTATION)), TURNED),
    "eXIf at the end": with_chunk(chunk(b"eXIf", exif(ORIENTATION)), TURNED, last=True),
    "a profile in hex": with_chunk(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(HEX)), TURNED),
    "XMP in a PNG": with_chunk(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP), TURNED),
    "compressed XMP": with_chunk(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP)), TURNED),
    "TIFF": encode(STORED, "TIFF", tiffinfo={0x0112: 6}),
    "packed TIFF": encode(STORED, "TIFF", tiffinfo={0x0112: 6}, compression="tiff_lzw"),
    "WebP": encode(STORED, "WEBP", lossless=True, exif=exif(ORIENTATION)),
    "AVIF": encode(STORED, "AVIF", quality=100, exif=exif(ORIENTATION)),
    "XMP in a JPEG": with_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP, jpeg(STORED)),
}


@pytest.mark.parametrize("place", ORIENTED)
def test_the_orientation_is_read_wherever_it_stands(place: str) -> None:
    with Image.open(io.BytesIO(ORIENTED[place])) as image:  # how Pillow turns what it can read
        expected = ImageOps.exif_transpose(image).convert("RGB")
    assert difference(expected, scene()) < 4
    assert difference(open_image(ORIENTED[place]), expected) == 0


BAD_TAGS = {  # beside the orientation, each in the order of numbers
    "negative rational": exif(ORIENTATION, (0x011A, 10, 1, struct.pack("<I", 38))),
    "place outside": exif((0x010F, 2, 100, struct.pack("<I", 1 << 20)), ORIENTATION),
    "count without end": exif((0x010E, 2, 0xFFFFFFFF, bytes(4)), ORIENTATION),
    "unknown type": exif((0x010F, 99, 1, bytes(4)), ORIENTATION),
    "cut off": exif(ORIENTATION, (0x011A, 5, 1, struct.pack("<I", 38)))[:30],
}


@pytest.mark.parametrize("tags", BAD_TAGS)
def test_a_turned_image_is_upright_whatever_its_other_tags_are(tags: str) -> None:
    data = BAD_TAGS[tags]
    assert difference(open_image(with_chunk(chunk(b"eXIf", data), TURNED)), scene()) == 0
    assert difference(open_image(encode(STORED, "WEBP", lossless=True, exif=data)), scene()) == 0
    turned = with_segment(0xE1, b"Exif\0\0" + data, jpeg(STORED))
    assert difference(open_image(turned), scene()) < 2
    assert open_image(prepare(turned, max_side=4)).size == (4, 2)  # decoded small


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"II*\0", b"II*\0\xff\xff\xff\xff", bytes(40), b"no EXIF at all"),
        *(exif((0x0112, kind, 1, value)) for kind, value in ((3, b"\0"), (3, b"\x09"), (2, b"six"), (4, b"\xff" * 4))),
    ],
)
def test_an_image_without_a_legible_orientation_stays_as_it_is_stored(data: bytes) -> None:
    assert difference(open_image(with_chunk(chunk(b"eXIf", data))), scene()) == 0
    plain_jpeg = jpeg(scene())
    assert difference(open_image(with_segment(0xE1, b"Exif\0\0" + data, plain_jpeg)), open_image(plain_jpeg)) == 0


@pytest.mark.parametrize(
    ("marker", "body"),
    [(0xE2, b"ICC_PROFILE\0"), (0xE2, b"MPF\0MM\0*"), (0xED, b"Photoshop 3.0\0" + b"8BIM\4\4"), (0xE1, b"http://ns")],
)
def test_metadata_of_a_jpeg_harms_no_image(marker: int, body: bytes) -> None:
    for image in (jpeg(scene()), encode(scene().convert("CMYK"), "JPEG")):
        assert difference(open_image(with_segment(marker, body, image)), open_image(image)) == 0


@pytest.mark.parametrize(
    "options",
    [{"comment": b"by hand"}, {"dpi": (72, 72), "icc_profile": b"profile" * 20_000}, {"exif": exif(ORIENTATION)}],
    ids=["comment", "profile", "EXIF"],
)
def test_sound_metadata_changes_nothing(options: dict[str, object]) -> None:
    data = encode(scene(600, 400), "JPEG", **options)
    assert prepare(data) == encode(plain(data, 480), "JPEG")


@pytest.mark.parametrize("size", [60_000, 70_000])
def test_a_comment_may_be_longer_than_a_jpeg_can_hold(size: int) -> None:
    gif, text = encode(scene(), "GIF", comment=b"x" * size), chunk(b"tEXt", b"comment\0" + b"\xe9" * size)
    assert difference(open_image(prepare(gif)), open_image(prepare(encode(scene(), "GIF")))) == 0
    assert difference(open_image(prepare(with_chunk(text))), open_image(prepare(PIXELS))) == 0


def test_no_warning_reaches_the_user(tmp_path: Path) -> None:
    tiff = bytearray(encode(scene(), "TIFF", tiffinfo={0x0131: "software" * 9}))
    place = tiff.index(struct.pack("<HHI", 0x0131, 2, 73)) + 8
    tiff[place : place + 4] = struct.pack("<I", 1 << 24)  # outside of the file
    images = {
        "tags.tif": bytes(tiff),
        "tags.webp": encode(scene(), "WEBP", exif=exif((0x010F, 2, 100, struct.pack("<I", 1 << 20)))),
        "animation.png": with_chunk(BAD_CHUNKS["no animation"]),
        "palette.png": encode(scene().convert("P"), "PNG", transparency=bytes(range(256))),
    }
    for name, data in images.items():
        (tmp_path / name).write_bytes(data)
    code = "import sys; from data.preparation import prepare; [prepare(open(n, 'rb').read()) for n in sys.argv[1:]]"
    command = [sys.executable, "-c", code, *(str(tmp_path / name) for name in images)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert ended.stderr == ""
