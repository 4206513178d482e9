"""An image and its class as the training API writes them: a sequence of one position, whose vocabulary is the classes.

Knows no model and decodes no image.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import numpy as np
import tinker
from tinker import types

from kshot_errors import ImageError, RequestError

FIELDS = ("target_tokens", "weights")
Format = Literal["png", "jpeg"]


class Item(NamedTuple):
    """A datum as the loss reads it."""

    image: bytes
    label: int
    weight: float


def datum(image: bytes, label: int) -> tinker.Datum:
    """Train the class index `label` for a JPEG or PNG file: one image, one target, weight 1.

    Raises:
        ImageError: bytes of another kind.
    """
    targets = tinker.TensorData.from_numpy(np.array([label], np.int64))
    return tinker.Datum(model_input=question(image), loss_fn_inputs={"target_tokens": targets})


def question(image: bytes) -> tinker.ModelInput:
    """The prompt that asks for the class of a JPEG or PNG file. Raises ImageError for bytes of another kind."""
    chunk = types.ImageChunk(data=image, format=_format(image), expected_tokens=1)
    return tinker.ModelInput(chunks=[chunk])


def items_of(data: Sequence[tinker.Datum], n_classes: int) -> list[Item]:
    """The data as the loss reads them.

    Raises:
        RequestError: no data, or a datum that is not one image with one target (and one weight). ImageError: an image
            that is neither JPEG nor PNG. Both name the datum by its number.
    """
    if not data:
        raise RequestError("no data given; a forward pass needs at least one datum")
    items = []
    for number, each in enumerate(data):
        with named(f"datum {number}"):
            items.append(_item(each, n_classes))
    return items


def image_of(given: tinker.ModelInput) -> bytes:
    """The file of a prompt's one image. Raises RequestError for any other prompt, ImageError for bytes of no image."""
    chunks = given.chunks
    if len(chunks) != 1 or not isinstance(chunks[0], types.ImageChunk):
        kinds = ", ".join(type(chunk).__name__ for chunk in chunks) or "nothing"
        raise RequestError(f"a classifier's input is exactly one ImageChunk, got {kinds}")
    chunk = chunks[0]
    if chunk.expected_tokens not in (None, 1):
        raise RequestError(f"an image is 1 position to a classifier, expected_tokens is {chunk.expected_tokens}")
    if (format := _format(chunk.data)) != chunk.format:
        raise RequestError(f"the image's format is given as {chunk.format}, its bytes are {format}")
    return chunk.data


@contextmanager
def named(what: str) -> Iterator[None]:
    """Put `what` before the message of an error about a request or an image."""
    try:
        yield
    except (RequestError, ImageError) as error:
        raise type(error)(f"{what}: {error}") from error


def _format(image: bytes) -> Format:
    """The format that an image's first bytes say, as every decoder tells it."""
    if image.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if image.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    raise ImageError("an image is neither JPEG nor PNG; save it as one of them")


def _item(datum: tinker.Datum, n_classes: int) -> Item:
    fields = datum.loss_fn_inputs
    if unknown := sorted(set(fields) - set(FIELDS)):
        raise RequestError(f"cross_entropy reads {' and '.join(FIELDS)}, this one also has {unknown}; drop them")
    if "target_tokens" not in fields:
        raise RequestError("target_tokens, the class index, is missing")
    if fields["target_tokens"].dtype != "int64":
        raise RequestError(f"target_tokens must be int64, got {fields['target_tokens'].dtype}")
    label = int(_number("target_tokens", fields["target_tokens"]))
    if not 0 <= label < n_classes:
        raise RequestError(
            f"target {label} is not one of {n_classes} classes; class indices go from 0 to {n_classes - 1}"
        )
    weight = _number("weights", fields["weights"]) if "weights" in fields else 1.0
    return Item(image_of(datum.model_input), label, weight)


def _number(name: str, data: tinker.TensorData) -> float:
    """The one number of a field. Class indices are far below 2^53, so a float holds them."""
    shape = data.shape if data.sparse_crow_indices is not None else list(data.to_numpy().shape)
    if data.sparse_crow_indices is not None or shape != [1]:
        raise RequestError(f"{name} must be one number, of shape [1], got shape {shape}")
    value = float(data.to_numpy()[0])
    if not math.isfinite(value):
        raise RequestError(f"{name} is {value}, not a finite number")
    return value
