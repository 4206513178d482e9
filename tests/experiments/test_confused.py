"""Images of the worst confusions: the right ones, small, in the page alone, and nothing of them that is not meant."""

import base64
import io
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from reported import SWEEP, Page, cell, written

from experiments.report.comparisons import ImageSources
from kshot.errors import ImageError

NAMES = ["<b>cat", "dog|s", 'o"wl']
RUNS = {  # {seed: {key: (label, prediction)}}
    0: {"a": (0, 1), "b": (0, 1), "c": (0, 1), "d": (0, 1), "e": (2, 0), "f": (1, 1)},
    1: {"a": (0, 0), "b": (0, 1), "c": (0, 2), "d": (0, 1), "e": (2, 2), "f": (1, 1)},
}
SWEPT = SWEEP | {"classes": {"icons": NAMES}, "methods": ["vlm-lora"]}
CELLS = [cell("vlm-lora", 4, seed, 0.5) for seed in RUNS]
COLOURS = {"a": (250, 0, 0), "b": (0, 250, 0), "c": (0, 0, 250), "d": (250, 250, 0), "e": (0, 250, 250), 1: (9, 9, 9)}


def picture(which: str | int, size: tuple[int, int] = (300, 200), **more: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, COLOURS[which]).save(buffer, more.pop("format", "PNG"), **more)
    return buffer.getvalue()


def alone(test: Callable[[str, str], bytes | None]) -> ImageSources:
    """No training images."""
    return ImageSources(test, lambda *_: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "predictions").mkdir()
    for seed, run in RUNS.items():
        columns = {"key": [*run], "label": [a for a, _ in run.values()], "prediction": [b for _, b in run.values()]}
        parquet.write_table(pa.table(columns), tmp_path / "predictions" / f"vlm-lora-4-{seed}.parquet")
    return tmp_path


def thumbnails(page: str) -> list[tuple[str, Image.Image]]:
    """(alt text, image) of each image of the data set, in order."""
    found = re.findall(r'<img src="data:image/jpeg;base64,([^"]*)" alt="([^"]*)">', page)
    return [(unescape(alt), Image.open(io.BytesIO(base64.b64decode(data)))) for data, alt in found]


def test_the_worst_are_shown_with_what_they_were_taken_for(folder: Path) -> None:
    requested: list[tuple[str, str]] = []

    def read(dataset: str, key: str) -> bytes:
        requested.append((dataset, key))
        return picture(key)

    text, page = written(
        folder, SWEPT, CELLS, images=ImageSources(read, lambda _, label: picture(1) if label == 1 else None)
    )
    shown = thumbnails(page)
    test, taken = "test image of <b>cat, taken for dog|s", "training image of dog|s"
    more = ['test image of <b>cat, taken for o"wl', 'test image of o"wl, taken for <b>cat']
    assert [alt for alt, _ in shown] == [test, test, test, taken, *more]
    # b and d were confused under both seeds, a and c under one; of these the key decides.
    for (_, image), colour in zip(shown, [COLOURS[which] for which in ("b", "d", "a", 1, "c", "e")], strict=True):
        assert image.format == "JPEG"
        assert image.size == (96, 64)
        assert np.abs(np.asarray(image, int) - colour).max() < 12
    assert requested == [("icons", key) for key in "bdace"]
    assert "data:" not in text
    assert "test image of" not in text
    parsed = Page(page)
    assert not parsed.open
    assert all(img["alt"] for img in parsed.named("img"))
    assert "<b>" not in page
    assert "VLM + LoRA: &lt;b&gt;cat taken for dog|s" in page


def test_without_a_way_to_get_them_there_are_none(folder: Path) -> None:
    plain = written(folder, SWEPT, CELLS)
    assert thumbnails(plain[1]) == []
    assert "<li><img" not in plain[1]
    assert "the most frequent confusions" in plain[1]
    assert written(folder, SWEPT, CELLS, images=ImageSources(lambda *_: None, lambda *_: picture(1))) == plain


def test_some_that_cannot_be_had_are_left_out(folder: Path) -> None:
    _, page = written(folder, SWEPT, CELLS, images=alone(lambda _, key: picture(key) if key in "de" else None))
    assert [alt for alt, _ in thumbnails(page)] == [
        "test image of <b>cat, taken for dog|s",
        'test image of o"wl, taken for <b>cat',
    ]


def test_small_images_are_not_enlarged_and_say_nothing_of_their_file(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "secret words"

    def read(_: str, key: str) -> bytes:
        return picture(key, (40, 10), format="JPEG", comment=b"secret words", exif=exif)

    _, page = written(folder, SWEPT, CELLS, images=alone(read))
    assert {image.size for _, image in thumbnails(page)} == {(40, 10)}
    assert all(not image.getexif() and "comment" not in image.info for _, image in thumbnails(page))


def test_the_same_images_give_the_same_bytes(folder: Path) -> None:
    first, second = (
        written(folder, SWEPT, cells, images=alone(lambda _, key: picture(key))) for cells in (CELLS, CELLS[::-1])
    )
    assert first == second
    assert thumbnails(first[1])


def test_a_picture_that_is_none_says_which(folder: Path) -> None:
    with pytest.raises(ImageError, match=r"^image b: "):
        written(folder, SWEPT, CELLS, images=alone(lambda *_: b"no image"))
