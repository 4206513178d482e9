"""Loading a Qwen3-VL checkpoint and giving it LoRA adapters. Knows no batches, losses or clients.

The model is the stock transformers class with PEFT's LoRA layers put in place; several adapters live over one base.
Only the patch embedding is computed differently: its Conv3d has a stride equal to its kernel, which makes it a matrix
product, and as a product it is many times faster (pytorch#174051).
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, Qwen3VLForConditionalGeneration

from kshot_errors import ModelError, RequestError
from vlm.inputs import ImageRule
from vlm.models import source

ALPHA = 32  # at any rank, as the Tinker API fixes it
_TEXT = r".*language_model\.layers\.\d+\."
TARGETS = {  # what each flag of create_lora_training_client trains: the text model only
    "train_attn": _TEXT + r"self_attn\.(q|k|v|o)_proj",
    "train_mlp": _TEXT + r"mlp\.(gate|up|down)_proj",
    "train_unembed": r".*lm_head",
}


@dataclass(frozen=True)
class LoraSpec:
    """What a LoRA adapter covers; two adapters of one spec have the same tensors."""

    rank: int = 32
    train_mlp: bool = True
    train_attn: bool = True
    train_unembed: bool = True

    @property
    def label(self) -> str:
        """A name for the spec, fit for a module's name."""
        flags = [flag for flag in TARGETS if getattr(self, flag)]
        return "_".join([f"rank{self.rank}", *flags])

    def config(self) -> LoraConfig:
        """PEFT's configuration. Raises RequestError where nothing would be trained."""
        targets = [pattern for flag, pattern in TARGETS.items() if getattr(self, flag)]
        if self.rank < 1 or not targets:
            raise RequestError(f"LoRA of rank {self.rank} on {len(targets)} kinds of layers trains nothing")
        target = "|".join(targets)
        return LoraConfig(r=self.rank, lora_alpha=ALPHA, lora_dropout=0.0, bias="none", target_modules=target)


class LinearPatchEmbed(nn.Module):
    """The patch embedding as a matrix product, with the stock module's own parameters and their names."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.proj: Any = stock.proj

    def forward(self, patches: Tensor) -> Tensor:
        """(patches, channels x time x height x width) → (patches, hidden)."""
        weight = self.proj.weight
        return nn.functional.linear(patches.to(weight.dtype), weight.flatten(1), self.proj.bias)


class Model:
    """A checkpoint in memory: stock model, tokenizer, image rule, and the LoRA adapters over it."""

    def __init__(self, name: str, device: str = "cpu", dtype: torch.dtype | None = None) -> None:
        self.name, files = name, source(name)
        self.stock = _load(name, files, dtype).to(device).eval().requires_grad_(False)
        self.stock.model.visual.patch_embed = LinearPatchEmbed(self.stock.model.visual.patch_embed)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(files)
        self.rule = ImageRule.from_pretrained(name)
        self._peft: Any = None

    @property
    def device(self) -> torch.device:
        return self.stock.device

    def add_adapter(self, adapter: str, spec: LoraSpec, seed: int) -> None:
        """Put a fresh adapter (A random from `seed`, B zero: no change to the model) beside the others."""
        with torch.random.fork_rng(), warnings.catch_warnings():
            # PEFT warns that merging into a tied head needs care (a merged export unties it first), and asks the
            # model a question that transformers has renamed.
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            torch.manual_seed(seed)
            if self._peft is None:
                self._peft = get_peft_model(self.stock, spec.config(), adapter_name=adapter)
            else:
                self._peft.add_adapter(adapter, spec.config())
        for parameter in self.parameters(adapter).values():
            parameter.requires_grad_(True)

    def drop_adapter(self, adapter: str) -> None:
        """Take an adapter and its memory away; with the last one go PEFT's layers."""
        others = [name for name in self._peft.peft_config if name != adapter]
        if others:
            self._peft.set_adapter(others[0])  # PEFT keeps asking for the active one, so it must not be the one to go
            self._peft.delete_adapter(adapter)
        else:
            self._peft.unload()
            self._peft = None

    def has_adapter(self, adapter: str) -> bool:
        return self._peft is not None and adapter in self._peft.peft_config

    def use(self, adapter: str | None) -> None:
        """Make one adapter (or, with None, the base model alone) the one that computes from here on."""
        if self._peft is None:
            return
        if adapter is None:
            self._peft.base_model.disable_adapter_layers()
        else:
            self._peft.base_model.enable_adapter_layers()
            self._peft.set_adapter(adapter)

    def parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """The adapter's own parameters in a fixed order, under the names that PEFT stores them by."""
        mark = f".{adapter}."
        return {n.replace(mark, "."): p for n, p in self._peft.named_parameters() if "lora_" in n and mark in n}

    def weights(self, adapter: str) -> dict[str, Tensor]:
        """A copy of the adapter's tensors under PEFT's own names, as PEFT stores them."""
        state = get_peft_model_state_dict(self._peft, adapter_name=adapter, save_embedding_layers=False)
        return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}

    def set_weights(self, adapter: str, weights: dict[str, Tensor]) -> None:
        """Put tensors that `weights` gave into an adapter of the same spec. Raises ModelError, before anything is
        changed, where names or shapes differ."""
        here = {name: tensor.shape for name, tensor in self.weights(adapter).items()}
        given = {name: tensor.shape for name, tensor in weights.items()}
        wrong = sorted(name for name in {*here, *given} if here.get(name) != given.get(name))
        if wrong:
            first = f"{wrong[0]} is {given.get(wrong[0], 'missing')}, not {here.get(wrong[0], 'to be there')}"
            raise ModelError(f"checkpoint does not fit the adapter in {len(wrong)} tensors: {first}")
        set_peft_model_state_dict(self._peft, weights, adapter_name=adapter)

    def check_tokens(self, tokens: Iterable[int], what: str = "token") -> None:
        """Raise RequestError for the first of `tokens` that the vocabulary does not have."""
        size = self.stock.config.text_config.vocab_size
        for token in tokens:
            if not 0 <= token < size:
                raise RequestError(f"{what} {token} is outside the vocabulary of {size}")


def _load(name: str, files: str, dtype: torch.dtype | None) -> Any:
    try:
        config = AutoConfig.from_pretrained(files)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        way_out = "go online once so that the hub's files are cached, or give a folder"
        raise ModelError(f"model {name!r} cannot be loaded ({reason}); {way_out}") from error
    if config.model_type != "qwen3_vl":
        raise ModelError(f"model {name!r} is of type {config.model_type!r}; this engine runs dense Qwen3-VL (qwen3_vl)")
    try:
        return Qwen3VLForConditionalGeneration.from_pretrained(files, dtype=dtype or config.dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"model {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
