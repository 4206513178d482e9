"""The formats of images that are read, everywhere; and those that are refused by name."""

import ast
import io
import subprocess
from pathlib import Path

import pytest
from PIL import EpsImagePlugin, Image

from kshot.errors import ImageError
from kshot.images import FORMATS, open_image

ROOT = Path(__file__).parents[1]
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"


def saved(form: str, **options: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(stream, form, **options)
    return stream.getvalue()


@pytest.mark.parametrize("form", [*FORMATS, "MPO"])
def test_these_are_read(form: str) -> None:
    assert open_image(saved(form)).size == (8, 8)


@pytest.mark.parametrize("compression", ["jpeg", "zstd", "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_tiff_is_read_with_all_its_compressions(compression: str) -> None:
    assert open_image(saved("TIFF", compression=compression)).size == (8, 8)


@pytest.mark.parametrize("form", ["JPEG2000", "ICO", "PCX", "SGI", "DDS", "ICNS"])
def test_others_are_refused_by_name(form: str) -> None:
    with pytest.raises(ImageError, match=f"a.png: {form}, which is not read; convert it to PNG or JPEG"):
        open_image(saved(form), "a.png")


def test_no_program_is_started_for_postscript(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ghostscript would run what a client wrote."""
    started: list[object] = []
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    monkeypatch.setattr(subprocess, "check_call", lambda *command, **_: started.append(command))
    with pytest.raises(ImageError, match="EPS, which is not read; convert it to PNG or JPEG"):
        open_image(EPS)
    assert not started


def test_nobody_opens_an_image_without_the_formats() -> None:
    for package in ("kshot", "data", "vlm", "baselines", "experiments"):
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            for call in ast.walk(ast.parse(text)) if "Image.open" in text else ():
                if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("Image.open"):
                    assert {word.arg: ast.unparse(word.value) for word in call.keywords} == {"formats": "FORMATS"}, path
