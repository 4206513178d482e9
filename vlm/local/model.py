"""A Qwen3-VL checkpoint in memory: the stock weights, its text model on packed positions, tokenizer and image rule.

Several adapters live over one of these; it knows none of them, and no batches, losses or clients.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from transformers import AutoTokenizer

from kshot_errors import RequestError
from vlm.inputs import ImageRule
from vlm.local.adapter import Layout, LoraSpec
from vlm.local.loading import load
from vlm.local.text import Text
from vlm.models import source


class Model:
    """A checkpoint in memory. device: where inputs go and hidden states come from; dtype: None is the checkpoint's."""

    def __init__(self, name: str, device: str = "cpu", dtype: torch.dtype | None = None) -> None:
        self.name = name
        self.stock = load(name, device, dtype)
        self.text = Text(self.stock)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(source(name), trust_remote_code=False)
        self.rule = ImageRule.from_pretrained(name)
        self.layout = lru_cache(maxsize=None)(self._layout)

    @property
    def config(self) -> Any:
        """The stock configuration."""
        return self.stock.config

    @property
    def device(self) -> torch.device:
        device: torch.device = self.stock.model.language_model.embed_tokens.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.stock.model.language_model.embed_tokens.weight.dtype
        return dtype

    def check_tokens(self, tokens: Iterable[int], what: str = "token") -> None:
        """Raise RequestError for the first of `tokens` that the vocabulary does not have."""
        size = self.config.text_config.vocab_size
        for token in tokens:
            if not 0 <= token < size:
                raise RequestError(f"{what} {token} is outside the vocabulary of {size}")

    def _layout(self, spec: LoraSpec) -> Layout:
        """Where everything is in an adapter of a spec."""
        return Layout(self.stock, spec)
