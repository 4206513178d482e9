"""Model inputs → the packed positions of one pass. Knows no weights, no attention and no loss.

Rows stand one after the other without padding. M-RoPE positions are those of the stock model: text counts up on all
three axes, an image's tokens spread over (time, height, width), and what follows goes on after the largest.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import tinker
import torch
from tinker import types
from torch import Tensor

from kshot_errors import RequestError
from vlm.local.attention import Rows
from vlm.local.model import Model
from vlm.local.text import Positions
from vlm.local.vision import ImageFeatures

Encode = Callable[[Sequence[types.ImageChunk]], list[ImageFeatures]]


@dataclass(frozen=True)
class Batch:
    """Packed rows. given: what the text model takes. next_place: (rows,) the M-RoPE position after each row's last."""

    rows: Rows
    given: Positions
    next_place: Tensor

    @property
    def ends(self) -> Tensor:
        """(rows,) where each row's last position is in the pack."""
        return torch.tensor(self.rows.lengths, device=self.given.ids.device).cumsum(0) - 1

    def is_image(self) -> Tensor:
        """(positions,) True at image positions."""
        mask = torch.zeros_like(self.given.ids, dtype=torch.bool)
        if self.given.images is not None:
            mask[self.given.images] = True
        return mask


def collate(model: Model, encode: Encode, inputs: Sequence[tinker.ModelInput]) -> Batch:
    """The batch of these inputs; `encode` gives the images' features.

    Raises RequestError for an empty input, foreign chunks and tokens off the vocabulary.
    """
    for each in inputs:
        _check(model, each)
    images = encode([chunk for each in inputs for chunk in each.chunks if isinstance(chunk, types.ImageChunk)])
    remaining = iter(images)
    rows = [_row(model, each, remaining) for each in inputs]
    lengths = [len(ids) for ids, _, _ in rows]
    wrong = next((length for length in lengths if not 0 < length <= model.context), None)
    if wrong is not None:
        raise RequestError(
            f"a model input has {wrong} positions; this model takes at least one token, at most {model.context}"
        )
    ids = np.array([token for ids, _, _ in rows for token in ids], np.int64)
    given = _positions(model, ids, np.concatenate([places for _, places, _ in rows], 1), images)
    after = torch.tensor([after for _, _, after in rows], device=model.device)
    return Batch(Rows(lengths, model.device), given, after)


def groups(lengths: Sequence[int], rows: int, positions: int) -> list[list[int]]:
    """The numbers of the rows that go through together, by length: at most `rows`, at most `positions` when padded to
    the longest and at most twice those there are, one row at least."""
    made, total = list[list[int]](), 0
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        length, together = lengths[number], made[-1] if made else []
        padded = (len(together) + 1) * length  # in this order the last one is the longest
        if not together or len(together) == rows or padded > min(positions, 2 * (total + length)):
            made.append(together := [])
            total = 0
        together.append(number)
        total += length
    return made


def length_of(each: tinker.ModelInput) -> int:
    """The positions of an input, as far as they are known before its images are decoded."""
    sizes = ((c.expected_tokens or 0) if isinstance(c, types.ImageChunk) else c.length for c in each.chunks)
    return sum(sizes)


def _positions(model: Model, ids: np.ndarray, places: np.ndarray, images: Sequence[ImageFeatures]) -> Positions:
    device = model.device
    packed = torch.from_numpy(ids).to(device), torch.from_numpy(places).to(device)
    if not images:
        return Positions(*packed)
    where = torch.from_numpy(np.flatnonzero(ids == model.image_token)).to(device)
    values = torch.cat([image.values for image in images], 1).to(device)
    return Positions(*packed, where, values[0], values[1:])


def _check(model: Model, each: tinker.ModelInput) -> None:
    after_image = False
    for chunk in each.chunks:
        if isinstance(chunk, types.EncodedTextChunk):
            model.check_tokens(chunk.tokens)
            placeholder = next((token for token in model.placeholders if token in chunk.tokens), None)
            if placeholder is not None:
                raise RequestError(f"token {placeholder} stands for image features; give the image as an ImageChunk")
            after_image = after_image and not chunk.tokens
        elif not isinstance(chunk, types.ImageChunk):
            raise RequestError(f"chunk of type {chunk.type!r} is not supported; use encoded text and images")
        elif after_image:  # the stock positions take neighbours for one image
            raise RequestError("two image chunks stand side by side; put text between them, as <|vision_end|> is")
        else:
            after_image = True


def _row(model: Model, each: tinker.ModelInput, images: Iterator[ImageFeatures]) -> tuple[list[int], np.ndarray, int]:
    """Token ids, M-RoPE positions (3, length), and the position that comes after them, of one input."""
    ids, shape = list[int](), list[int | tuple[int, int, int]]()
    for chunk in each.chunks:
        if isinstance(chunk, types.EncodedTextChunk):
            ids += chunk.tokens
            shape.append(len(chunk.tokens))
        else:
            image = next(images)
            ids += [model.image_token] * image.tokens
            shape.append(image.grid)
    return ids, *_places(tuple(shape), model.merge)


@lru_cache(maxsize=4096)  # most prompts have one of few shapes
def _places(shape: tuple[int | tuple[int, int, int], ...], merge: int) -> tuple[np.ndarray, int]:
    """M-RoPE positions (3, length), and the one after them, of text chunks (their lengths) and images (their grids)."""
    places, start = [np.zeros((3, 0), np.int64)], 0
    for part in shape:
        if isinstance(part, int):  # text counts up on all three axes
            places.append(np.arange(start, start + part)[None].repeat(3, 0))
            start += part
        else:  # an image's tokens spread by time, row and column
            size = part[0], part[1] // merge, part[2] // merge
            places.append(start + np.indices(size).reshape(3, -1))
            start += max(size)
    return np.concatenate(places, 1), start
