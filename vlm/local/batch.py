"""Model inputs → the packed positions of one pass. Knows no weights, no attention and no loss.

Rows stand one after the other without padding. M-RoPE positions are those of the stock model: text counts up on all
three axes, an image's tokens spread over (time, height, width), and what follows goes on after the largest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
    longest = model.config.text_config.max_position_embeddings
    for ids, _ in rows:
        if not 0 < len(ids) <= longest:
            raise RequestError(
                f"a model input has {len(ids)} positions; this model takes at least one token, at most {longest}"
            )
    ids = np.concatenate([ids for ids, _ in rows])
    places = np.concatenate([places for _, places in rows], 1)
    after = torch.tensor([int(places.max()) + 1 for _, places in rows], device=model.device)
    given = _positions(model, torch.from_numpy(ids), torch.from_numpy(places), images)
    return Batch(Rows([len(ids) for ids, _ in rows], model.device), given, after)


def _positions(model: Model, ids: Tensor, places: Tensor, images: Sequence[ImageFeatures]) -> Positions:
    ids, places = ids.to(model.device), places.to(model.device)
    if not images:
        return Positions(ids, places)
    where = (ids == model.config.image_token_id).nonzero()[:, 0]
    embeds = torch.cat([image.embeds for image in images]).to(model.device)
    layers = zip(*(image.deepstack for image in images), strict=True)
    deepstack = [torch.cat(layer).to(model.device) for layer in layers]
    return Positions(ids, places, where, embeds, deepstack)


def _check(model: Model, each: tinker.ModelInput) -> None:
    placeholders = (model.config.image_token_id, model.config.video_token_id)
    after_image = False
    for chunk in each.chunks:
        if isinstance(chunk, types.EncodedTextChunk):
            model.check_tokens(chunk.tokens)
            placeholder = next((token for token in placeholders if token in chunk.tokens), None)
            if placeholder is not None:
                raise RequestError(f"token {placeholder} stands for image features; give the image as an ImageChunk")
            after_image = after_image and not chunk.length
        elif not isinstance(chunk, types.ImageChunk):
            raise RequestError(f"chunk of type {chunk.type!r} is not supported; use encoded text and images")
        elif after_image:  # the stock positions take neighbours for one image
            raise RequestError("two image chunks stand side by side; put text between them, as <|vision_end|> is")
        else:
            after_image = True


def _row(model: Model, each: tinker.ModelInput, images: "object") -> tuple[np.ndarray, np.ndarray]:
    """Token ids (length,) and M-RoPE positions (3, length) of one input."""
    ids, places, start = [np.zeros(0, np.int64)], [np.zeros((3, 0), np.int64)], 0
    merge = model.config.vision_config.spatial_merge_size
    for chunk in each.chunks:
        if isinstance(chunk, types.ImageChunk):
            time, height, width = next(images).grid  # type: ignore[call-overload]
            spread = np.indices((time, height // merge, width // merge)).reshape(3, -1)
            ids.append(np.full(spread.shape[1], model.config.image_token_id, np.int64))
        else:
            ids.append(np.array(chunk.tokens, np.int64))  # type: ignore[union-attr]
            spread = np.broadcast_to(np.arange(len(ids[-1])), (3, len(ids[-1])))
        places.append(spread + start)
        start = int(places[-1].max(initial=start - 1)) + 1
    return np.concatenate(ids), np.concatenate(places, 1)
