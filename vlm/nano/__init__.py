"""The nano Qwen3-VL: the architecture of Qwen3-VL, small enough to train on two cores.

This folder is the model in hub layout: configuration, processor settings, a tokenizer (part of Qwen3's), the weights
and the model card README.md. `experiments.pretrain` made weights and tokenizer.
"""

from pathlib import Path

from kshot.errors import ModelError

NAME = "kshot/nano-qwen3-vl"
NOTE = (
    f"{NAME} has 3 million weights and learnt from drawings of icons with their names and a few photographs. The names "
    "in the data set icons were among them, on drawings by other designers. It says nothing about Qwen3-VL."
)
REVISION = "a82b49ce6825"  # the first 12 digits of the SHA-256 of the weights
HERE = Path(__file__).parent


def folder() -> Path:
    """The model's folder. Raises ModelError where the weights are not installed."""
    if not (HERE / "model.safetensors").is_file():
        raise ModelError(f"the weights of {NAME} are missing in {HERE}; install kshot again")
    return HERE
