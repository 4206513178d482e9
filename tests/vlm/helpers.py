"""What the tests of vlm share beside fixtures: class names, an example, and the stock forward's inputs."""

from dataclasses import dataclass

import tinker
import torch
from tinker import types

from kshot_images import open_image
from vlm.inputs import ImageRule

IMAGE = 4082  # the nano tokenizer's <|image_pad|>
CLASSES = ("star", "car", "cart", "crocodile", "crocodile head", "café ☕")


@dataclass(frozen=True)
class Pictured:
    """An example as `vlm.classifier` takes it."""

    image: bytes
    label: int
    mirrored: bytes | None = None


def stock_inputs(datum_input: tinker.ModelInput, rule: ImageRule) -> dict[str, torch.Tensor]:
    """What the stock forward takes for one model input, made by the stock image processor."""
    ids: list[int] = []
    images = []
    for chunk in datum_input.chunks:
        if isinstance(chunk, types.ImageChunk):
            images.append(rule.processor(images=[open_image(chunk.data)], return_tensors="pt"))
            ids += [IMAGE] * chunk.length
        else:
            assert isinstance(chunk, types.EncodedTextChunk)
            ids += chunk.tokens
    inputs = {"input_ids": torch.tensor([ids])}
    if images:
        inputs["pixel_values"] = torch.cat([i["pixel_values"] for i in images])
        inputs["image_grid_thw"] = torch.cat([i["image_grid_thw"] for i in images])
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    return inputs
