"""Features of prompts: the vision tower's, averaged over an image, and the text model's last hidden state. Knows no
clients and no heads.

The tower's alone need no pass of the text model, and with a frozen tower they come from the cache of image features.
"""

from collections.abc import Sequence
from typing import cast

import numpy as np
import tinker
import torch
from tinker import types
from torch import Tensor

from kshot_errors import RequestError
from vlm.local.attention import Causal
from vlm.local.batch import Batch, groups, length_of
from vlm.local.engine import Engine, Snapshot

ROWS = 64  # prompts in one pass
POSITIONS = 1 << 15  # of prompts in one pass


@torch.no_grad()
def embed(
    engine: Engine, snapshot: Snapshot, prompts: Sequence[tinker.ModelInput], *, tower: bool, hidden: bool
) -> np.ndarray:
    """(prompts, D) float32: see `vlm.embedding.embed`. Raises RequestError for a prompt that is not of one image, if
    `tower`."""
    if tower:
        _check(prompts)
    parts = [part for part, asked in ((_tower, tower), (_hidden, hidden)) if asked]
    width = engine.model.stock.config.text_config.hidden_size
    features = np.empty((len(prompts), len(parts), width), np.float32)
    for members in groups([length_of(prompt) for prompt in prompts], ROWS, POSITIONS):
        batch = engine.collate([prompts[n] for n in members], snapshot.factors)
        for number, part in enumerate(parts):
            features[members, number] = part(engine, snapshot, batch).float().cpu().numpy()
    return features.reshape(len(prompts), len(parts) * width)


def _check(prompts: Sequence[tinker.ModelInput]) -> None:
    for number, prompt in enumerate(prompts):
        images = sum(isinstance(chunk, types.ImageChunk) for chunk in prompt.chunks)
        if images != 1:
            raise RequestError(
                f"prompt {number} holds {images} images; features of the vision tower are of exactly one, "
                "those of other prompts are 'hidden'"
            )


def _tower(engine: Engine, snapshot: Snapshot, batch: Batch) -> Tensor:
    """(rows, hidden) mean of what stands at the positions of each row's one image. Row by row, so that the digits do
    not depend on the other rows; in float32, since the mean of many bfloat16 numbers has more digits than they have."""
    embeds = cast(Tensor, batch.given.embeds)  # every row has an image
    tokens = torch.bincount(batch.rows.row[batch.is_image()]).tolist()
    return torch.stack([image.float().mean(0) for image in embeds.split(tokens)])


def _hidden(engine: Engine, snapshot: Snapshot, batch: Batch) -> Tensor:
    """(rows, hidden) last hidden state at each row's end."""
    ends = batch.ends
    return engine.model.text.hidden(batch.given, Causal(batch.rows, ends), snapshot.factors, ends)
