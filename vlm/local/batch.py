"""Model inputs → the tensors of one forward pass. Knows no weights and no loss.

Sequences are padded on the right: attention is causal, so padding is never seen by a real token and needs no mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tinker
import torch
from tinker import types
from torch import Tensor
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from kshot_errors import RequestError
from vlm.local.model import Model
from vlm.local.vision import ImageFeatures, Vision


@dataclass(frozen=True)
class Batch:
    """Rows of token ids with their images. ids: (rows, length), right-padded. lengths: real positions a row.

    positions: (3, rows, length) M-RoPE positions (time, height, width). images: all rows' images in order.
    is_image: (rows, length) True at image positions.
    """

    ids: Tensor
    lengths: list[int]
    positions: Tensor
    is_image: Tensor
    images: list[ImageFeatures]

    def next_position(self) -> Tensor:
        """(rows,) the position that the token after each row's last one takes."""
        rows = [self.positions[:, row, :length].amax() + 1 for row, length in enumerate(self.lengths)]
        return torch.stack(rows)


def collate(model: Model, vision: Vision, inputs: Sequence[tinker.ModelInput]) -> Batch:
    """The batch of these inputs. Raises RequestError for an empty one, foreign chunks and tokens off the vocabulary."""
    chunks = [chunk for each in inputs for chunk in each.chunks]
    images = vision.features([chunk for chunk in chunks if isinstance(chunk, types.ImageChunk)])
    remaining = iter(images)
    rows = [_row(model, each, remaining) for each in inputs]
    lengths = [len(row) for row in rows]
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
    is_image = ids == model.stock.config.image_token_id
    positions = _positions(model, ids, lengths, is_image, images)
    device = model.device
    return Batch(ids.to(device), lengths, positions.to(device), is_image.to(device), images)


def run(
    model: Model,
    ids: Tensor,
    positions: Tensor,
    images: Sequence[ImageFeatures] = (),
    *,
    cache: Any = None,
    mask: Tensor | None = None,
) -> Tensor:
    """(rows, length, hidden): the text model's last hidden states, after its final norm.

    ids: (rows, length). positions: (3, rows, length). images: the features at the rows' image positions, in order.
    cache: a transformers cache to read and fill. mask: (1 or rows, 1, length, length) additive, instead of causal.
    """
    return model.stock.model(
        input_ids=ids,
        position_ids=positions,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=cache is not None,
        mm_encoder_outputs={"image": _encoder_output(images)} if images else None,
    ).last_hidden_state


def _row(model: Model, each: tinker.ModelInput, images: Any) -> list[int]:
    row: list[int] = []
    after_image = False
    for chunk in each.chunks:
        if isinstance(chunk, types.ImageChunk):
            if after_image:  # the stock positions take neighbours for one image
                raise RequestError("two image chunks stand side by side; put text between them, as <|vision_end|> is")
            row += [model.stock.config.image_token_id] * next(images).tokens
        elif isinstance(chunk, types.EncodedTextChunk):
            _check_tokens(model, chunk.tokens)
            row += chunk.tokens
        else:
            raise RequestError(f"chunk of type {chunk.type!r} is not supported; use encoded text and images")
        after_image = isinstance(chunk, types.ImageChunk) or (after_image and not chunk.length)
    longest = model.stock.config.text_config.max_position_embeddings
    if not 0 < len(row) <= longest:
        raise RequestError(
            f"a model input has {len(row)} positions; this model takes at least one token, at most {longest}"
        )
    return row


def _check_tokens(model: Model, tokens: Sequence[int]) -> None:
    model.check_tokens(tokens)
    config = model.stock.config
    placeholder = next((t for t in tokens if t in (config.image_token_id, config.video_token_id)), None)
    if placeholder is not None:
        raise RequestError(f"token {placeholder} stands for image features; give the image as an ImageChunk")


def _positions(model: Model, ids: Tensor, lengths: list[int], is_image: Tensor, images: list[ImageFeatures]) -> Tensor:
    grids = torch.tensor([image.grid for image in images]).reshape(-1, 3)
    real = torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]
    positions, _ = model.stock.model.get_rope_index(
        ids, mm_token_type_ids=is_image.int(), image_grid_thw=grids, attention_mask=real.long()
    )
    return positions


def _encoder_output(images: Sequence[ImageFeatures]) -> BaseModelOutputWithDeepstackFeatures:
    # the stock forward takes a list with a tensor for each image, which its own annotations do not say
    layers: Any = [list(layer) for layer in zip(*(image.deepstack for image in images), strict=True)]
    embeds: Any = [image.embeds for image in images]
    return BaseModelOutputWithDeepstackFeatures(pooler_output=embeds, deepstack_features=layers)
