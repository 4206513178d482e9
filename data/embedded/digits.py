"""The data set `digits`: scikit-learn's 1,797 handwritten digits as PNG.

The originals have 8x8 pixels of 17 grey levels, smaller than any vision model takes. They are drawn at 64x64 with
Pillow's BICUBIC filter, dark ink on white paper. The split is by image: who wrote which digit is not recorded.
"""

import io
from pathlib import Path
from typing import Any

from data.dataset import Dataset, DatasetSpec, Item, content_key, examples_of
from data.fewshot import split_items

SIDE = 64
LEVELS = 16  # the darkest ink of the originals
TEST_PER_CLASS = 50  # of 174 to 183


def load(spec: DatasetSpec, *, root: Path | None, split_seed: int) -> Dataset:
    """50 test images per class, the other 1,297 images are train; nothing is written, so root is not used."""
    from sklearn.datasets import load_digits

    digits, classes = load_digits(), spec.classes or ()
    images = [_png(pixels) for pixels in digits.images]
    items = [Item("", "", classes[y], i, content_key(i)) for i, y in zip(images, digits.target, strict=True)]
    train, test = split_items(items, test_size=lambda count: TEST_PER_CLASS, seed=split_seed)
    protocol = f"{spec.protocol}-{split_seed}"
    return Dataset(spec.name, protocol, classes, examples_of(train, classes), examples_of(test, classes))


def _png(pixels: Any) -> bytes:
    """pixels: (8, 8) ink from 0 to 16 → PNG of 64x64 grey pixels."""
    from PIL import Image

    paper = 255 - (pixels * 255 / LEVELS).round().astype("uint8")
    image = Image.fromarray(paper).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    # Stored, not deflated: the bytes, and with them the image's key, do not depend on the build of zlib.
    image.save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()
