"""A Qwen3-VL checkpoint in memory: the stock weights, its text model on packed positions, tokenizer and image rule.

Several adapters live over one of these; it knows none of them, and no batches, losses or clients.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch

from kshot_errors import RequestError
from vlm import models
from vlm.inputs import ImageRule
from vlm.local.adapter import Layout, LoraSpec
from vlm.local.loading import load, load_tokenizer
from vlm.local.text import Text


class Model:
    """A checkpoint in memory.

    device: where it is put ("auto": on all GPUs); afterwards, where inputs go. dtype: None is the checkpoint's.
    place: its folder or hub id, where its name is another.
    vocabulary, context: tokens it knows, positions it takes. merge: patches a token of an image has, each way.
    image_token, placeholders: the id at image positions, and all ids that no text may hold.
    """

    def __init__(
        self, name: str, device: str = "cpu", dtype: torch.dtype | None = None, place: str | None = None
    ) -> None:
        self.name, place = name, place or name
        self.tokenizer = load_tokenizer(place)  # first: what is small fails before what is large
        self.stock = load(place, device, dtype)
        self.text = Text(self.stock)
        self.rule = ImageRule.from_pretrained(place)
        self.tokenizer_id = models.loadable(place)  # where others on this machine find it
        self.layout = lru_cache(maxsize=None)(self._layout)
        config = self.stock.config  # asking it takes long, and is done for every token
        self.vocabulary: int = config.text_config.vocab_size
        self.context: int = config.text_config.max_position_embeddings
        self.merge: int = config.vision_config.spatial_merge_size
        self.image_token: int = config.image_token_id
        self.placeholders: tuple[int, ...] = (config.image_token_id, config.video_token_id)
        self.kind: str = config.model_type
        embeddings = self.stock.model.language_model.embed_tokens.weight
        self.device: torch.device = embeddings.device
        self.dtype: torch.dtype = embeddings.dtype

    def check_tokens(self, tokens: Sequence[int], what: str = "token") -> None:
        """Raise RequestError for the first of `tokens` that the vocabulary does not have."""
        if tokens and not 0 <= min(tokens) <= max(tokens) < self.vocabulary:
            wrong = next(token for token in tokens if not 0 <= token < self.vocabulary)
            raise RequestError(f"{what} {wrong} is outside the vocabulary of {self.vocabulary}")

    def _layout(self, spec: LoraSpec) -> Layout:
        """Where everything is in an adapter of a spec."""
        return Layout(self.stock, spec)
