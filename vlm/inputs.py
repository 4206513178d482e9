"""Builders of the SDK's types: image bytes and text become a `tinker.ModelInput`, an answer becomes a `tinker.Datum`.

The next-token shift lives here and nowhere else. `ImageRule` says how many tokens an image of a size becomes.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import tinker
from tinker import types

from kshot.errors import ImageError, ModelError, RequestError
from kshot.images import EncodedImage, is_plain, open_header, open_image
from kshot.untrusted import parse_json, read_file
from vlm.label_trie import Branch
from vlm.models import source

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

Format = Literal["png", "jpeg"]
CACHED_HEADERS = 1 << 16  # headers that a rule remembers: training shows the same images again and again
CHUNK_FORMATS: dict[str, Format] = {"PNG": "png", "JPEG": "jpeg"}  # what an ImageChunk may hold


@dataclass(frozen=True)
class ImageRule:
    """How a model's image processor turns sizes into tokens. `processor` is the stock one of the checkpoint.

    headers: key of an image that travels as it is → its format and tokens.
    """

    processor: "BaseImageProcessor"
    headers: dict[str, tuple[Format, int]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_pretrained(cls, model: str) -> "ImageRule":
        """The rule of a model by name, hub id or folder. Raises ModelError for a text model, and where no image
        processor is found."""
        from transformers import AutoImageProcessor

        folder = source(model)
        try:
            if "vision_config" not in parse_json(read_file(Path(folder) / "config.json")):
                raise ModelError(f"model {model!r} is a text model and takes no images; give a Qwen3-VL")
            rule = cls(AutoImageProcessor.from_pretrained(folder, trust_remote_code=False))
            _ = rule.settings, rule.tokens(64, 64)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0]
            way_out = "copy its preprocessor_config.json there, or give a model that cuts images as Qwen3-VL does"
            raise ModelError(f"model {model!r} has no image processor of Qwen3-VL's ({reason}); {way_out}") from error
        return rule

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What decides the number of tokens of an image, in the processor's own terms (pixels)."""
        p: Any = self.processor
        size = {"min_pixels": p.size["shortest_edge"], "max_pixels": p.size["longest_edge"]}
        return {"patch_size": p.patch_size, "merge_size": p.merge_size, **size}

    def tokens(self, height: int, width: int) -> int:
        """Positions that an image of this size takes in the sequence. Raises ImageError for extreme aspect ratios."""
        processor: Any = self.processor
        try:
            return processor.get_number_of_image_patches(height, width) // processor.merge_size**2
        except ValueError as error:
            raise ImageError(f"image of {width}x{height} pixels: {error}") from error


def image_chunk(data: bytes, rule: ImageRule) -> types.ImageChunk:
    """The chunk of an image in any format Pillow reads, with `expected_tokens` set.

    Plain upright JPEG and PNG bytes, RGB or 8-bit grey, travel as they are; anything else (alpha, palette, 16 bit,
    EXIF orientation, other formats) is turned into RGB and sent as PNG, so that every service sees the same pixels.
    Raises ImageError for bytes that are no image.
    """
    image = data if isinstance(data, EncodedImage) else EncodedImage(data)
    known = rule.headers.get(image.key)
    if known is None:
        header = open_header(image)
        plain = CHUNK_FORMATS.get(header.format or "")
        if plain is None or not is_plain(header):
            pixels, buffer = open_image(image), io.BytesIO()
            tokens = rule.tokens(pixels.height, pixels.width)
            pixels.save(buffer, "PNG")
            return types.ImageChunk(data=EncodedImage(buffer.getvalue()), format="png", expected_tokens=tokens)
        known = plain, rule.tokens(header.height, header.width)
        if len(rule.headers) < CACHED_HEADERS:
            rule.headers[image.key] = known
    format, tokens = known
    return types.ImageChunk(data=image, format=format, expected_tokens=tokens)


def model_input(*parts: types.ModelInputChunk | Sequence[int]) -> tinker.ModelInput:
    """Chunks and lists of token ids, interleaved in the order given; empty lists leave no trace."""
    chunks = [types.EncodedTextChunk(tokens=list(p)) if isinstance(p, Sequence) else p for p in parts]
    return tinker.ModelInput(chunks=[c for c in chunks if not isinstance(c, types.EncodedTextChunk) or c.tokens])


def datum(prompt: tinker.ModelInput, answer: Sequence[int]) -> tinker.Datum:
    """Train `answer` (token ids) after `prompt`: the loss is on the answer's tokens alone.

    With L = prompt + answer tokens, the model input holds the first L - 1 positions, `target_tokens[i]` is the token
    that follows position i (0 at image positions and before the answer, where `weights` is 0), as the Tinker API
    asks. Raises RequestError for an empty prompt or answer.
    """
    return _datum(prompt, answer, np.ones(len(answer), np.float32))


def closed_datum(prompt: tinker.ModelInput, choice: Sequence[int], branches: Sequence[Branch]) -> tinker.Datum:
    """Train the choice of `choice` among others after `prompt`, for the loss "closed_set".

    The loss is on the tokens at its branches; `candidates`, a sparse (positions, most) matrix of int64, holds in the
    row of each the tokens that may stand there. Raises RequestError for an empty prompt or choice.
    """
    answer = choice[: branches[-1].position + 1]  # what follows is certain
    weights = np.zeros(len(answer), np.float32)
    weights[[branch.position for branch in branches]] = 1.0
    made = _datum(prompt, answer, weights)
    rows = np.zeros(made.model_input.length, np.int64)
    rows[[prompt.length - 1 + branch.position for branch in branches]] = [len(b.candidates) for b in branches]
    candidates = tinker.TensorData(
        data=np.concatenate([branch.candidates for branch in branches]),
        dtype="int64",
        shape=[len(rows), int(rows.max())],
        sparse_crow_indices=[0, *rows.cumsum().tolist()],
        sparse_col_indices=[n for branch in branches for n in range(len(branch.candidates))],
    )
    return replace(made, loss_fn_inputs={**made.loss_fn_inputs, "candidates": candidates})


def _datum(prompt: tinker.ModelInput, answer: Sequence[int], loss_weights: np.ndarray) -> tinker.Datum:
    if any(isinstance(c, types.ImageChunk) and c.expected_tokens is None for c in prompt.chunks):
        raise RequestError("an image chunk without expected_tokens has no length; vlm.image_chunk sets them")
    if not prompt.length or not answer:
        raise RequestError("a datum needs a prompt and an answer of at least one token each")
    before = prompt.length - 1
    targets = np.zeros(before + len(answer), np.int64)
    weights = np.zeros(before + len(answer), np.float32)
    targets[before:], weights[before:] = answer, loss_weights
    fields = {"target_tokens": tinker.TensorData.from_numpy(targets), "weights": tinker.TensorData.from_numpy(weights)}
    return tinker.Datum(model_input=model_input(*prompt.chunks, answer[:-1]), loss_fn_inputs=fields)
