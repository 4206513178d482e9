"""What a data set is: examples of image bytes with a label. Knows nothing of files, models or shots."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass


def content_key(image: bytes) -> str:
    """The identity of an image wherever it came from: the SHA-256 of its bytes, in hex."""
    return hashlib.sha256(image).hexdigest()


@dataclass(frozen=True)
class Example:
    """One labelled image.

    key: `content_key` of the image as it came from its source.
    image: encoded bytes (PNG, JPEG, ...).
    label: index into the data set's classes.
    mirrored: the horizontally flipped image in the same encoding where training may use it, else None.
    """

    key: str
    image: bytes
    label: int
    mirrored: bytes | None = None


@dataclass(frozen=True)
class Dataset:
    """A data set under one named protocol: class names (label → text) and its two splits."""

    name: str
    protocol: str
    classes: tuple[str, ...]
    train: Sequence[Example]
    test: Sequence[Example]
